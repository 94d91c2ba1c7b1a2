"""From the rows of a `datasets` dataset to images and captions.

Nothing here holds more than a few rows' images or captions at a time.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, load_dataset, load_from_disk
from datasets.exceptions import DatasetGenerationError
from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm import tqdm

from utils.arguments import DataArguments
from utils.errors import UsageError

LARGEST_IMAGE = 178_956_970  # pixels; more is taken for a decompression bomb
PERCENT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # not how many rows there are

CHANGED = (
    "the images changed after they were checked, or the processes see different ones: leave them "
    "as they are while a run reads them, and give every process the same"
)

# Pillow's warnings tell what is in a private image; its limit of pixels is replaced by ours, which
# is checked before anything is decoded. For the whole process: `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
PILImage.MAX_IMAGE_PIXELS = None
READ_AT_ONCE = 1000  # rows of captions


@dataclass(frozen=True)
class PrivateSet:
    """The private rows, and what each of them is.

    Attributes:
        rows: the dataset; its images are in `image_column`.
        captions: [rows]. unit_of_row: [rows], the privacy unit, 0 ... N - 1.
        skipped: rows left out because their image could not be read.
        digests: [rows, 32], the SHA-256 of each image's bytes, to know them again; never published.
    """

    rows: Dataset
    image_column: str
    captions: Sequence[str]
    unit_of_row: torch.Tensor
    skipped: int
    digests: np.ndarray

    @property
    def num_units(self) -> int:
        return int(self.unit_of_row.max()) + 1


def rows_of(data: DataArguments, cache_dir: str | Path | None = None) -> Dataset:
    """The rows that the arguments name (`load_rows`), at most `--max_train_samples` of them."""
    rows = load_rows(
        data.dataset_name, data.dataset_config_name, data.train_data_dir, data.split, cache_dir
    )
    count = data.max_train_samples
    return rows if count is None or count >= len(rows) else rows.select(range(count))


def load_rows(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
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
    cache = None if cache_dir is None else os.fspath(cache_dir)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            rows = load_from_disk(str(folder))
            if isinstance(rows, DatasetDict):
                rows = rows[split]
        elif folder.is_dir() and _holds_images(folder):
            rows = load_dataset("imagefolder", data_dir=str(folder), split=split, cache_dir=cache)
        else:
            name = str(folder) if folder.is_dir() else dataset_name
            hub = {} if folder.is_dir() else {"revision": revision}
            rows = load_dataset(name, dataset_config_name, split=split, cache_dir=cache, **hub)
    except (OSError, ValueError, KeyError, DatasetGenerationError) as error:
        raise UsageError(f"cannot read split '{split}' of {folder}: {error}") from error
    if len(rows) == 0:
        raise UsageError(f"{folder} holds no images in split '{split}'")
    return rows


def _holds_images(folder: Path) -> bool:
    """Whether it is an image folder, rather than one of parquet files (a picture may lie there)."""
    if any(folder.rglob("*.parquet")):
        return False
    return any(path.suffix.lower() in ImageFolder.EXTENSIONS for path in folder.rglob("*"))


def require_column(rows: Dataset, column: str, argument: str) -> None:
    """Raises: UsageError, naming the columns there are, if `column` is not one of them."""
    if column not in rows.column_names:
        there = ", ".join(rows.column_names)
        raise UsageError(f"{argument} {column}: there is no such column; the columns are {there}")


class Column(Sequence):
    """One text a row, read and made when asked for: [rows].

    `text_of` makes the text of one value of `column`.
    """

    def __init__(self, rows: Dataset, column: str, text_of: Callable[[object], str]):
        self.rows, self.column, self.text_of = rows.select_columns([column]), column, text_of

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where):
        values = self.rows[where][self.column]
        return (
            [self.text_of(v) for v in values] if isinstance(where, slice) else self.text_of(values)
        )

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), READ_AT_ONCE):
            yield from self[start : start + READ_AT_ONCE]


def captions_of(
    rows: Dataset, caption_column: str | None, label_column: str | None, template: str
) -> Sequence[str]:
    """One caption a row: from a caption column, or a template filled with the name of its label.

    Of a list of captions the first counts; a row without any has the empty caption.

    Raises:
        UsageError: a missing column, or a template without `{label}`.
    """
    if caption_column is not None:
        require_column(rows, caption_column, "--caption_column")
        return Column(rows, caption_column, _first_caption)
    labels = labels_of(rows, label_column)
    if "{label}" not in template:
        raise UsageError(f"--caption_template '{template}' has no {{label}} to fill in")

    def caption(value) -> str:
        return template.replace("{label}", labels.text_of(value).replace("_", " "))

    return Column(rows, label_column, caption)


def _first_caption(value) -> str:
    if isinstance(value, list):
        value = value[0] if value else None
    return "" if value is None else str(value)


def labels_of(rows: Dataset, label_column: str | None) -> Column:
    """The class name of every row (its number, as text, where the dataset names no classes)."""
    if label_column is None:
        raise UsageError("give --caption_column, or --label_column and --caption_template")
    require_column(rows, label_column, "--label_column")
    feature = rows.features[label_column]

    def name(value) -> str:
        if value is None or value == -1:
            raise UsageError(f"--label_column {label_column}: a row has no label; fill it in")
        return feature.int2str(int(value)) if isinstance(feature, ClassLabel) else str(value)

    return Column(rows, label_column, name)


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
    good, _ = readable_rows(rows, image_column, strict)
    dropped = len(rows) - len(good)
    return (rows.select(good) if dropped else rows), dropped


def readable_rows(
    rows: Dataset, image_column: str, strict: bool = False
) -> tuple[list[int], np.ndarray]:
    """The numbers of the rows whose image can be decoded, and the digests of their bytes [n, 32].

    The rule looks at one row alone, so adding or removing a row changes nothing about the others.

    Raises:
        UsageError: the column is missing or holds no images, no image is readable, or, with
            `strict`, any image is unreadable.
    """
    require_column(rows, image_column, "--image_column")
    if not isinstance(rows.features[image_column], Image):
        raise UsageError(f"--image_column {image_column} does not hold images")
    good, digests = [], []
    with tqdm(total=len(rows), desc="checking images", bar_format=PERCENT, leave=False) as bar:
        for start, checked in _over_rows(rows, image_column, 256, _check):
            for index, own in enumerate(checked, start):
                if own is not None:
                    good.append(index)
                    digests.append(own)
                elif strict:
                    raise UsageError(f"the image of row {index} cannot be read (--strict_images)")
            bar.update(len(checked))
    if not good:
        raise UsageError(f"none of the {len(rows)} images can be read")
    return good, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def _check(raw: dict | None) -> bytes | None:
    """A digest of the bytes of an image that can be decoded; None if it cannot."""
    try:
        content = _bytes_of(raw)
        open_image(content).convert("RGB")
        return hashlib.sha256(content).digest()
    except Exception:  # Pillow's decoders raise many kinds of errors on damaged files
        return None


def _bytes_of(raw: dict) -> bytes:
    return raw["bytes"] or Path(raw["path"]).read_bytes()


def _over_rows(
    rows: Dataset, image_column: str, batch_size: int, work: Callable[[dict | None], object]
) -> Iterator[tuple[int, list]]:
    """(first row, `work` of each row's undecoded image) a batch, in order; on several threads."""
    raw = rows.select_columns([image_column]).cast_column(image_column, Image(decode=False))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(raw), batch_size):
            yield start, list(pool.map(work, raw[start : start + batch_size][image_column]))


def open_image(content: bytes, about: int | None = None) -> PILImage.Image:
    """Decode the first frame of an image file, upright; on white where it is transparent.

    Sixteen-bit greys keep their upper eight bits; a float image whose values are at most 1 is taken
    to reach from 0 to 1, any other from 0 to 255. `about` is a size in pixels that will do for the
    short side: a large JPEG is then decoded at a fraction of its size.

    Raises:
        Exception: of many kinds, if it is damaged; ValueError if it has more than `LARGEST_IMAGE`
            pixels, which are not decoded.
    """
    image = PILImage.open(io.BytesIO(content))
    if image.width * image.height > LARGEST_IMAGE:
        raise ValueError(f"{image.width} x {image.height} pixels: is it a decompression bomb?")
    if about is not None:
        image.draft("RGB", (about, about))
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        wide = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = PILImage.fromarray((wide >> 8).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        values = values * 255 if values.max() <= 1 else values
        image = PILImage.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = PILImage.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
    return image


def pixels_of(image: PILImage.Image, resolution: int) -> torch.Tensor:
    """Resize the short side to `resolution`, crop the centre: uint8 [3, R, R]."""
    image = image.convert("RGB")
    image = ImageOps.fit(image, (resolution, resolution), PILImage.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float [-1, 1], what autoencoders are fed."""
    return pixels.float() / 127.5 - 1.0


def pixel_batches(
    rows: Dataset,
    image_column: str,
    resolution: int,
    batch_size: int,
    digests: np.ndarray | None = None,
) -> Iterator[torch.Tensor]:
    """The images in order, as uint8 batches [<= batch_size, 3, resolution, resolution].

    Raises:
        UsageError: an image cannot be read any more, or its bytes do not have the digest in
            `digests` [rows, 32].
    """

    def pixels(raw: dict) -> tuple[torch.Tensor, bytes] | None:
        try:
            content = _bytes_of(raw)
            image = open_image(content, 2 * resolution)
            return pixels_of(image, resolution), hashlib.sha256(content).digest()
        except Exception:  # as in `_check`; the error may name a private file
            return None

    for start, batch in _over_rows(rows, image_column, batch_size, pixels):
        for row, read in enumerate(batch, start):
            if read is None or (digests is not None and digests[row].tobytes() != read[1]):
                raise UsageError(CHANGED)
        yield torch.stack([image for image, _ in batch])
