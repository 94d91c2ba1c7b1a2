"""Second moments of private images, class by class: what one image adds, and where it is measured.

An image is written as its d cosines of low frequency. In the first round it is measured from zero;
in every later one from the nearest of K public places of its class, which the releases before
chose. A count, the mean and the second moments of that are enough to draw Gaussians from (Dwork et
al. 2014, "Analyze Gauss", for the noisy second moments; Su et al. 2016 for the noisy places).
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.fft import dct

from utils.methods.mean_features import COUNT, SIDE
from utils.privacy.unit_sums import sum_units

FIRST = 0.5  # the norm that an image's distance from its place may have in the sum; COUNT its count
SECOND = (1 - COUNT**2 - FIRST**2) ** 0.5  # and its second moments: together, of norm one at most
# How far noise may move the mean at a place, in units of the reach; and places a class, at most.
CLEAR, MOST_COMPONENTS = 0.25, 64


def build_basis(side: int, grey: bool) -> torch.Tensor:
    """Orthonormal rows [d, channels * 32 * 32]: the `side` lowest cosines each way, d = side**2. In
    colour, of brightness; and of two opponent colours at half of that, as JPEG has them."""
    waves = torch.from_numpy(dct(np.eye(SIDE), axis=0, norm="ortho"))

    def plane(count: int) -> torch.Tensor:
        return torch.kron(waves[:count], waves[:count])

    if grey:
        return plane(side).float()
    colours = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
    rows = []
    for colour, count in zip(colours, (side, side // 2, side // 2), strict=True):
        rows.append(torch.kron((colour / colour.norm())[None], plane(count)))
    return torch.cat(rows).float()


@dataclass(frozen=True)
class Places:
    """Where images are measured from: public.

    Attributes:
        basis: [d, channels * 32 * 32].
        centres: [classes, K, d].
        reach: what is further from its centre is drawn in to this distance.
    """

    basis: torch.Tensor
    centres: torch.Tensor
    reach: float

    def measure(self, number: int, image: torch.Tensor) -> torch.Tensor:
        """What an image [3, 32, 32] of a class adds: [K + K * d + d * (d + 1) / 2], of norm one at
        most: the count and the mean at its centre, and its second moments."""
        channels = self.basis.shape[1] // SIDE**2
        seen = image.mean(0) if channels == 1 else image
        away = self.basis @ seen.flatten() - self.centres[number]
        nearest = away.square().sum(1).argmin()
        own = away[nearest] / self.reach
        own = own / own.norm().clamp_min(1)
        counts, firsts = torch.zeros(len(away)), torch.zeros_like(away)
        counts[nearest], firsts[nearest] = COUNT, FIRST * own
        return torch.cat([counts, firsts.flatten(), SECOND * pack(torch.outer(own, own))])


def count_components(size: int, num_classes: int, noise: float) -> int:
    """How many places a class can have, so that noise moves the mean at each, were they equally
    full, by at most a quarter of the reach.

    Args:
        size: d. noise: the deviation of every number of the mean over all units.
    """
    most = CLEAR * FIRST / (noise * size**0.5 * num_classes)
    return int(min(max(most, 1), MOST_COMPONENTS))


def start_places(basis: torch.Tensor, num_classes: int, components: int) -> Places:
    """Of the first round: zero, which is K times the same place; no image in [-1, 1] is further
    from it than the reach."""
    centres = torch.zeros(num_classes, components, len(basis))
    return Places(basis, centres, float(basis.shape[1] ** 0.5))


def pack(matrix: torch.Tensor) -> torch.Tensor:
    """The upper triangle of a symmetric matrix [d, d], so that norms stay as they are."""
    rows, columns = torch.triu_indices(*matrix.shape)
    return matrix[rows, columns] * torch.where(rows == columns, 1.0, 2**0.5)


def unpack(packed: torch.Tensor, size: int) -> torch.Tensor:
    """The symmetric matrix [d, d] that was packed."""
    rows, columns = torch.triu_indices(size, size)
    matrix = packed.new_zeros(size, size)
    matrix[rows, columns] = packed / torch.where(rows == columns, 1.0, 2**0.5)
    return matrix + matrix.triu(1).T


def sum_moments(
    rows: Iterable[tuple[int, int, torch.Tensor]], places: Places, bound: float
) -> torch.Tensor:
    """The sum over units of the mean over a unit's rows of what they add to their class: fp64
    [classes, K + K * d + d * (d + 1) / 2] (`sum_units`).

    Args:
        rows: (unit, class, image [3, 32, 32] in [-1, 1]); the rows of a unit follow one another.
    """
    num_classes, components, size = places.centres.shape
    width = components * (1 + size) + size * (size + 1) // 2
    parts = ((unit, {number: places.measure(number, image)}) for unit, number, image in rows)
    return sum_units(parts, torch.zeros(num_classes, width, dtype=torch.float64), bound)
