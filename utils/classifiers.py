"""The small downstream classifier: trained on synthetic images, tested on real ones."""

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm


def build_cnn(num_classes: int) -> nn.Sequential:
    """Three stages of two convolutions each, on RGB images of any resolution from 8 pixels."""
    layers, width = [], 3
    for channels in (16, 32, 64):
        layers += [
            nn.Conv2d(width, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
        ]
        width = channels
    head = [
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(4 * width, num_classes),
    ]
    return nn.Sequential(*layers, *head)


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rotate (10 degrees), scale (10 %) and shift (8 %) each image [n, c, h, w] at random."""
    count = len(images)
    angle, zoom, dx, dy = (2 * torch.rand(4, count, generator=generator) - 1).unbind()
    angle, zoom = 0.175 * angle, 1 + 0.1 * zoom
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([cos, -sin, 0.16 * dx, sin, cos, 0.16 * dy], 1).view(count, 2, 3)
    grid = F.affine_grid(theta.to(images), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def train_classifier(
    images: torch.Tensor, labels: torch.Tensor, num_classes: int, steps: int, seed: int, device
) -> nn.Module:
    """Train on images [N, 3, h, w] in [-1, 1]; nothing is tuned or stopped on held-out data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build_cnn(num_classes).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in tqdm(range(steps), f"classifier, seed {seed}", leave=False):
            rows = torch.randint(len(images), (128,), generator=generator)
            batch = augment(images[rows], generator).to(device)
            loss = F.cross_entropy(model(batch), labels[rows].to(device), label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, device) -> float:
    """Share of images [N, 3, h, w] that get their own label."""
    predicted = [model(part.to(device)).argmax(1).cpu() for part in images.split(512)]
    return (torch.cat(predicted) == labels).double().mean().item()
