"""A small generator, fitted to released means; nothing here has seen a private image."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from utils.arguments.means import MeansArguments
from utils.methods.mean_features import COUNT, Features

NOISE = 64  # numbers that an image starts from


class Generator(nn.Module):
    """(noise [n, 64], classes [n]) -> images [n, 3, 32, 32] in [-1, 1]."""

    def __init__(self, num_classes: int, channels: int):
        super().__init__()
        self.num_classes = num_classes

        def up(width: int, channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )

        self.start = nn.Sequential(nn.Linear(NOISE + num_classes, 128 * 16), nn.ReLU())
        self.grow = nn.Sequential(up(128, 96), up(96, 64), up(64, 32))
        self.colour = nn.Conv2d(32, channels, 3, padding=1)

    def forward(self, noise: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        named = torch.cat([noise, F.one_hot(classes, self.num_classes).float()], 1)
        image = self.colour(self.grow(self.start(named).view(-1, 128, 4, 4))).tanh()
        return image.expand(-1, 3, -1, -1)  # grey is one channel


@dataclass(frozen=True)
class Target:
    """What a generator must match.

    Attributes:
        means: [classes, D], the noisy mean over all units of features x one-hot class.
        shares: [classes], the noisy share of each class.
    """

    means: torch.Tensor
    shares: torch.Tensor


def read_target(released: torch.Tensor) -> Target:
    """From what was released, [classes, D + 1] (`mean_features.add_count`)."""
    count = len(released)
    if count == 1:
        return Target(released[:, :-1], torch.ones(1))
    shares = (released[:, -1] / COUNT).clamp_min(0.1 / count)
    return Target(released[:, :-1] / (1 - COUNT**2) ** 0.5, shares / shares.sum())


def fit_generator(
    target: Target, features: Features, args: MeansArguments, seed: int, name: str
) -> Generator:
    """Match the mean of each class, by the squared distance (maximum mean discrepancy)."""
    torch.manual_seed(seed)
    count, size = len(target.means), args.generator_batch
    generator = Generator(count, 1 if args.grey else 3)
    optimizer = torch.optim.Adam(generator.parameters(), args.generator_learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.generator_steps)
    classes = torch.arange(max(size, count)) % count
    weights = F.one_hot(classes, count).float()
    weights = (weights / weights.sum(0) * target.shares).T  # [classes, n]
    bar = tqdm(range(args.generator_steps), name)
    for step in bar:
        drawn = features(generator(torch.randn(len(classes), NOISE), classes))
        loss = (weights @ drawn - target.means).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.5f}")  # of noisy means: it is public
    return generator.eval()


@torch.no_grad()
def draw(generator: Generator, classes: torch.Tensor, seed: int) -> torch.Tensor:
    """Images, uint8 [n, 3, 32, 32]."""
    noise = torch.randn(len(classes), NOISE, generator=torch.Generator().manual_seed(seed))
    return generator(noise, classes).add(1).mul(127.5).round().byte()
