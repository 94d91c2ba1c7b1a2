"""Sums over privacy units of what their rows contribute, each unit's part bounded by itself."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from operator import itemgetter

import torch

# Of one row: what it adds to which places of the sum; all other places get nothing. A place below
# zero is nowhere: that of a row of no class, which counts among its unit's rows all the same.
Contribution = dict[int, torch.Tensor]


def sum_units(
    rows: Iterable[tuple[int, Contribution]], total: torch.Tensor, bound: float
) -> torch.Tensor:
    """The sum over units of the mean over a unit's rows: fp64, shaped as `total`, which is zero.

    Adding or removing one unit moves it by at most `bound` (l2), up to the rounding of fp64: a
    unit's part is scaled down if it is larger, and is zero if it is not finite.

    Args:
        rows: (unit, contribution); the rows of a unit follow one another. A contribution must
            depend on its own row alone, to the last bit.
    """
    for _, of_unit in groupby(rows, itemgetter(0)):
        part = average(contribution for _, contribution in of_unit)
        norm = sum((numbers.square().sum() for numbers in part.values()), torch.zeros(())).sqrt()
        if norm.isfinite():
            # One part in a million under the bound, so that rounding cannot lift a part above it.
            scale = bound * (1 - 1e-6) / norm.clamp_min(bound * (1 - 1e-6))
            for place, numbers in part.items():
                total[place] += scale * numbers
    return total


def average(contributions: Iterator[Contribution]) -> Contribution:
    """The mean of the contributions of a unit's rows."""
    part, count = {}, 0
    for contribution in contributions:
        for place, numbers in contribution.items():
            if place >= 0:
                part[place] = part.get(place, 0) + numbers.double()
        count += 1
    return {place: numbers / count for place, numbers in part.items()}
