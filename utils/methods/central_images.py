"""Central images: noisy means of Poisson batches at a low resolution, and a set made of them.

Source: Gong et al. 2025 (DP-FETA), which trains on such images first.
"""

import torch
import torch.nn.functional as F

from utils.arguments.means import MeansArguments
from utils.methods.mean_features import SIDE, Features
from utils.methods.mean_generator import Target

SHIFT = 2  # pixels that a drawn image is moved by, at most, each way


def central_features(args: MeansArguments) -> Features:
    """The pixels at `--central_side`, so that the norm of an image in [-1, 1] is at most one."""
    channels, side = 1 if args.grey else 3, args.central_side

    def features(images: torch.Tensor) -> torch.Tensor:
        seen = images.mean(1, keepdim=True) if args.grey else images
        small = F.interpolate(seen, (side, side), mode="area")
        return small.flatten(1) / (channels * side**2) ** 0.5

    return features


def draw_central(
    targets: list[Target], number: int, classes: torch.Tensor, args: MeansArguments, seed: int
) -> torch.Tensor:
    """One image a class number in `classes`, of the batches in turn, from `number` on, enlarged and
    moved a little: uint8 [n, 3, 32, 32]."""
    channels, side = 1 if args.grey else 3, args.central_side
    draws = torch.Generator().manual_seed(seed + number)
    images = []
    for offset, of_class in enumerate(classes.tolist()):
        target = targets[(number + offset) // len(targets[0].means) % len(targets)]
        mean = target.means[of_class] / target.shares[of_class] * (channels * side**2) ** 0.5
        image = F.interpolate(
            mean.view(1, channels, side, side), (SIDE, SIDE), mode="bicubic", antialias=True
        )
        down, right = torch.randint(-SHIFT, SHIFT + 1, (2,), generator=draws).tolist()
        padded = F.pad(image, [SHIFT] * 4, mode="replicate")
        top, left = SHIFT + down, SHIFT + right
        images.append(padded[0, :, top : top + SIDE, left : left + SIDE].expand(3, -1, -1))
    return torch.stack(images).clamp(-1, 1).add(1).mul(127.5).round().byte()
