"""The images of rows: find the readable ones, read them as batches of pixels, tile them.

Nothing here holds more than a few rows' images at a time.
"""

import hashlib
import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage
from PIL import ImageOps
from tqdm import tqdm

from utils.data.rows import require_column
from utils.errors import UsageError

LARGEST_IMAGE = 178_956_970  # pixels; more is taken for a decompression bomb
PERCENT = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"  # not how many rows there are

CHANGED = (
    "the images changed after they were checked, or the processes see different ones: leave them "
    "as they are while a run reads them, and give every process the same"
)

# Pillow's warnings say what is in a private image; its limit of pixels is replaced by ours, which
# is checked before anything is decoded. For the whole process: `catch_warnings` is not thread-safe.
warnings.filterwarnings("ignore", module=r"PIL\.")
PILImage.MAX_IMAGE_PIXELS = None


def keep_readable(rows: Dataset, image_column: str, strict: bool = False) -> tuple[Dataset, int]:
    """The rows whose image can be decoded (`find_readable_rows`), and how many others were left
    out."""
    good, _ = find_readable_rows(rows, image_column, strict)
    dropped = len(rows) - len(good)
    return (rows.select(good) if dropped else rows), dropped


def find_readable_rows(
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
        for start, checked in _map_rows(rows, image_column, 256, _check):
            for index, digest in enumerate(checked, start):
                if digest is not None:
                    good.append(index)
                    digests.append(digest)
                elif strict:
                    raise UsageError(f"the image of row {index} cannot be read (--strict_images)")
            bar.update(len(checked))
    if not good:
        raise UsageError(f"none of the {len(rows)} images can be read")
    return good, np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)


def _check(raw: dict | None) -> bytes | None:
    """A digest of the bytes of an image that can be decoded; None if it cannot."""
    try:
        content = _read_bytes(raw)
        open_image(content).convert("RGB")
        return hashlib.sha256(content).digest()
    except Exception:  # Pillow's decoders raise many kinds of errors on damaged files
        return None


def _read_bytes(raw: dict) -> bytes:
    return raw["bytes"] or Path(raw["path"]).read_bytes()


def _map_rows(
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


def crop_to_pixels(image: PILImage.Image, resolution: int) -> torch.Tensor:
    """Resize the short side to `resolution`, crop the centre: uint8 [3, R, R]."""
    image = image.convert("RGB")
    image = ImageOps.fit(image, (resolution, resolution), PILImage.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def scale_to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 [0, 255] -> float [-1, 1], the input of autoencoders."""
    return pixels.float() / 127.5 - 1.0


def read_pixel_batches(
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
            content = _read_bytes(raw)
            image = open_image(content, 2 * resolution)
            return crop_to_pixels(image, resolution), hashlib.sha256(content).digest()
        except Exception:  # as in `_check`; the error may name a private file
            return None

    for start, batch in _map_rows(rows, image_column, batch_size, pixels):
        for row, read in enumerate(batch, start):
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
