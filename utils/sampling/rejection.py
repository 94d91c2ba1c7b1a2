"""Free selection: of more images than were asked for, the most typical of each prompt are left.

What is typical is told by classifiers that were trained on synthetic images alone, so nothing
private is looked at, and no privacy is spent.
"""

import io
import math
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import PartialState
from PIL import Image

from utils.arguments.sampling import SamplingArguments
from utils.data.images import crop_to_pixels, read_pixel_batches, read_synthetic
from utils.data.rows import require_column
from utils.errors import UsageError, on_main_process
from utils.files import SAMPLING_SETTINGS
from utils.metrics.synthetic_accuracy.classifiers import Recipe, score_classes, train_classifier
from utils.sampling.generation import (
    Generation,
    finish_folder,
    generate_folder,
)
from utils.sampling.shards import (
    Piece,
    is_whole,
    plan_image_files,
    plan_pieces,
    read_pieces,
    write_piece,
)

DRAWN = "drawn"  # in the folder of a set, until it is done: all images that were drawn
SIDE = 32  # pixels that the classifiers see
STEPS = 400


def generate_set(
    prepared: Generation, sampling: SamplingArguments, folder: Path, state: PartialState
) -> None:
    """`generate_folder`; with `--reject`, of more images, of which the most typical are left.

    Raises:
        UsageError: there is one prompt only, or `--reject_by` has not the same ones.
    """
    if not sampling.reject:
        generate_folder(prepared, sampling, folder, state)
        return
    prompts, count = prepared.prompts, sampling.num_images
    if len(prompts) < 2:
        raise UsageError("--reject compares prompts: give two or more, or class names")
    pieces = plan_pieces(sampling.output_format, count, prepared.settings.resolution)
    missing = not all(is_whole(folder / piece.name) for piece in pieces)
    state.wait_for_everyone()  # all have looked, before anyone writes
    entries = [prompts[i % len(prompts)] for i in range(count)]
    if missing:
        draw_and_choose(prepared, sampling, entries, pieces, folder, state)

    def finish() -> None:
        shutil.rmtree(folder / DRAWN, ignore_errors=True)  # not before all pieces are there
        finish_folder(folder, pieces, entries, len(prompts))

    on_main_process(finish)


def draw_and_choose(
    prepared: Generation,
    sampling: SamplingArguments,
    entries: list[dict],
    pieces: list[Piece],
    folder: Path,
    state: PartialState,
) -> None:
    """Draw more images than `entries` into the folder `DRAWN` of the set, and write those that stay
    as `pieces`."""
    num_prompts, drawn = len(prepared.prompts), folder / DRAWN
    each = math.ceil(math.ceil(len(entries) / num_prompts) / (1 - sampling.reject))
    more = replace(sampling, num_images=each * num_prompts, output_format="png")
    if state.is_main_process:
        drawn.mkdir(exist_ok=True)
        shutil.copy(folder / SAMPLING_SETTINGS, drawn)
    state.wait_for_everyone()
    generate_folder(prepared, more, drawn, state)

    def choose() -> None:
        pngs = list(read_pieces(drawn, plan_image_files(more.num_images)))
        scores = score_images(pngs, prepared.prompts, sampling, state.device)
        kept = keep_typical(scores, num_prompts, len(entries))
        for piece in pieces:
            write_piece(folder, piece, [pngs[kept[i]] for i in piece.images], entries)

    on_main_process(choose)


def score_images(
    pngs: list[bytes], prompts: list[dict], sampling: SamplingArguments, device: torch.device
) -> torch.Tensor:
    """How typical each image is of its prompt: its log-probability by a classifier that has not
    seen it: [N]. Image i is of prompt i modulo their number."""
    pixels = [crop_to_pixels(Image.open(io.BytesIO(png)), SIDE) for png in pngs]
    pixels, numbers = torch.stack(pixels), torch.arange(len(pngs)) % len(prompts)

    def score(seen: torch.Tensor, labels: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        recipe = Recipe("cnn", len(prompts), STEPS, sampling.seed)
        model = train_classifier(seen, labels, recipe, device)
        scores = score_classes(model, pixels[places], device)
        return scores.gather(1, numbers[places, None])[:, 0]

    everyone = torch.arange(len(pngs))
    if sampling.reject_by is not None:
        return score(*read_labelled(sampling.reject_by, prompts), everyone)
    scores = torch.zeros(len(pngs))  # each half by a classifier of the other
    halves = [everyone[everyone // len(prompts) % 2 == half] for half in (0, 1)]
    for half, other in (halves, halves[::-1]):
        if len(other):
            scores[half] = score(pixels[other], numbers[other], half)
    return scores


def read_labelled(folder: str, prompts: list[dict]) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of another synthetic set, and the number of the prompt of each.

    Raises:
        UsageError: it has no column text, or misses a prompt.
    """
    images = read_synthetic(folder, "--reject_by")
    require_column(images.rows, "text", f"--reject_by {folder}:")
    texts, known = images.rows["text"], [prompt["text"] for prompt in prompts]
    missing = [text for text in known if text not in set(texts)]
    if missing:
        raise UsageError(f"--reject_by {folder} has no image of the prompt '{missing[0]}'")
    places = [i for i, text in enumerate(texts) if text in known]
    pixels = torch.cat(list(read_pixel_batches(images, SIDE, 256)))
    return pixels[places], torch.tensor([known.index(texts[i]) for i in places])


def keep_typical(scores: torch.Tensor, num_prompts: int, count: int) -> list[int]:
    """The places of `count` images, the prompts in turn; of each the most typical, in their order.
    Image i is of prompt i modulo `num_prompts`."""
    kept = []
    for number in range(num_prompts):
        share = len(range(number, count, num_prompts))
        best = scores[number::num_prompts].topk(share).indices.sort().values
        kept.append((number + best * num_prompts).tolist())
    return [kept[i % num_prompts][i // num_prompts] for i in range(count)]
