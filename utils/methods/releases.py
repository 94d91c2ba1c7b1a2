"""What can be released of private images: what is summed in a round, and what is drawn after."""

from collections.abc import Iterable, Iterator
from typing import Protocol

import torch

from utils.arguments.means import CENTRAL, MOMENTS, MeansArguments
from utils.methods.central_images import central_features, draw_central
from utils.methods.mean_features import build_features, sum_features
from utils.methods.mean_generator import draw, fit_generator, read_target
from utils.methods.mixtures import Mixture, choose_places, fit_mixture
from utils.methods.moments import (
    Places,
    build_basis,
    count_components,
    start_places,
    sum_moments,
)

TOGETHER = 500  # images drawn at a time

Rows = Iterable[tuple[int, int, torch.Tensor]]  # (unit, class, image [3, 32, 32] in [-1, 1])
Drawn = Iterator[tuple[torch.Tensor, torch.Tensor]]  # numbers [n], images uint8 [n, 3, 32, 32]


class Release(Protocol):
    """One kind of release.

    `sum` is all that sees private images: the sum over units, fp64 [classes, D], which one unit
    moves by at most `bound` (l2). `draw` sees what was released: fp32 [rounds, classes, D].
    """

    def sum(
        self, rows: Rows, num_classes: int, before: list[torch.Tensor], noise: float, bound: float
    ) -> torch.Tensor:
        """The sum of a round.

        Args:
            before: what the rounds before released, [classes, D] each.
            noise: the deviation of every number in it.
        """

    def draw(self, released: torch.Tensor, noise: float) -> Drawn:
        """Images, in turn of every class."""


class Means:
    """Of features; a generator is fitted to them, or several that take their turns."""

    def __init__(self, args: MeansArguments, seed: int):
        self.args, self.seed = args, seed
        self.features = build_features(args, seed)

    def sum(self, rows, num_classes, before, noise, bound):
        return sum_features(rows, self.features, num_classes, bound)

    def draw(self, released, noise):
        args, num_classes = self.args, released.shape[1]
        indices = torch.arange(args.num_synthetic_images)
        for number in range(args.num_generators):
            title = f"generator {number + 1} of {args.num_generators}"
            own_seed = self.seed + 1000 * number
            target = read_target(released[0])
            generator = fit_generator(target, self.features, args, own_seed, title)
            mine = indices[indices // num_classes % args.num_generators == number]
            for part in mine.split(TOGETHER):
                yield part, draw(generator, part % num_classes, own_seed)


class Central:
    """Means of Poisson batches at a low resolution, which are images."""

    def __init__(self, args: MeansArguments, seed: int):
        self.args, self.seed = args, seed
        self.features = central_features(args)

    def sum(self, rows, num_classes, before, noise, bound):
        return sum_features(rows, self.features, num_classes, bound)

    def draw(self, released, noise):
        args, num_classes = self.args, released.shape[1]
        targets = [read_target(means) for means in released]
        for part in torch.arange(args.num_synthetic_images).split(TOGETHER):
            yield part, draw_central(targets, int(part[0]), part % num_classes, args, self.seed)


class Moments:
    """Second moments about places that the rounds before chose; images are Gaussian."""

    def __init__(self, args: MeansArguments, seed: int):
        self.args, self.seed = args, seed
        self.basis = build_basis(args.moment_side, args.grey)

    def follow(
        self, released: Iterable[torch.Tensor], num_classes: int, noise: float
    ) -> tuple[Places, Mixture | None]:
        """After these rounds: where the next one measures, and what the last one told."""
        components = self.args.moment_components
        if components is None:
            components = count_components(len(self.basis), num_classes, noise)
        places, mixture = start_places(self.basis, num_classes, components), None
        for moments in released:
            mixture = fit_mixture(moments, places, noise)
            places = choose_places(mixture, self.seed)
        return places, mixture

    def sum(self, rows, num_classes, before, noise, bound):
        places, _ = self.follow(before, num_classes, noise)
        return sum_moments(rows, places, bound)

    def draw(self, released, noise):
        num_classes = released.shape[1]
        _, mixture = self.follow(released, num_classes, noise)
        for part in torch.arange(self.args.num_synthetic_images).split(TOGETHER):
            yield part, mixture.draw_images(part % num_classes, self.seed + int(part[0]))


def build_release(args: MeansArguments, seed: int) -> Release:
    """The kind that `--release` names."""
    kinds = {tuple(CENTRAL): Central, tuple(MOMENTS): Moments}
    return kinds.get(tuple(args.release), Means)(args, seed)
