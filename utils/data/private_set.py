"""The private set: the rows whose image can be read, each with its caption and privacy unit."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset

from utils.arguments.training import DataArguments
from utils.data.grey_levels import Window
from utils.data.images import ImageRows, count_bad, find_readable_rows
from utils.data.rows import read_captions
from utils.data.units import number_units
from utils.errors import UsageError, on_main_process


@dataclass(frozen=True)
class PrivateSet:
    """The private rows, and what each of them is.

    Attributes:
        rows: the dataset; its images are in `image_column`.
        captions: [rows]. unit_of_row: [rows], the privacy unit, from 0.
        bad: images that were left out, because they cannot be used, by the reason; private.
        digests: [rows, 32], the SHA-256 of each image's bytes, to detect changes; never published.
        window: see `ImageRows`.
        without_image: how many units have no row here; they have the last numbers.
    """

    rows: Dataset
    image_column: str
    captions: Sequence[str]
    unit_of_row: torch.Tensor
    bad: Mapping[str, Sequence[str]]
    digests: np.ndarray
    window: Window = None
    without_image: int = 0

    @property
    def num_units(self) -> int:
        """N, which is public: of all that are named, so that no image decides whether it counts."""
        return int(self.unit_of_row.max()) + 1 + self.without_image

    @property
    def left_out(self) -> Mapping[str, int]:
        """How many rows were, by the reason."""
        return count_bad(self.bad)

    @property
    def images(self) -> ImageRows:
        return ImageRows(self.rows, self.image_column, self.window)

    @cached_property
    def digest(self) -> str:
        """Of the images, captions and units together, to tell the set from another; private."""
        content = hashlib.sha256(self.digests.tobytes() + self.unit_of_row.numpy().tobytes())
        for caption in self.captions:
            content.update(repr(caption).encode())
        return content.hexdigest()

    def count_repeated(self) -> int:
        """How many pictures, byte for byte, are in several privacy units, each of which is
        protected by itself."""
        _, picture = np.unique(self.digests, axis=0, return_inverse=True)
        pairs = np.unique(np.stack([picture.ravel(), self.unit_of_row.numpy()]), axis=1)
        return int((np.bincount(pairs[0]) > 1).sum())


def load_private_set(rows: Dataset, data: DataArguments) -> PrivateSet:
    """The readable rows, with the caption and the privacy unit of each.

    Raises:
        UsageError: see `find_readable_rows`, `read_captions` and `number_units`; or the processes
            read different data.
    """
    images = ImageRows(rows, data.image_column, data.window)
    good, digests, bad = on_main_process(lambda: find_readable_rows(images, data.strict_images))
    named = units = number_units(rows, data.privacy_unit_column)
    if bad:
        rows = rows.select(good)
        units = number_units(rows, data.privacy_unit_column)
    captions = read_captions(rows, data)
    without = int(named.max() - units.max())
    found = PrivateSet(rows, data.image_column, captions, units, bad, digests, data.window, without)
    if len(set(gather_object([found.digest]))) > 1:
        raise UsageError("the processes read different data: give all of them the same")
    return found
