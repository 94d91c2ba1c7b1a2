"""Features of images whose means are released, and their sums over private units."""

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F

from utils.arguments.means import MeansArguments
from utils.evaluation.features import IMAGENET, load_efficientnet, normalise_pixels
from utils.privacy.unit_sums import sum_units

SIDE = 32  # pixels of the images that features are of
BLOCKS = 8  # of EfficientNet-Lite0
COUNT = 0.3  # what a unit adds to the count of its class, where its features have norm 0.954

Features = Callable[[torch.Tensor], torch.Tensor]  # [n, 3, 32, 32] in [-1, 1] -> [n, D], norm <= 1


def build_features(args: MeansArguments, seed: int) -> Features:
    """The features of `--release`; of several kinds side by side, together of norm at most one."""
    builders = {
        "random_features": lambda: random_features(args, seed),
        "perceptual_features": perceptual_features,
    }
    kinds = [builders[kind]() for kind in args.release]
    return lambda images: torch.cat([f(images) for f in kinds], 1) / len(kinds) ** 0.5


def random_features(args: MeansArguments, seed: int) -> Features:
    """(cos, sin)(w . x) / sqrt(frequencies), w normal over the length scale: their inner products
    are those of a Gaussian kernel (Rahimi and Recht 2007). Harder et al. 2021 (DP-MERF)."""
    generator = torch.Generator().manual_seed(seed)
    channels = 1 if args.grey else 3
    shape = (channels * SIDE * SIDE, args.num_frequencies)
    # Over sqrt(3) in colour: so that grey images are as far apart as they are in one channel.
    frequencies = torch.randn(shape, generator=generator) / (args.length_scale * channels**0.5)

    def features(images: torch.Tensor) -> torch.Tensor:
        seen = images.mean(1) if args.grey else images
        phases = seen.flatten(1) @ frequencies
        return torch.cat([phases.cos(), phases.sin()], 1) / args.num_frequencies**0.5

    return features


def perceptual_features() -> Features:
    """The activations after the stem and the first blocks, and their squares, each layer scaled to
    norm one, all together to norm one. Harder et al. 2023 (DP-MEPF): first and second moments."""
    model, _ = load_efficientnet()

    def features(images: torch.Tensor) -> torch.Tensor:
        x = normalise_pixels((images + 1) * 127.5, *IMAGENET)
        x = model._swish(model._bn0(model._conv_stem(x)))
        layers = [x]
        for block in model._blocks[:BLOCKS]:
            x = block(x, drop_connect_rate=None)
            layers.append(x)
        moments = [moment.flatten(1) for layer in layers for moment in (layer, layer.square())]
        return torch.cat([F.normalize(m, dim=1) for m in moments], 1) / len(moments) ** 0.5

    return features


def add_count(features: torch.Tensor, num_classes: int) -> torch.Tensor:
    """[n, D] -> [n, D + 1]: with a last number, the same for all, whose mean over a class is the
    share of that class; the norm is still at most one. One class needs none: zero."""
    share = COUNT if num_classes > 1 else 0.0
    counted = features * (1 - share**2) ** 0.5
    return torch.cat([counted, torch.full_like(counted[:, :1], share)], 1)


def sum_features(
    rows: Iterable[tuple[int, int, torch.Tensor]],
    features: Features,
    num_classes: int,
    bound: float,
) -> torch.Tensor:
    """The sum over units of the mean over a unit's rows of features x one-hot class: fp64
    [classes, D + 1] (`sum_units`).

    An image is passed through the features alone: the presence of others changes nothing about its
    features.

    Args:
        rows: (unit, class, image [3, R, R] in [-1, 1]); the rows of a unit follow one another.
    """
    with torch.no_grad():
        blank = add_count(features(torch.zeros(1, 3, SIDE, SIDE)), num_classes)
        total = torch.zeros(num_classes, blank.shape[1], dtype=torch.float64)
        parts = (
            (unit, {number: add_count(features(image[None]), num_classes)[0]})
            for unit, number, image in rows
        )
        return sum_units(parts, total, bound)
