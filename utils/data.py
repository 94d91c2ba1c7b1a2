"""From the rows of a `datasets` dataset to images and captions."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm import tqdm

from utils.errors import UsageError


@dataclass(frozen=True)
class PrivateSet:
    """The private rows, and what each of them is.

    Attributes:
        rows: the dataset; its images are in `image_column`.
        captions: [rows]. unit_of_row: [rows], the privacy unit, 0 ... N - 1.
        skipped: rows left out because their image could not be read.
    """

    rows: Dataset
    image_column: str
    captions: list[str]
    unit_of_row: torch.Tensor
    skipped: int

    @property
    def num_units(self) -> int:
        return int(self.unit_of_row.max()) + 1


def load_rows(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    cache_dir: str | Path | None = None,
) -> Dataset:
    """Load one split, from the Hub, a folder of parquet files, a saved dataset or an image folder.

    Raises:
        UsageError: no source or two were named; the folder or the split is missing.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise UsageError("give exactly one of --dataset_name and --train_data_dir")
    folder = Path(train_data_dir or dataset_name)
    if train_data_dir is not None and not folder.is_dir():
        raise UsageError(f"--train_data_dir {train_data_dir} is not a folder")
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            rows = load_from_disk(str(folder))
            if isinstance(rows, DatasetDict):
                rows = rows[split]
        elif train_data_dir is not None:
            rows = load_dataset(
                "imagefolder", data_dir=str(folder), split=split, cache_dir=_text(cache_dir)
            )
        else:
            rows = load_dataset(
                dataset_name, dataset_config_name, split=split, cache_dir=_text(cache_dir)
            )
    except (FileNotFoundError, ValueError, KeyError) as error:
        raise UsageError(f"cannot read split '{split}' of {folder}: {error}") from error
    if len(rows) == 0:
        raise UsageError(f"{folder} holds no images in split '{split}'")
    return rows


def _text(path: str | Path | None) -> str | None:
    return None if path is None else os.fspath(path)


def require_column(rows: Dataset, column: str, argument: str) -> None:
    """Raises: UsageError, naming the columns there are, if `column` is not one of them."""
    if column not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise UsageError(f"{argument} {column}: there is no such column; the columns are {there}")


def captions_of(
    rows: Dataset, caption_column: str | None, label_column: str | None, template: str
) -> list[str]:
    """One caption a row: from a caption column, or a template filled with the name of its label.

    Raises:
        UsageError: a missing column, or a template without `{label}`.
    """
    if caption_column is not None:
        require_column(rows, caption_column, "--caption_column")
        captions = rows[caption_column]
        return [str(c[0] if isinstance(c, list) else c) for c in captions]
    names = [label.replace("_", " ") for label in labels_of(rows, label_column)]
    if "{label}" not in template:
        raise UsageError(f"--caption_template '{template}' has no {{label}} to fill in")
    return [template.format(label=name) for name in names]


def labels_of(rows: Dataset, label_column: str | None) -> list[str]:
    """The class name of every row (its number, as text, where the dataset names no classes)."""
    if label_column is None:
        raise UsageError("give --caption_column, or --label_column and --caption_template")
    require_column(rows, label_column, "--label_column")
    feature = rows.features[label_column]
    if isinstance(feature, ClassLabel):
        return [feature.int2str(int(label)) for label in rows[label_column]]
    return [str(label) for label in rows[label_column]]


def units_of(rows: Dataset, unit_column: str | None) -> torch.Tensor:
    """The privacy unit that each row belongs to: integers 0 ... N - 1, [rows].

    Rows with the same value in `unit_column` are one unit; without a column, each row is.

    Raises:
        UsageError: the column is missing, or has rows without a value.
    """
    if unit_column is None:
        return torch.arange(len(rows))
    require_column(rows, unit_column, "--privacy_unit_column")
    values = rows[unit_column]
    missing = sum(v is None or v != v or v == "" for v in values)
    if missing:
        raise UsageError(
            f"--privacy_unit_column {unit_column}: {missing} row(s) have no value, so nobody knows "
            "whose they are; fill them in or remove those rows"
        )
    number: dict = {}
    return torch.tensor([number.setdefault(value, len(number)) for value in values])


def keep_readable(rows: Dataset, image_column: str, strict: bool = False) -> tuple[Dataset, int]:
    """The rows whose image can be decoded (`readable_rows`), and how many others there were."""
    good = readable_rows(rows, image_column, strict)
    dropped = len(rows) - len(good)
    return (rows.select(good) if dropped else rows), dropped


def readable_rows(rows: Dataset, image_column: str, strict: bool = False) -> list[int]:
    """The numbers of the rows whose image can be decoded.

    The rule looks at one row alone, so adding or removing a row changes nothing about the others.

    Raises:
        UsageError: the column is missing or holds no images, no image is readable, or, with
            `strict`, any image is unreadable.
    """
    require_column(rows, image_column, "--image_column")
    if not isinstance(rows.features[image_column], Image):
        raise UsageError(f"--image_column {image_column} does not hold images")
    raw = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    good = []
    for index, row in enumerate(tqdm(raw, desc="checking images", leave=False)):
        if _decodes(row[image_column]):
            good.append(index)
        elif strict:
            raise UsageError(f"the image of row {index} cannot be read (--strict_images)")
    if not good:
        raise UsageError(f"none of the {len(rows)} images can be read")
    return good


def _decodes(raw: dict | None) -> bool:
    try:
        _open_raw(raw).load()
        return True
    except Exception:  # Pillow's decoders raise many kinds of errors on damaged files
        return False


def _open_raw(raw: dict) -> PILImage.Image:
    import io

    return PILImage.open(io.BytesIO(raw["bytes"]) if raw.get("bytes") else raw["path"])


def pixels_of(image: PILImage.Image, resolution: int) -> torch.Tensor:
    """Resize the short side to `resolution`, crop the centre: uint8 [3, R, R]."""
    image = ImageOps.exif_transpose(image).convert("RGB")
    image = ImageOps.fit(image, (resolution, resolution), PILImage.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float [-1, 1], what autoencoders are fed."""
    return pixels.float() / 127.5 - 1.0


def pixel_batches(
    rows: Dataset, image_column: str, resolution: int, batch_size: int
) -> Iterator[torch.Tensor]:
    """The images in order, as uint8 batches [<= batch_size, 3, resolution, resolution]."""
    for start in range(0, len(rows), batch_size):
        images = rows[start : start + batch_size][image_column]
        yield torch.stack([pixels_of(image, resolution) for image in images])
