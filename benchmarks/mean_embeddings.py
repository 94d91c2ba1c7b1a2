"""The baselines that release one noisy mean: DP-MERF and DP-MEPF.

    python benchmarks/mean_embeddings.py --dataset_name ylecun/mnist --target_epsilon 10 \\
        --target_delta 1e-5 --features perceptual --output_dir runs/mnist/mepf
    python evaluate.py --synthetic runs/mnist/mepf --test_dataset_name ylecun/mnist

The mean over the private images of features(image) x one-hot(label) is released once, by the
Gaussian mechanism; a generator is then trained, without the private images, until the mean of what
it draws matches. Features have norm one, so that one image moves their sum by at most one.

- random: random Fourier features of the pixels (Harder et al. 2021, DP-MERF).
- perceptual: the activations of a network trained on public images (Harder et al. 2023, DP-MEPF;
  here the first moments, of an EfficientNet-Lite0 at 32 pixels).

Leaves images with their labels as sample.py does, and before them privacy.json. The release is in
no ledger: it is a baseline, not a way to train.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import ClassLabel
from PIL import Image
from torch import nn
from tqdm import tqdm

from utils.arguments.parsing import option, parse
from utils.data.images import (
    ImageRows,
    keep_readable,
    read_pixel_batches,
    scale_to_unit_range,
    tile_images,
)
from utils.data.rows import load_split, read_labels
from utils.errors import UsageError, run_script
from utils.evaluation.features import IMAGENET, load_efficientnet, normalise_pixels
from utils.ledger.statement import Circumstances, build_statement
from utils.privacy.accounting import account
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.plan import PrivacyPlan, make_plan
from utils.privacy.randomness import SecretRandomness

ROOT = Path(__file__).resolve().parent.parent

SIDE, FREQUENCIES, BLOCKS = 32, 5000, 8
Features = Callable[[torch.Tensor], torch.Tensor]  # [n, 3, 32, 32] in [-1, 1] -> [n, D], norm one


@dataclass
class MeanArguments:
    """The images, the features and the generator."""

    dataset_name: str = option("Hub id or folder of parquet files")
    output_dir: str = option("folder of the synthetic images")
    target_epsilon: float = option("budget of the one release")
    target_delta: float = option("delta of the budget, below 1/N")
    split: str = option("split of the private images", "train")
    label_column: str = option("column of the labels", "label")
    features: str = option("which mean is released", "perceptual", choices=["random", "perceptual"])
    length_scale: float = option(
        "of the random features, in the distance between images in [-1, 1]", 20.0
    )
    generator_steps: int = option("optimizer steps of the generator", 1000)
    generator_batch: int = option("images per step", 100)
    learning_rate: float = option("of Adam", 1e-3)
    num_images: int = option("how many to draw, balanced over the classes", 10_000)
    seed: int = option("seed of the features and of the generator; never of the noise", 0)


def random_features(length_scale: float, seed: int) -> Features:
    """sqrt(2 / D) (cos, sin)(w . x), w normal: their inner products are those of a Gaussian kernel
    (Rahimi and Recht 2007)."""
    generator = torch.Generator().manual_seed(seed)
    frequencies = torch.randn(SIDE * SIDE, FREQUENCIES, generator=generator) / length_scale

    def features(images: torch.Tensor) -> torch.Tensor:
        phases = images.mean(1).flatten(1) @ frequencies
        return torch.cat([phases.cos(), phases.sin()], 1) / FREQUENCIES**0.5

    return features


def perceptual_features() -> Features:
    """The activations after the stem and the first blocks, each layer scaled to norm one, together
    scaled to norm one."""
    model, _ = load_efficientnet()

    def features(images: torch.Tensor) -> torch.Tensor:
        x = normalise_pixels((images + 1) * 127.5, *IMAGENET)
        x = model._swish(model._bn0(model._conv_stem(x)))
        layers = [F.normalize(x.flatten(1), dim=1)]
        for block in model._blocks[:BLOCKS]:
            x = block(x, drop_connect_rate=None)
            layers.append(F.normalize(x.flatten(1), dim=1))
        return torch.cat(layers, 1) / len(layers) ** 0.5

    return features


def noisy_mean(
    features: Features,
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    plan: PrivacyPlan,
    randomness: SecretRandomness,
) -> torch.Tensor:
    """The release: [classes, D], the mean of features x one-hot label, with noise.

    One image changes one row of the sum by a vector of norm at most C = 1; one whose features are
    not finite counts as zero.
    """
    total = None
    for start in tqdm(range(0, len(images), 500), "features", leave=False):
        part = slice(start, start + 500)
        with torch.no_grad():
            rows = features(scale_to_unit_range(images[part]))
        rows = torch.where(rows.isfinite().all(1, keepdim=True), rows, 0.0).double()
        rows *= plan.max_grad_norm / rows.norm(dim=1, keepdim=True).clamp_min(1.0)
        if total is None:  # in float64: else one image would also change how all others round
            total = torch.zeros(num_classes, rows.shape[1], dtype=torch.float64)
        total.index_add_(0, labels[part], rows)
    noisy = add_noise_once(total.flatten(), plan, randomness, Accelerator())
    return noisy.view_as(total).float()


class Generator(nn.Module):
    """(noise [n, 64], labels [n]) -> images [n, 3, 32, 32] in [-1, 1]."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes

        def up(width: int, channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Upsample(scale_factor=2),
                nn.Conv2d(width, channels, 3, padding=1),
                nn.BatchNorm2d(channels),
                nn.ReLU(),
            )

        self.start = nn.Sequential(nn.Linear(64 + num_classes, 128 * 16), nn.ReLU())
        self.grow = nn.Sequential(up(128, 96), up(96, 64), up(64, 32))
        self.colour = nn.Conv2d(32, 3, 3, padding=1)

    def forward(self, noise: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        named = torch.cat([noise, F.one_hot(labels, self.num_classes).float()], 1)
        return self.colour(self.grow(self.start(named).view(-1, 128, 4, 4))).tanh()


def train_generator(target: torch.Tensor, features: Features, args: MeanArguments) -> Generator:
    """Match the released mean; nothing private is read."""
    torch.manual_seed(args.seed)
    num_classes = len(target)
    generator = Generator(num_classes)
    optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.generator_steps)
    labels = torch.arange(args.generator_batch) % num_classes
    share = F.one_hot(labels, num_classes).float().T / len(labels)  # [classes, n]
    for _ in tqdm(range(args.generator_steps), "generator"):
        drawn = features(generator(torch.randn(len(labels), 64), labels))
        loss = (share @ drawn - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return generator.eval()


@torch.no_grad()
def save_images(generator: Generator, names: list[str], count: int, folder: Path) -> None:
    """Images and metadata.jsonl, as `datasets` reads them, and grid.png."""
    lines, shown = [], []
    for start in tqdm(range(0, count, 500), "images", leave=False):
        labels = torch.arange(start, min(start + 500, count)) % len(names)
        pixels = generator(torch.randn(len(labels), 64), labels).add(1).mul(127.5).round().byte()
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True), start):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            picture.save(folder / f"{index:06}.png")
            shown += [picture] if index < 80 else []
            lines.append(json.dumps({"file_name": f"{index:06}.png", "label": names[label]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    tile_images(shown, min(10, len(names))).save(folder / "grid.png")


def main():
    (args,) = parse(MeanArguments, description=__doc__)
    if Accelerator().num_processes > 1:
        raise UsageError("one process only: each would add the whole sum once more")
    folder, start = Path(args.output_dir), time.perf_counter()
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output_dir {folder} already holds files")
    with TemporaryDirectory() as cache:
        rows = load_split(args.dataset_name, None, None, args.split, cache)
        if not isinstance(rows.features[args.label_column], ClassLabel):
            raise UsageError(f"--label_column {args.label_column} does not name its classes")
        names = rows.features[args.label_column].names  # public
        kept = keep_readable(ImageRows(rows))[0]
        rows, images = kept.rows, torch.cat(list(read_pixel_batches(kept, SIDE, 256)))
        labels = torch.tensor(
            [names.index(label) for label in read_labels(rows, args.label_column)]
        )
    plan = make_plan(
        target_epsilon=args.target_epsilon,
        num_units=len(images),
        expected_batch_size=len(images),  # every image is in the one release
        steps=1,
        max_grad_norm=1.0,
        delta=args.target_delta,
        purpose="mean embedding",
    )
    spent = account(plan.events(), plan.delta)
    about = Circumstances(randomness=SecretRandomness().source)
    statement = build_statement(plan, plan.events(), spent, about) | {"files": {}}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "privacy.json").write_text(json.dumps(statement, indent=2) + "\n")
    if args.features == "random":
        features = random_features(args.length_scale, args.seed)
    else:
        features = perceptual_features()
    target = noisy_mean(features, images, labels, len(names), plan, SecretRandomness())
    del images
    generator = train_generator(target, features, args)
    save_images(generator, names, args.num_images, folder)
    print(f"{args.num_images} images in {folder}, {time.perf_counter() - start:.0f} seconds")


if __name__ == "__main__":
    run_script(main)
