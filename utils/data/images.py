"""The images of rows: find the readable ones, read them as batches of pixels, tile them.

Nothing here holds more than a few rows' images at a time.
"""

import errno
import hashlib
import io
import math
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm import tqdm

from utils.chatter import hush_pillow
from utils.data.grey_levels import MORE_BITS, GreyLevels, MoreBitsError, Window
from utils.data.image_column import check_image_column
from utils.data.rows import load_split
from utils.errors import UsageError
from utils.listing import list_image_formats

LARGEST_IMAGE = 178_956_970  # pixels; more is taken for a decompression bomb
PERCENT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # not how many rows there are
CHANGED = (
    "the images changed after they were checked, or the processes see different ones: leave them "
    "as they are while a run reads them, and give every process the same"
)
UNREADABLE = "unreadable"
LISTED = 5  # images that cannot be used, in an error
NO_FILE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP)

hush_pillow()
PILImage.MAX_IMAGE_PIXELS = None  # replaced by ours, which is checked before anything is decoded


@dataclass(frozen=True)
class ImageRows:
    """Rows of a dataset, and how their images are read.

    Attributes:
        rows: the dataset. column: that of the images.
        window: LOW and HIGH, the grey levels that become black and white in a file of more than 8
            bits; None leaves such files out.
    """

    rows: Dataset
    column: str = "image"
    window: Window = None

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, numbers) -> "ImageRows":
        """Those rows alone."""
        return replace(self, rows=self.rows.select(numbers))

    def undecoded(self) -> Dataset:
        """Their column alone, each as its bytes or its path."""
        return self.rows.select_columns([self.column]).cast_column(self.column, Image(decode=False))


class Checked(NamedTuple):
    """What `find_readable_rows` found.

    Attributes:
        good: the numbers of the rows whose image can be used. digests: of the bytes of each,
            [n, 32].
        bad: by the reason, the others: by the path of the image, or the number of the row.
    """

    good: list[int]
    digests: np.ndarray
    bad: dict[str, list[str]]

    @property
    def left_out(self) -> Counter:
        """How many, by the reason."""
        return count_bad(self.bad)


def keep_readable(images: ImageRows, strict: bool = False) -> tuple[ImageRows, Counter]:
    """The rows whose image can be used (`find_readable_rows`), and how many others were left out,
    by the reason."""
    found = find_readable_rows(images, strict)
    return (images.select(found.good) if found.left_out else images), found.left_out


def read_synthetic(folder: str, argument: str) -> ImageRows:
    """The usable images of a synthetic set in a folder: image files, or parquet shards.

    Args:
        argument: names the folder in an error.

    Raises:
        UsageError: it is not a folder, or holds no images.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"{argument} {folder} is not a folder")
    return keep_readable(ImageRows(load_split(folder, None, None, "train")))[0]


def find_readable_rows(images: ImageRows, strict: bool = False) -> Checked:
    """The rows whose image can be decoded.

    The rule looks at one row alone, so one more changes nothing about the others: what cannot be
    decoded beside others is tried again by itself; if memory or a disk fails, nothing is decided.

    Raises:
        UsageError: the column is missing or holds no images; a disk fails, or forbids; no image
            can be used, or, with `strict`, any cannot. MemoryError: there was too little for one.
    """
    check_image_column(images.rows, images.column)
    good, digests, bad = [], [], defaultdict(list)
    work = partial(_check, window=images.window)
    with tqdm(total=len(images), desc="checking images", bar_format=PERCENT, leave=False) as bar:
        for start, checked in _map_rows(images, 256, work):
            for index, found in enumerate(checked, start):
                if isinstance(found, str):
                    raw = images.undecoded()[index][images.column]
                    found = work(raw, alone=True) if found == UNREADABLE else found
                if isinstance(found, bytes):
                    good.append(index)
                    digests.append(found)
                else:
                    bad[found].append((raw or {}).get("path") or f"row {index}")
            bar.update(len(checked))
    if not good:
        raise UsageError(_explain_why_none(len(images), count_bad(bad)))
    if strict and bad:
        names = [f"{name} ({why})" for why, found in sorted(bad.items()) for name in found]
        more = f", and {len(names) - LISTED} more" if len(names) > LISTED else ""
        raise UsageError(
            f"images that cannot be used (--strict_images): {', '.join(names[:LISTED])}{more}"
        )
    return Checked(good, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32), dict(bad))


def count_bad(bad: Mapping[str, Sequence[str]]) -> Counter:
    """How many images cannot be used, by the reason."""
    return Counter({why: len(names) for why, names in bad.items()})


def _explain_why_none(count: int, left_out: Counter) -> str:
    if not left_out[MORE_BITS]:
        return f"none of the {count} images can be read"
    return (
        f"none of the {count} images can be used: {left_out[MORE_BITS]} are of more than 8 bits; "
        "give --intensity_range LOW HIGH, the grey levels that become black and white: 0 4095 for "
        "12 bits, 0 65535 for 16, or the window that you look at such images with"
    )


def describe_left_out(left_out: Counter) -> str:
    """How many images were left out, and why, in words."""
    parts = [f"{count} {why}" for why, count in sorted(left_out.items())]
    return f"left out: {', '.join(parts)}" if parts else "no image left out"


def _check(raw: dict | None, window: Window, alone: bool = False) -> bytes | str:
    """A digest of the bytes of an image that can be used; or why it cannot. Only what is `alone`
    ends with a `MemoryError`: beside others it may be theirs that is too much."""
    try:
        content = _read_bytes(raw)
    except (TypeError, ValueError):  # there is none, or no such name
        return UNREADABLE
    except OSError as error:
        if error.errno in NO_FILE:  # not a disk that fails
            return UNREADABLE
        raise UsageError(f"the image {raw['path']} cannot be read: {error.strerror}") from error
    try:
        open_image(content, window).convert("RGB")
        return hashlib.sha256(content).digest()
    except MoreBitsError:
        return MORE_BITS
    except Exception as error:  # Pillow's decoders raise many kinds of errors on damaged files
        if alone and isinstance(error, MemoryError):
            raise
        return UNREADABLE


def _read_bytes(raw: dict) -> bytes:
    return raw["bytes"] or Path(raw["path"]).read_bytes()


def _map_rows(
    images: ImageRows, batch_size: int, work: Callable[[dict | None], object]
) -> Iterator[tuple[int, list]]:
    """(first row, `work` of each row's undecoded image) a batch, in order; on several threads."""
    raw, column = images.undecoded(), images.column
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(raw), batch_size):
            yield start, list(pool.map(work, raw[start : start + batch_size][column]))


def open_image(content: bytes, window: Window = None, about: int | None = None) -> PILImage.Image:
    """Decode the first frame of an image file, upright; on white where it is transparent.

    Of a grey file with more than 8 bits (integers, or floats), the levels of `window` become black
    and white; colours of 16 bits keep their upper eight. `about` is a size in pixels that will do
    for the short side: a large JPEG is then decoded at a fraction of its size.

    Raises:
        MoreBitsError: it is a grey of more than 8 bits, and there is no window; or one beside
            transparency, of which Pillow drops the lower bits.
        Exception: of many kinds, if it is damaged; ValueError if it has more than `LARGEST_IMAGE`
            pixels, which are not decoded.
    """
    image = PILImage.open(io.BytesIO(content), formats=list_image_formats())
    if image.width * image.height > LARGEST_IMAGE:
        raise ValueError(f"{image.width} x {image.height} pixels: is it a decompression bomb?")
    if about is not None:
        image.draft("RGB", (about, about))
    levels = GreyLevels(image, content)
    if levels.wide and window is None:
        raise MoreBitsError
    image.load()
    image.getexif()  # which is kept; without its bytes, of which Pillow fails to write some anew
    image.info = {k: v for k, v in image.info.items() if "exif" not in k}
    image = ImageOps.exif_transpose(image)
    if levels.wide:
        image = levels.see_through(window, image)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = PILImage.new("RGBA", image.size, "white")
        image.alpha_composite(layer)
    return image


def crop_to_pixels(image: PILImage.Image, resolution: int) -> torch.Tensor:
    """Resize the short side to `resolution`, crop the centre: uint8 [3, R, R]."""
    image = image.convert("RGB")
    image = ImageOps.fit(image, (resolution, resolution), PILImage.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def scale_to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float [-1, 1], the input of autoencoders."""
    return pixels.float() / 127.5 - 1.0


def read_pixel_batches(
    images: ImageRows, resolution: int, batch_size: int, digests: np.ndarray | None = None
) -> Iterator[torch.Tensor]:
    """The images in order, as uint8 batches [<= batch_size, 3, resolution, resolution].

    Raises:
        UsageError: an image cannot be read any more, or its bytes do not have the digest in
            `digests` [rows, 32].
    """

    def pixels(raw: dict, alone: bool = False) -> tuple[torch.Tensor, bytes] | None:
        try:
            content = _read_bytes(raw)
            image = open_image(content, images.window, 2 * resolution)
            return crop_to_pixels(image, resolution), hashlib.sha256(content).digest()
        except Exception as error:  # as in `_check`; the error may name a private file
            if alone and isinstance(error, MemoryError):
                raise
            return None

    for start, batch in _map_rows(images, batch_size, pixels):
        for row, read in enumerate(batch, start):
            if read is None:
                raw = images.undecoded()[row][images.column]
                read = batch[row - start] = pixels(raw, alone=True)
            if read is None or (digests is not None and digests[row].tobytes() != read[1]):
                raise UsageError(CHANGED)
        yield torch.stack([image for image, _ in batch])


def tile_images(images: list[PILImage.Image], columns: int) -> PILImage.Image:
    """Tile images of one size, row by row."""
    width, height = images[0].size
    grid = PILImage.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid
