"""Votes of private images for the synthetic ones that look like them, and what is kept by them.

Private Evolution's nearest-neighbour histogram (Lin et al. 2024, algorithm 2), by class.

Shapes: M candidates, features of d numbers.
"""

from collections.abc import Callable, Iterable

import numpy as np
import torch

from utils.privacy.unit_sums import sum_units

Network = Callable[[torch.Tensor], torch.Tensor]  # uint8 [1, 3, R, R] -> [1, d]


def count_votes(
    rows: Iterable[tuple[int, int, torch.Tensor]],
    network: Network,
    features: torch.Tensor,
    classes: torch.Tensor,
    votes: int,
    bound: float,
) -> torch.Tensor:
    """How many units vote for each candidate: fp64 [M]. PRIVATE until noise is added.

    A row votes for the nearest `votes` candidates of its class, one vote each; a unit's votes are
    the mean over its rows, so that their norm is at most sqrt(votes), which is what adding or
    removing it moves the counts by; to be sure, it is bounded by `bound` (`sum_units`). A row whose
    features are not finite votes for nothing. An image is passed through the network alone: the
    presence of others changes nothing about its votes.

    Args:
        rows: (unit, class, pixels uint8 [3, R, R]); the rows of a unit follow one another.
        features: [M, d], of the candidates. classes: [M], theirs.
    """
    of_class = {number: (classes == number).nonzero().flatten() for number in set(classes.tolist())}
    candidates = {number: features[index].double() for number, index in of_class.items()}
    lengths = {number: own.square().sum(1) for number, own in candidates.items()}

    def vote(number: int, pixels: torch.Tensor) -> dict[int, torch.Tensor]:
        seen = network(pixels[None])[0].double().cpu()
        if number not in of_class or not seen.isfinite().all():
            return {}
        # Squared, less |seen|^2, which they share; a row at a time, else the company would round.
        distances = lengths[number] - 2 * (candidates[number] @ seen)
        nearest = distances.topk(min(votes, len(distances)), largest=False).indices
        return {place: torch.ones(()) for place in of_class[number][nearest].tolist()}

    with torch.no_grad():
        ballots = ((unit, vote(number, pixels)) for unit, number, pixels in rows)
        return sum_units(ballots, torch.zeros(len(features), dtype=torch.float64), bound)


def keep_best(votes: np.ndarray, classes: np.ndarray, count: int) -> list[int]:
    """The `count` candidates with the most noisy votes, as many of each class as there are to be
    had; the classes take turns."""
    places = [
        members[np.argsort(-votes[members], kind="stable")] for members in _split_by_class(classes)
    ]
    longest = max(len(members) for members in places)
    turns = [int(m[turn]) for turn in range(longest) for m in places if turn < len(m)]
    return turns[:count]


def resample(votes: np.ndarray, classes: np.ndarray, count: int, seed: int) -> list[int]:
    """`count` candidates at random in proportion to their noisy votes, those below zero being none;
    as many of each class; one may come several times."""
    places, random = _split_by_class(classes), np.random.default_rng(seed)
    shares = [count // len(places) + (i < count % len(places)) for i in range(len(places))]
    drawn = []
    for members, share in zip(places, shares, strict=True):
        weights = votes[members].clip(0)
        weights = weights / weights.sum() if weights.sum() > 0 else None
        drawn.append(random.choice(members, share, p=weights))
    return [int(d[turn]) for turn in range(max(shares)) for d in drawn if turn < len(d)]


def _split_by_class(classes: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(classes == number) for number in np.unique(classes)]
