"""How good is the private classifier of relabel.py, by budget, number of images, and travel?

    python benchmarks/labeller.py --dataset_name FOLDER --synthetic runs/fashion_mnist/images \\
        --extractor classifier --classifier_weights examples/extractors/things.safetensors

It is trained as relabel.py trains it, on the first so many training images, and tested on all test
images. `--synthetic` are the images that make the features white. Tune it on one set for another.
"""

import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from accelerate import Accelerator
from torch import nn
from tqdm import tqdm

from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.parsing import option, parse
from utils.data.images import ImageRows, keep_readable, read_pixel_batches, read_synthetic
from utils.data.rows import load_split, read_labels
from utils.errors import run_script
from utils.evaluation.features import build_extractor
from utils.methods import labeller
from utils.methods.election import extract_pixels
from utils.privacy.plan import make_plan
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import private_steps


@dataclass
class Arguments:
    """What is tried."""

    dataset_name: str = option("Hub id or folder, with splits train and test")
    synthetic: str = option("images that make the features white: a folder that sample.py left")
    epsilons: list[float] = option("budgets of the classifier", [0.5, 1.0, 3.0])
    units: list[int] = option("private images: the first so many", [1437, 60000])
    travels: list[float] = option("see `labeller.TRAVEL`", [0.3, 0.5, 1.0])
    steps: int = option("private steps", 200)
    target_delta: float = option("delta of the budgets", 1.5e-6)
    seeds: int = option("runs of each, whose noise differs", 1)


def main():
    args, extracting = parse(Arguments, ExtractorArguments, description=__doc__)
    accelerator = Accelerator()
    extractor = build_extractor(extracting, accelerator.device)

    def extract(images: ImageRows, name: str) -> torch.Tensor:
        batches = read_pixel_batches(images, extractor.resolution, 256)
        passed = (extract_pixels(extractor, pixels, accelerator) for pixels in tqdm(batches, name))
        return torch.cat(list(passed))

    whiten = labeller.fit_whitening(
        extract(read_synthetic(args.synthetic, "--synthetic"), "public")
    )
    seen, labels = {}, {}
    for split in ("train", "test"):
        images = keep_readable(ImageRows(load_split(args.dataset_name, None, None, split)))[0]
        seen[split] = whiten(extract(images, split))
        labels[split] = list(read_labels(images.rows, "label"))
    names = sorted(set(labels["train"]))
    number = {name: i for i, name in enumerate(names)}
    wanted = {s: torch.tensor([number[label] for label in labels[s]]) for s in labels}

    def measure(count: int, epsilon: float, travel: float) -> float:
        plan = make_plan(
            target_epsilon=epsilon,
            num_units=count,
            expected_batch_size=count,
            steps=args.steps,
            max_grad_norm=1.0,
            delta=args.target_delta,
        )
        first, one = torch.arange(count), torch.ones(count, dtype=int)
        images = labeller.UnitImages(seen["train"][:count], wanted["train"][:count], first, one)
        head = nn.Linear(seen["train"].shape[1], len(names), bias=False).to(accelerator.device)
        state, randomness = labeller.build_state(head, plan, travel), SecretRandomness()
        losses = labeller.build_losses(head, images, randomness, accelerator)
        for _ in private_steps(accelerator, state, losses, plan, randomness, labeller.UNITS, False):
            pass
        found = (seen["test"] @ head.weight.detach().cpu().T).argmax(1)
        return 100 * (found == wanted["test"]).double().mean().item()

    print("| private images | epsilon |", " | ".join(f"travel {t:g}" for t in args.travels), "|")
    print("| --- " * (2 + len(args.travels)) + "|")
    for count, epsilon in product(args.units, args.epsilons):
        found = [[measure(count, epsilon, t) for _ in range(args.seeds)] for t in args.travels]
        means = [f"{sum(values) / len(values):.1f}" for values in found]
        print(f"| {count:,} | {epsilon:g} |", " | ".join(means), "|", flush=True)


if __name__ == "__main__":
    run_script(main)
