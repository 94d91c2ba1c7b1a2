"""Which public class, or prompt, each private row counts towards; and the rows, unit by unit."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import ClassLabel, Dataset
from diffusers import DiffusionPipeline
from tqdm import tqdm

from utils.arguments.training import DataArguments, ModelArguments
from utils.data.images import PERCENT, read_pixel_batches
from utils.data.private_set import PrivateSet
from utils.data.rows import fill_template, read_captions, read_labels
from utils.errors import UsageError
from utils.ledger.bases import read_base_statement
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline
from utils.models.text import quiet

SHOWN = 20  # names of classes


@dataclass(frozen=True)
class Classes:
    """The public classes of a release.

    Attributes:
        names: of the classes; none where rows have no labels.
        prompts: one a class; or those that captions are compared with; or the only one.
    """

    names: list[str]
    prompts: list[str]

    @property
    def count(self) -> int:
        return len(self.prompts)

    def describe(self) -> str:
        """What of them is published, in a sentence: a class may be there for one image alone."""
        if not self.names:
            return f"prompts, which are published: {self.count}"
        shown = [*self.names[:SHOWN], *(["..."] if self.count > SHOWN else [])]
        return (
            f"{self.count} classes, whose names are published: {', '.join(shown)} (--class_names "
            "says which there may be)"
        )


def find_classes(
    rows: Dataset,
    data: DataArguments,
    class_names: list[str] | None,
    class_prompts: list[str] | None = None,
) -> Classes:
    """The public classes, and the prompt of each.

    Raises:
        UsageError: the label column does not name its classes, and nobody else does; or not all; or
            its classes are the privacy units; or prompts were given where there are labels.
    """
    if data.label_column is None or data.caption is not None:
        if class_names is not None:
            raise UsageError("--class_names needs --label_column, whose classes they are")
        return Classes([], class_prompts or [data.caption or ""])
    if class_prompts is not None:
        raise UsageError("--class_prompts are for captions; --label_column has classes already")
    if class_names is None and data.label_column == data.privacy_unit_column:
        raise UsageError(
            f"--label_column {data.label_column} is --privacy_unit_column, too, so the names of "
            "its classes, which are published, would be those of whom to protect: give another "
            "column, --caption, or --class_names, all there may be"
        )
    labels = read_labels(rows, data.label_column)
    names, feature = class_names, rows.features[data.label_column]
    if names is None and isinstance(feature, ClassLabel):
        names = feature.names
    if names is None:
        raise UsageError(
            f"--label_column {data.label_column} does not name its classes: give --class_names, "
            "all there may be; the list is public"
        )
    if class_names is not None and not set(labels) <= set(names):
        raise UsageError("a row has a class that --class_names does not name: add it")
    return Classes(names, [fill_template(data.template, name) for name in names])


# A caption -> the number of the prompt that it is nearest to.
Nearest = Callable[[str], int]


def build_nearest(model: ModelArguments, prompts: list[str]) -> Nearest:
    """Compare captions with public prompts by the public model's text encoder.

    Raises:
        UsageError: no model was named, or a private result; see `load_pipeline`.
    """
    name = model.pretrained_model_name_or_path
    if name is None:
        raise UsageError(
            "to compare captions with prompts needs --pretrained_model_name_or_path, whose text "
            "encoder does it"
        )
    if read_base_statement(name, model.revision)[0] is not None:
        raise UsageError(
            f"--pretrained_model_name_or_path {name} is a private result itself: name a public "
            "model to compare captions with prompts"
        )
    pipeline = load_pipeline(*model.source)
    if not find_family(pipeline).encoders:
        raise UsageError(
            f"{name} has no text encoder to compare captions with prompts: give --label_column and "
            "--class_names"
        )
    of_prompts = torch.cat([embed_text(pipeline, prompt) for prompt in prompts])
    known: dict[str, int] = {}

    def find(caption: str) -> int:
        if caption not in known:
            known[caption] = int((of_prompts @ embed_text(pipeline, caption)[0]).argmax())
        return known[caption]

    return find


@torch.no_grad()
def embed_text(pipeline: DiffusionPipeline, text: str) -> torch.Tensor:
    """What the text encoder makes of a text alone, of length one: [1, W]."""
    with quiet():
        return F.normalize(find_family(pipeline).summarise(text).float(), dim=1)


def number_rows(
    private_set: PrivateSet, data: DataArguments, classes: Classes, nearest: Nearest | None
) -> Sequence[int]:
    """The class of each row, -1 for none: a function of that row alone. [rows]"""
    if classes.names:
        numbers = {name: number for number, name in enumerate(classes.names)}
        return [
            numbers.get(label, -1) for label in read_labels(private_set.rows, data.label_column)
        ]
    if classes.count > 1:
        return [nearest(caption) for caption in read_captions(private_set.rows, data)]
    return [0] * len(private_set.rows)


def read_units(
    private_set: PrivateSet,
    numbers: Sequence[int],
    side: int,
    accelerator: Accelerator,
    batch: torch.Tensor | None = None,
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """(unit, class, pixels uint8 [3, side, side]) of this process's share of the units, one unit
    after the other.

    Args:
        numbers: the class of each row.
        batch: the units that were sampled; default: all.
    """
    units = private_set.unit_of_row
    is_mine = units % accelerator.num_processes == accelerator.process_index
    if batch is not None:
        is_mine &= torch.isin(units, batch)
    mine = is_mine.nonzero().flatten()
    order = mine[units[mine].argsort(stable=True)].tolist()
    if not order:
        return
    images, row = private_set.images.select(order), iter(order)
    bar = tqdm(
        total=len(order),
        desc="private images",
        bar_format=PERCENT,
        disable=batch is not None or not accelerator.is_main_process,  # its size is private
    )
    for pixels in read_pixel_batches(images, side, 256, private_set.digests[order]):
        for image in pixels:
            place = next(row)
            yield int(units[place]), numbers[place], image
        bar.update(len(pixels))
    bar.close()
