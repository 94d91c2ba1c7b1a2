"""Whether synthetic images give private ones away: nearest neighbours, and copies.

Everything here reads private images. Its numbers are not covered by any epsilon, and its pictures
belong under `private/`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from utils.files import make_private, private_folder, write_durably
from utils.metrics.nearest_neighbor_ratio.nearest_neighbor_ratio import (
    compute_ratio,
    find_nearest,
    measure_both_distances,
)

NEIGHBOURS = 50
COPY = (
    "closeness is the distance to the nearest image over the mean distance to the nearest "
    f"{NEIGHBOURS}; a synthetic image counts as a copy if its closeness to the private images is "
    "below half of its closeness to the held-out images, and below half of the fifth smallest "
    "closeness of any synthetic image to the held-out images"
)


@dataclass(frozen=True)
class Neighbours:
    """What one space, pixels or features, says.

    Attributes:
        space: pixels or features.
        to_private, to_others: distance of each synthetic image to its nearest private and nearest
            held-out image, among as many of each, [N].
        closeness: distance to the nearest of all private images over the mean distance to the
            nearest fifty of them, [N]. nearest: the number of that image, [N].
        control: closeness to the held-out images instead, [N].
    """

    space: str
    to_private: np.ndarray
    to_others: np.ndarray
    closeness: np.ndarray
    nearest: np.ndarray
    control: np.ndarray

    @property
    def threshold(self) -> float:
        """Half of the fifth smallest closeness of a synthetic image to an image that nothing was
        trained on.

        Closeness is that of Carlini et al. 2023, section 4.2, who flag what is below 1/2. Real sets
        can hold near-duplicates, so the limit comes from the held-out images; it is the fifth
        smallest, so that a few blank images do not lower it. A generator that copies nothing is as
        close to private images as to held-out ones: in m dimensions, one of its images is below
        the limit with a probability of about 5 x 2^-m.
        """
        fifth = min(4, len(self.control) - 1)
        return float(np.partition(self.control, fifth)[fifth]) / 2

    def copies(self) -> np.ndarray:
        """The numbers of the synthetic images that are taken for copies of a private one; what is
        as near to a held-out image, a blank one say, is not."""
        return np.flatnonzero(self.closeness < np.minimum(self.threshold, self.control / 2))


def compare(
    space: str, synthetic: np.ndarray, private: np.ndarray, held_out: np.ndarray
) -> Neighbours:
    """Nearest neighbours of synthetic rows [N, d] among private [M, d] and held-out [H, d] ones."""
    closeness, numbers = measure_closeness(synthetic, private)
    control, _ = measure_closeness(synthetic, held_out)
    both = measure_both_distances(synthetic, private, held_out)
    return Neighbours(space, *both, closeness, numbers, control)


def compare_spaces(
    pixels: dict[str, torch.Tensor], features: dict[str, np.ndarray]
) -> list[Neighbours]:
    """Compare in both spaces; each argument has the sets synthetic, private and real (held out):
    pixels uint8 [N, 3, R, R], features [N, d]."""
    flat = {name: (images.flatten(1) / 255).numpy() for name, images in pixels.items()}
    return [
        compare(space, rows["synthetic"], rows["private"], rows["real"])
        for space, rows in (("pixels", flat), ("features", features))
    ]


def measure_closeness(synthetic: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest row over the mean distance to the nearest fifty (or as many as there
    are), and the number of the nearest: [N] twice."""
    distances, numbers = find_nearest(synthetic, real, min(NEIGHBOURS, len(real)))
    mean = np.maximum(distances.mean(1), np.finfo(np.float32).tiny)
    return distances[:, 0] / mean, numbers[:, 0]


def summarise_neighbours(spaces: list[Neighbours]) -> dict[str, dict]:
    """The metrics by name, with what they were computed from."""
    entries = {}
    for found in spaces:
        summary = compute_ratio(found.to_private, found.to_others)
        entries[f"nearest_neighbor_ratio_{found.space}"] = {
            "value": summary.pop("nearest_neighbor_ratio"),
            "std": None,
            "covered_by_epsilon": False,
            **summary,
            "num_synthetic": len(found.closeness),
        }
    flagged = set().union(*(found.copies().tolist() for found in spaces))
    entries["copies"] = {
        "value": len(flagged),
        "std": None,
        "covered_by_epsilon": False,
        "criterion": COPY,
        "by_space": {found.space: len(found.copies()) for found in spaces},
        "threshold": {found.space: found.threshold for found in spaces},
    }
    return entries


def save_pairs(spaces: list[Neighbours], pixels: dict[str, torch.Tensor], folder: Path) -> None:
    """Write what shows private images into `folder`/private, mode 0700: the closest pairs as a
    picture a space, and which rows are taken for copies of which."""
    private = make_private(private_folder(folder))
    copies = {}
    for found in spaces:
        sheet = tile_closest_pairs(found, pixels["synthetic"], pixels["private"])
        sheet.save(private / f"closest_{found.space}.png")
        copies[found.space] = [
            {
                "synthetic_row": int(row),
                "private_row": int(found.nearest[row]),
                "closeness": float(found.closeness[row]),
            }
            for row in found.copies()
        ]
    write_durably(private / "copies.json", json.dumps(copies, indent=2) + "\n")


def tile_closest_pairs(found: Neighbours, synthetic, private, count: int = 20) -> Image.Image:
    """The pairs that look most like copies, synthetic above private, each with its closeness."""
    order = np.argsort(found.closeness)[:count]
    side, margin = 64, 14
    sheet = Image.new("RGB", (side * len(order), 2 * side + margin), "white")
    pen = ImageDraw.Draw(sheet)
    for column, index in enumerate(order):
        pen.text((column * side + 4, 1), f"{found.closeness[index]:.2f}", fill="black")
        for row, pixels in enumerate((synthetic[index], private[found.nearest[index]])):
            tile = Image.fromarray(np.asarray(pixels).transpose(1, 2, 0))
            sheet.paste(tile.resize((side, side)), (column * side, margin + row * side))
    return sheet
