"""The baseline without a generator: a classifier trained on the private images by DP-SGD.

    python benchmarks/dp_sgd_classifier.py --dataset_name ylecun/mnist --target_epsilon 10 \\
        --target_delta 1e-5
    python benchmarks/dp_sgd_classifier.py --dataset_name FOLDER --noise_multiplier 1.2 \\
        --target_delta 1e-5

The network is the small convolutional one with tanh of Papernot et al. 2021 (table 3), which DP-SGD
trains better than ReLU; sampling, per-unit gradients, clipping, noise and accounting are those of
the training scripts. Whoever needs only this classifier, and no images, should train it so. It is
a baseline: the run is in no ledger.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from utils.arguments.parsing import option, parse
from utils.data.images import ImageRows, keep_readable, read_pixel_batches
from utils.data.rows import load_split, read_labels
from utils.errors import UsageError, run_script
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.privacy.accounting import account
from utils.privacy.plan import make_plan
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState, private_steps

ROOT = Path(__file__).resolve().parent.parent

SIDE = 28


@dataclass
class ClassifierArguments:
    """The images, and how long to train."""

    dataset_name: str = option("Hub id or folder of parquet files, with splits train and test")
    target_epsilon: float | None = option("budget; the noise is calibrated to it", None)
    noise_multiplier: float | None = option("sigma, instead of --target_epsilon", None)
    target_delta: float = option("delta of the budget, below 1/N")
    expected_batch_size: int = option("B, expected images in a Poisson batch", 2048)
    max_grad_norm: float = option("C, the clipping bound on one image's gradient", 0.1)
    train_split: str = option("split of the private images", "train")
    test_split: str = option("split to test on, once", "test")
    label_column: str = option("column of the labels", "label")
    max_train_steps: int = option("private steps", 400)
    learning_rate: float = option("of SGD with momentum 0.9", 8.0)
    train_batch_size: int = option("images per forward pass", 512)
    seed: int = option("seed of the first weights", 0)
    json: bool = option("print the result as JSON", False)


def tanh_cnn(num_classes: int) -> nn.Sequential:
    """26,000 weights, for grey images [n, 1, 28, 28]."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 8, stride=2, padding=3),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Conv2d(16, 32, 4, stride=2),
        nn.Tanh(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(512, 32),
        nn.Tanh(),
        nn.Linear(32, num_classes),
    )


def load(args: ClassifierArguments, split: str, cache: str) -> tuple[torch.Tensor, list[str]]:
    """Grey images [N, 1, 28, 28] around zero, and their class names."""
    images = ImageRows(load_split(args.dataset_name, None, None, split, cache))
    images = keep_readable(images)[0]
    pixels = torch.cat(list(read_pixel_batches(images, SIDE, 256)))
    return pixels.float().mean(1, keepdim=True) / 127.5 - 1, list(
        read_labels(images.rows, args.label_column)
    )


def main():
    (args,) = parse(ClassifierArguments, description=__doc__)
    start = time.perf_counter()
    accelerator = Accelerator()
    with TemporaryDirectory() as cache:
        images, labels = load(args, args.train_split, cache)
        test_images, test_labels = load(args, args.test_split, cache)
    names = sorted(set(test_labels))  # public: which classes there are
    if not set(labels) <= set(names):
        raise UsageError("the private images have a class that the test images lack")
    wanted = torch.tensor([names.index(label) for label in labels])
    plan = make_plan(
        target_epsilon=args.target_epsilon,
        noise_multiplier=args.noise_multiplier,
        num_units=len(images),
        expected_batch_size=args.expected_batch_size,
        steps=args.max_train_steps,
        max_grad_norm=args.max_grad_norm,
        delta=args.target_delta,
    )
    spent = account(plan.events(), plan.delta)

    torch.manual_seed(args.seed)
    model = tanh_cnn(len(names)).to(accelerator.device)
    engine = PerUnitGradients(model)
    optimizer = torch.optim.SGD(model.parameters(), args.learning_rate, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, plan.steps)

    def losses(units: torch.Tensor) -> torch.Tensor:
        logits = model(images[units].to(accelerator.device))
        return F.cross_entropy(logits, wanted[units].to(accelerator.device), reduction="none")

    state = TrainingState(engine, optimizer, schedule)
    source = SecretRandomness()
    for _ in private_steps(accelerator, state, losses, plan, source, args.train_batch_size):
        pass
    with torch.no_grad():
        predicted = [
            model(part.to(accelerator.device)).argmax(1) for part in test_images.split(512)
        ]
    right = [names[i] == label for i, label in zip(torch.cat(predicted), test_labels, strict=True)]
    result = {
        "accuracy": sum(right) / len(right),
        "epsilon": asdict(spent),
        "noise_multiplier": plan.noise_multiplier,
        "trainable_parameters": engine.num_parameters,
        "train_seconds": time.perf_counter() - start,
    }
    if accelerator.is_main_process:
        shown = f"accuracy {result['accuracy']:.4f} at epsilon {spent.add_or_remove_one:.3f}"
        print(json.dumps(result) if args.json else shown)


if __name__ == "__main__":
    run_script(main)
