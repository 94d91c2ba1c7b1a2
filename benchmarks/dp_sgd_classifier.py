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

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from accelerate import Accelerator  # noqa: E402
from torch import nn  # noqa: E402

from utils.accounting import account, make_plan  # noqa: E402
from utils.arguments import PrivacyArguments, option, parse  # noqa: E402
from utils.data import keep_readable, labels_of, load_rows, pixel_batches  # noqa: E402
from utils.entropy import SecretRandomness  # noqa: E402
from utils.errors import UsageError, run_script  # noqa: E402
from utils.per_unit_gradients import PerUnitGradients  # noqa: E402
from utils.training import TrainingState, private_steps  # noqa: E402

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
    rows = keep_readable(load_rows(args.dataset_name, None, None, split, cache), "image")[0]
    pixels = torch.cat(list(pixel_batches(rows, "image", SIDE, 256)))
    return pixels.float().mean(1, keepdim=True) / 127.5 - 1, list(
        labels_of(rows, args.label_column)
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
    privacy = PrivacyArguments(
        target_epsilon=args.target_epsilon,
        noise_multiplier=args.noise_multiplier,
        target_delta=args.target_delta,
        expected_batch_size=args.expected_batch_size,
        max_grad_norm=args.max_grad_norm,
    )
    plan = make_plan(len(images), privacy, args.max_train_steps)
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
