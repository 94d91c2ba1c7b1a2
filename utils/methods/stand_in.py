"""Public images that stand for the private ones in a rehearsal."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState

from utils.arguments.rehearsal import RehearsalArguments
from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import DataArguments, ModelArguments
from utils.data.folders import TEXT
from utils.data.image_column import find_image_column
from utils.data.images import read_pixel_batches
from utils.data.private_set import PrivateSet, load_private_set
from utils.data.rows import load_rows
from utils.errors import UsageError
from utils.ledger.public_sets import refuse_as_public
from utils.sampling.generation import generate_folder, prepare_generation
from utils.sampling.sources import find_source

DRAWN = 600  # images by the base model, where no set was named
MOST = 6000  # that train: more would only take longer to encode


@dataclass(frozen=True)
class StandIn:
    """Public images, split into those that train and those that judge.

    Attributes:
        model: the public base. data: how the images are read. folder: where they are encoded.
    """

    model: ModelArguments
    data: DataArguments
    trained_on: PrivateSet
    judged_on: PrivateSet
    folder: Path


def load_stand_in(
    model: ModelArguments,
    data: DataArguments,
    args: RehearsalArguments,
    output_dir: Path,
    prompts: list[str] | None,
    num_units: int,
) -> StandIn:
    """The images that `--stand_in` names; or drawn by the base model from public prompts.

    Args:
        data: of the private images, whose image size and caption template hold here too.
        num_units: N; no more images than that train.

    Raises:
        UsageError: there are no prompts, too few images, or see `load_rows`, `read_captions`.
    """
    name = args.stand_in
    refuse_as_public("--stand_in", name)
    if name is None:
        name = str(draw_stand_in(model, prompts, output_dir / "stand_in"))
    asked = replace(
        data,
        dataset_name=name,
        dataset_config_name=None,
        train_data_dir=None,
        split=args.stand_in_split,
        max_train_samples=None,
        privacy_unit_column=None,
        caption_column=args.stand_in_caption_column,
        label_column=args.stand_in_label_column,
    )
    rows = load_rows(asked, output_dir / "cache")
    if data.image_column not in rows.column_names:
        column = find_image_column(rows, None, "--stand_in with one column of images")
        asked = replace(asked, image_column=column)
    if asked.caption is None and asked.caption_column is None and asked.label_column is None:
        asked = _find_captions(asked, data, rows.column_names)
    rows, held_out = rows.shuffle(seed=0), args.num_held_out
    if len(rows) < 2 * held_out:
        raise UsageError(
            f"--stand_in {name} has {len(rows)} images, of which --num_held_out {held_out} judge: "
            "give more, or hold out fewer"
        )
    count = min(len(rows) - held_out, num_units, MOST)
    judges = rows.select(range(held_out))
    trained = rows.select(range(held_out, held_out + count))
    sets = [load_private_set(part, asked) for part in (trained, judges)]
    sets = [replace(part, captions=list(part.captions)) for part in sets]  # for other processes
    return StandIn(model, asked, *sets, output_dir / "latents")


def _find_captions(asked: DataArguments, private: DataArguments, columns: list[str]):
    """`asked`, with the caption or the label column that the private images have, or `text`."""
    if private.label_column in columns:
        return replace(asked, label_column=private.label_column)
    for column in (private.caption_column, TEXT):
        if column in columns:
            return replace(asked, caption_column=column)
    raise UsageError(
        f"--stand_in {asked.dataset_name}: give --stand_in_caption_column or "
        f"--stand_in_label_column; the columns are {', '.join(columns)}"
    )


def draw_stand_in(model: ModelArguments, prompts: list[str] | None, folder: Path) -> Path:
    """Images that the base model draws from public prompts, as sample.py does.

    Raises:
        UsageError: there are no prompts.
    """
    if not prompts:
        raise UsageError(
            "give --stand_in, public images like the private ones; or --validation_prompt (or, of "
            "dp-lora, --class_names), public prompts from which the base model draws some"
        )
    sampling = SamplingArguments(prompts=prompts, num_images=DRAWN)
    state, source = PartialState(), find_source(model, sampling)
    generate_folder(
        prepare_generation(model, sampling, source, folder, state), sampling, folder, state
    )
    return folder


def list_prompts(stand_in: StandIn) -> list[str]:
    """The distinct captions of the images that judge."""
    return sorted(set(stand_in.judged_on.captions))


def read_pixels(private_set: PrivateSet, side: int) -> torch.Tensor:
    """All images of a set: uint8 [rows, 3, side, side]."""
    return torch.cat(list(read_pixel_batches(private_set.images, side, 64)))
