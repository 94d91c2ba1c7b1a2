"""What do classifiers learn from images that were drawn from one release of noisy means alone?

    python examples/digits/draw_public.py --output_dir runs/typographic --num_train 60000
    python benchmarks/releases.py --dataset_name runs/typographic --test_split validation --grey \\
        --target_epsilon 3 --release moments

All options of `release_means.py --help` that say what is released can be tried, on the first so
many images of a set. Tune them on public images. The last line is a row of a table.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from tqdm import tqdm

from utils.arguments.means import MeansArguments
from utils.arguments.parsing import option, parse
from utils.arguments.training import PrivacyArguments
from utils.data.images import ImageRows, keep_readable, read_pixel_batches, scale_to_unit_range
from utils.data.rows import load_split, read_labels
from utils.errors import run_script
from utils.methods.mean_features import SIDE
from utils.methods.means import find_noise, plan_release, release
from utils.methods.releases import build_release
from utils.metrics.synthetic_accuracy.classifiers import Recipe, predict_classes, train_classifier
from utils.privacy.randomness import SecretRandomness


@dataclass
class Arguments:
    """What is tried, and on what."""

    dataset_name: str = option("Hub id or folder of labelled images, with a split train")
    test_split: str = option("split that classifiers are tested on", "test")
    units: int = option("private images: the first so many", 60_000)
    target_epsilon: float = option("of the release", 3.0)
    target_delta: float = option("of the release", 1.5e-6)
    classifier_steps: int = option("optimizer steps of the classifier, a cnn", 600)
    seed: int = option("of everything but the noise", 0)


def read(args: Arguments, split: str) -> tuple[torch.Tensor, list[str]]:
    images = keep_readable(ImageRows(load_split(args.dataset_name, None, None, split)))[0]
    pixels = torch.cat(list(read_pixel_batches(images, SIDE, 256)))
    return pixels, list(read_labels(images.rows, "label"))


def main():
    args, means = parse(Arguments, MeansArguments, description=__doc__)
    accelerator = Accelerator()
    pixels, labels = read(args, "train")
    pixels, names = pixels[: args.units], sorted(set(labels))
    wanted = [names.index(label) for label in labels]
    budget = PrivacyArguments(target_epsilon=args.target_epsilon, target_delta=args.target_delta)
    plan = plan_release(len(pixels), budget, means, None, is_first=False)
    kind, released = build_release(means, args.seed), []

    def read_units(batch: torch.Tensor | None) -> Iterator[tuple[int, int, torch.Tensor]]:
        units = range(len(pixels)) if batch is None else batch.tolist()
        for unit in tqdm(units, f"round {len(released) + 1}", leave=False):
            yield unit, wanted[unit], scale_to_unit_range(pixels[unit])

    def sum_units(batch: torch.Tensor | None) -> torch.Tensor:
        rows = read_units(batch)
        return kind.sum(rows, len(names), released, find_noise(plan), plan.sensitivity)

    while len(released) < plan.steps:
        released.append(release(sum_units, plan, SecretRandomness(), accelerator))

    drawn = torch.empty(means.num_synthetic_images, 3, SIDE, SIDE, dtype=torch.uint8)
    for numbers, images in kind.draw(torch.stack(released), find_noise(plan)):
        drawn[numbers] = images
    classes = torch.arange(len(drawn)) % len(names)
    recipe = Recipe("cnn", len(names), args.classifier_steps, args.seed)
    model = train_classifier(drawn, classes, recipe, accelerator.device)
    pixels, labels = read(args, args.test_split)
    right = predict_classes(model, pixels, accelerator.device) == torch.tensor(
        [names.index(label) for label in labels]
    )
    cells = [f"{plan.num_units:,}", f"{args.target_epsilon:g}", " ".join(sys.argv[1:])]
    print("|", " | ".join([*cells, f"{100 * right.double().mean():.1f}"]), "|")


if __name__ == "__main__":
    run_script(main)
