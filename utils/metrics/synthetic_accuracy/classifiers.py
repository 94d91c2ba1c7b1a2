"""Downstream classifiers: trained on synthetic images, tested on real ones.

Nothing of this project is imported: the metric module synthetic_accuracy, which must load anywhere,
carries this file along.
"""

from copy import deepcopy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

BATCH = 128
ROUNDS = 10  # how often a training run is validated


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained.

    Attributes:
        network: one of `CLASSIFIERS`.
        steps: optimizer steps, of 128 images each.
    """

    network: str
    num_classes: int
    steps: int
    seed: int


def build_cnn(num_classes: int, stages: tuple[int, ...] = (16, 32, 64)) -> nn.Sequential:
    """Stages of two convolutions each; three of them have 75,000 weights, for two CPU cores."""
    layers, width = [], 3
    for channels in stages:
        layers += [
            nn.Conv2d(width, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
        ]
        width = channels
    return _with_head(layers, nn.AdaptiveAvgPool2d(2), 4 * width, num_classes, 0.3)


def build_wide_cnn(num_classes: int) -> nn.Sequential:
    """Four stages, twice as wide: 1.2 million weights and 1,024 features."""
    return build_cnn(num_classes, (32, 64, 128, 256))


class Residual(nn.Module):
    """x + branch(x), through a 1 x 1 convolution where the shapes differ."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None = None):
        super().__init__()
        self.branch, self.shortcut = branch, shortcut or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x) + self.branch(x)


def build_resnet9(num_classes: int) -> nn.Sequential:
    """ResNet-9, as in the DAWNBench entries for CIFAR-10: 6.6 million weights."""

    def block(width: int, channels: int, *pool: nn.Module) -> nn.Sequential:
        convolution = nn.Conv2d(width, channels, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU(), *pool)

    def residual(channels: int) -> Residual:
        return Residual(nn.Sequential(block(channels, channels), block(channels, channels)))

    layers = [block(3, 64), block(64, 128, nn.MaxPool2d(2)), residual(128)]
    layers += [block(128, 256, nn.MaxPool2d(2)), block(256, 512, nn.MaxPool2d(2)), residual(512)]
    return _with_head(layers, nn.AdaptiveMaxPool2d(1), 512, num_classes, 0.0)


def build_wide_resnet(num_classes: int, depth: int = 40, widen: int = 4) -> nn.Sequential:
    """WRN-40-4 (Zagoruyko and Komodakis 2016, table 1): 8.9 million weights."""

    def block(width: int, channels: int, stride: int) -> Residual:
        branch = nn.Sequential(
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, channels, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
        )
        if width == channels:
            return Residual(branch)
        return Residual(branch, nn.Conv2d(width, channels, 1, stride=stride, bias=False))

    layers, width = [nn.Conv2d(3, 16, 3, padding=1, bias=False)], 16
    for stage, channels in enumerate((16 * widen, 32 * widen, 64 * widen)):
        for index in range((depth - 4) // 6):
            layers.append(block(width, channels, 2 if stage > 0 and index == 0 else 1))
            width = channels
    layers += [nn.BatchNorm2d(width), nn.ReLU()]
    return _with_head(layers, nn.AdaptiveAvgPool2d(1), width, num_classes, 0.0)


def _with_head(layers, pool, num_features, num_classes, dropout) -> nn.Sequential:
    """[0] maps images to features [n, d], [1] features to logits."""
    body = nn.Sequential(*layers, pool, nn.Flatten())
    return nn.Sequential(
        body, nn.Sequential(nn.Dropout(dropout), nn.Linear(num_features, num_classes))
    )


CLASSIFIERS = {
    "cnn": build_cnn,
    "wide-cnn": build_wide_cnn,
    "resnet9": build_resnet9,
    "wrn-40-4": build_wide_resnet,
}


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate (10 degrees), scale (10 %) and shift (8 %) each image [n, c, h, w] at random."""
    count = len(images)
    angle, zoom, dx, dy = (2 * torch.rand(4, count, generator=generator) - 1).unbind()
    angle, zoom = 0.175 * angle, 1 + 0.1 * zoom
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([cos, -sin, 0.16 * dx, sin, cos, 0.16 * dy], 1).view(count, 2, 3)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _scale_to_unit_range(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.float() / 127.5 - 1.0


def _autocast(model: nn.Module, device: torch.device) -> torch.autocast:
    """bf16 where the processor computes in it, and the network is large enough to gain."""
    large = sum(parameter.numel() for parameter in model.parameters()) > 1e6
    if device.type == "cpu":
        able = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    else:
        able = device.type == "cuda" and torch.cuda.is_bf16_supported()
    return torch.autocast(device.type, torch.bfloat16, enabled=able and large)


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, recipe: Recipe, device: torch.device
) -> nn.Sequential:
    """Train on images [N, 3, h, w], uint8, with the class of each, [N]; or, where an image has any
    number of labels, with 0 or 1 for each label, [N, labels].

    A tenth of them is held out, and the weights that did best on it are kept: nothing looks at
    other images.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = CLASSIFIERS[recipe.network](recipe.num_classes).to(device)
        model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=recipe.steps)
        generator = torch.Generator().manual_seed(recipe.seed)
        order = torch.randperm(len(images), generator=generator)
        held_out, trained_on = order[: len(order) // 10], order[len(order) // 10 :]
        best, best_score = None, -float("inf")
        for step in tqdm(range(recipe.steps), f"{recipe.network}, seed {recipe.seed}", leave=False):
            rows = trained_on[torch.randint(len(trained_on), (BATCH,), generator=generator)]
            batch = augment(_scale_to_unit_range(images[rows]), generator).to(device)
            with _autocast(model, device):
                logits = model(batch.contiguous(memory_format=torch.channels_last))
            _loss(logits.float(), labels[rows].to(device)).backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if (step + 1) * ROUNDS // recipe.steps > step * ROUNDS // recipe.steps:
                score = 0.0
                if len(held_out):
                    logits = compute_logits(model, images[held_out], device)
                    score = _score(logits, labels[held_out])
                if score >= best_score:
                    best, best_score = deepcopy(model.state_dict()), score
                model.train()
    model.load_state_dict(best)
    return model.eval()


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    if labels.ndim == 2:
        return F.binary_cross_entropy_with_logits(logits, labels.float())
    return F.cross_entropy(logits, labels, label_smoothing=0.05)


def _score(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Of held-out images, higher is better: the accuracy; of several labels, the likelihood."""
    if labels.ndim == 2:
        return -_loss(logits, labels).item()
    return (logits.argmax(1) == labels).double().mean().item()


def predict_classes(model: nn.Module, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The class of each image [N, 3, h, w], uint8, that the model finds likeliest: [N]."""
    return compute_logits(model, images, device).argmax(1)


def score_classes(model: nn.Module, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The log-probability of each class for each image: [N, classes]."""
    return compute_logits(model, images, device).log_softmax(1)


@torch.no_grad()
def compute_logits(model: nn.Module, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What the model makes of images [N, 3, h, w], uint8: [N, classes or labels]."""
    model.eval()
    with _autocast(model, device):
        logits = [model(_scale_to_unit_range(part.to(device))) for part in images.split(512)]
    return torch.cat([part.float().cpu() for part in logits])
