"""A private classifier: linear, of the features of a public network, made white.

It is trained on all private images in every step (DP-SGD without sampling), as Tramer and Boneh
(2021) found best at little noise. The images that it is to name are public by then: the features
are made white by their mean and covariance, which costs nothing.

Shapes: M images to name, features of d numbers, made to d + 1.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from utils.data.latents import group_rows_by_unit
from utils.data.private_set import PrivateSet
from utils.evaluation.features import Extractor
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.classes import read_units
from utils.methods.election import extract_pixels
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState, UnitLosses

UNITS = 1024  # a forward pass
MOMENTUM = 0.9
FLOOR = 0.1  # of the mean variance, added to that of every direction: none is blown up to noise
CONSTANT = 0.1  # the last number of every feature vector, whose others have norm one
# How far the weights may go, in units of their final noise; benchmarks/labeller.py tries others.
TRAVEL = 0.5


@dataclass(frozen=True)
class Whitening:
    """Features without mean and correlations, each vector of norm one, and a constant.

    Attributes:
        mean: [d]. matrix: [d, d].
    """

    mean: torch.Tensor
    matrix: torch.Tensor

    def __call__(self, features: torch.Tensor) -> torch.Tensor:
        """[n, d] -> [n, d + 1], each row a function of its own row alone."""
        white = F.normalize((features - self.mean) @ self.matrix, dim=1)
        return torch.cat([white, white.new_full((len(white), 1), CONSTANT)], 1)


def fit_whitening(features: torch.Tensor) -> Whitening:
    """From the features of public images [M, d]: over the root of their covariance, whose every
    eigenvalue is raised by a tenth of their mean."""
    mean = features.double().mean(0)
    centred = features.double() - mean
    values, directions = torch.linalg.eigh(centred.T @ centred / len(features))
    floor = FLOOR * values.mean().clamp_min(torch.finfo(torch.float32).tiny)
    matrix = directions / (values.clamp_min(0) + floor).sqrt()
    return Whitening(mean.float(), matrix.float().contiguous())  # in memory as it will be read back


@dataclass(frozen=True)
class UnitImages:
    """The private images of this process's units, as the classifier sees them. PRIVATE.

    Attributes:
        features: [rows, d + 1], zero where they are not finite. classes: [rows], -1 for none.
        first, count: [units], where the rows of a unit begin, and how many there are; a unit
            without any is one whose image has no class.
    """

    features: torch.Tensor
    classes: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor


def read_images(
    private_set: PrivateSet,
    numbers: list[int],
    extractor: Extractor,
    whiten: Whitening,
    accelerator: Accelerator,
) -> UnitImages:
    """Each image is passed through the network alone: the presence of others changes nothing about
    its features."""
    features, classes, units = [], [], []
    side = extractor.resolution
    for unit, number, pixels in read_units(private_set, numbers, side, accelerator):
        seen = whiten(extract_pixels(extractor, pixels[None], accelerator))[0]
        features.append(seen if seen.isfinite().all() else torch.zeros_like(seen))
        classes.append(number)
        units.append(unit)
    own = torch.tensor(units) // accelerator.num_processes
    _, first, count = group_rows_by_unit(own, private_set.num_units)
    return UnitImages(torch.stack(features), torch.tensor(classes), first, count)


def build_losses(
    head: nn.Linear, images: UnitImages, randomness: SecretRandomness, accelerator: Accelerator
) -> UnitLosses:
    """The cross-entropy of one image of each unit, drawn anew in every step; zero for an image of
    no class."""

    def losses(units: torch.Tensor) -> torch.Tensor:
        own = units.cpu() // accelerator.num_processes
        drawn = (randomness.uniform((len(own),)) * images.count[own]).long()
        rows = images.first[own] + drawn
        classes = images.classes[rows].where(images.count[own] > 0, -1).to(accelerator.device)
        logits = head(images.features[rows].to(accelerator.device))
        return F.cross_entropy(logits, classes, reduction="none", ignore_index=-1)

    return losses


def build_state(head: nn.Linear, plan: PrivacyPlan, travel: float = TRAVEL) -> TrainingState:
    """Momentum and a cosine schedule, from weights of zero; the rate is such that the weights can
    go `travel` times as far as the noise, which does not depend on the number of steps."""
    nn.init.zeros_(head.weight)
    noise = plan.noise_multiplier / plan.num_units / plan.steps**0.5  # of the mean, in one step
    rate = 2 * (1 - MOMENTUM) * travel / (noise * plan.steps)
    optimizer = torch.optim.SGD(head.parameters(), rate, momentum=MOMENTUM)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)
    return TrainingState(PerUnitGradients(head), optimizer, schedule)
