"""How useful synthetic images are: classifiers trained on them, tested on real ones."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, pstdev

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torchmetrics.functional.classification import multilabel_auroc

from utils.data.diagnostics import warn_of_other_classes
from utils.errors import UsageError, on_main_process
from utils.files import make_private, write_durably
from utils.metrics.synthetic_accuracy.classifiers import (
    Recipe,
    compute_logits,
    predict_classes,
    train_classifier,
)
from utils.version import VERSION


@dataclass(frozen=True)
class LabelledImages:
    """Pixels, uint8 [N, 3, R, R], and the class name of each, or the names of its labels."""

    pixels: torch.Tensor
    labels: list[str] | list[frozenset[str]]

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        """The SHA-256 of all pixels and labels."""
        labels = [own if isinstance(own, str) else sorted(own) for own in self.labels]
        digest = hashlib.sha256(json.dumps([list(self.pixels.shape), labels]).encode())
        digest.update(self.pixels.contiguous().numpy())
        return digest.hexdigest()


@dataclass(frozen=True)
class Classifiers:
    """Which networks are trained.

    Attributes:
        networks: the optimizer steps of each. seeds: how many of each.
        kept: a folder in private/ for what each network was found to do, by which an evaluation
            that was cut short goes on; None: it begins anew.
    """

    networks: dict[str, int]
    seeds: int
    kept: Path | None = None

    def about(self) -> dict:
        return {"classifier_steps": self.networks, "classifier_seeds": self.seeds}


def measure_downstream_accuracy(
    trained_on: LabelledImages,
    tested_on: LabelledImages,
    classifiers: Classifiers,
    state: PartialState,
) -> dict:
    """Accuracy of classifiers, over networks and seeds: mean and standard deviation; by class; and
    which classes were confused.

    Raises:
        UsageError: the two sets have no class in common.
    """
    names = sorted(set(trained_on.labels) | set(tested_on.labels))
    if not set(trained_on.labels) & set(tested_on.labels):
        raise UsageError("the two sets have no class in common: check their label columns")
    warn_of_other_classes(
        {"synthetic images": set(trained_on.labels), "real images": set(tested_on.labels)},
        "and no accuracy can be right if that is a name spelled in two ways",
    )
    number = {name: i for i, name in enumerate(names)}
    labels, wanted = (
        torch.tensor([number[name] for name in images.labels]) for images in (trained_on, tested_on)
    )

    def judge(model: nn.Module) -> torch.Tensor:
        predicted = predict_classes(model, tested_on.pixels, state.device)
        pairs = torch.bincount(wanted * len(names) + predicted, minlength=len(names) ** 2)
        return pairs.view(len(names), -1)

    results = _train_all(trained_on, tested_on, labels, len(names), classifiers, judge, state)
    confusion = sum(table for _, table in results)
    counts = confusion.sum(1)
    return {
        **_summarise([(network, _accuracy(table)) for network, table in results]),
        "per_class": {
            name: (confusion[i, i] / counts[i]).item() for name, i in number.items() if counts[i]
        },
        "class_names": names,
        # [real class][predicted]: shares of the class, over all classifiers
        "confusion": (confusion / counts[:, None].clamp_min(1)).tolist(),
        "num_real": len(tested_on),
        **classifiers.about(),
    }


def measure_downstream_auroc(
    trained_on: LabelledImages,
    tested_on: LabelledImages,
    classifiers: Classifiers,
    state: PartialState,
) -> dict:
    """Where images have any number of labels: the area under the ROC curve of each label (0.5: as
    good as chance), for all that some real images have and others do not; their mean, over
    networks and seeds.

    Raises:
        UsageError: no label of the synthetic images has such real images.
    """
    learnt = set().union(*trained_on.labels)
    shares = {name: mean(name in own for own in tested_on.labels) for name in learnt}
    names = sorted(name for name, share in shares.items() if 0 < share < 1)
    if not names:
        raise UsageError(
            "no label of the synthetic images is on some test images and missing on others: check "
            "--synthetic_label_column and --test_label_column"
        )
    labels, wanted = (
        torch.tensor([[name in own for name in names] for own in images.labels]).long()
        for images in (trained_on, tested_on)
    )

    def judge(model: nn.Module) -> torch.Tensor:
        logits = compute_logits(model, tested_on.pixels, state.device)
        return multilabel_auroc(logits, wanted, len(names), average="none")

    results = _train_all(trained_on, tested_on, labels, len(names), classifiers, judge, state)
    by_label = torch.stack([areas for _, areas in results]).mean(0)
    return {
        **_summarise([(network, areas.mean().item()) for network, areas in results]),
        "per_class": dict(zip(names, by_label.tolist(), strict=True)),
        "not_measured": sorted(learnt.union(*tested_on.labels) - set(names)),
        "num_real": len(tested_on),
        **classifiers.about(),
    }


def _train_all(
    trained_on: LabelledImages,
    tested_on: LabelledImages,
    labels: torch.Tensor,
    num_classes: int,
    classifiers: Classifiers,
    judge: Callable[[nn.Module], torch.Tensor],
    state: PartialState,
) -> list[tuple[str, torch.Tensor]]:
    """The name of each network, and what `judge` makes of it; each process trains its share of
    those of which nothing is kept."""
    recipes = [
        Recipe(name, num_classes, steps, seed)
        for name, steps in classifiers.networks.items()
        for seed in range(classifiers.seeds)
    ]
    files = []
    if classifiers.kept is not None:
        files = _name_files(recipes, [trained_on.digest(), tested_on.digest()], classifiers.kept)
    results = on_main_process(
        lambda: {i: json.loads(f.read_text()) for i, f in enumerate(files) if f.exists()}
    )
    if results and state.is_main_process:
        kept = f"{len(results)} of {len(recipes)} classifiers are not trained again"
        print(f"{kept}: they were judged before this evaluation was cut short", file=sys.stderr)
    left, mine = [i for i in range(len(recipes)) if i not in results], {}
    for i in left[state.process_index :: state.num_processes]:
        model = train_classifier(trained_on.pixels, labels, recipes[i], state.device)
        mine[i] = judge(model).tolist()
        if files:
            for folder in (classifiers.kept.parent, classifiers.kept):
                make_private(folder)
            write_durably(files[i], json.dumps(mine[i]))
    for part in gather_object([mine]):
        results |= part
    return [(recipe.network, torch.tensor(results[i])) for i, recipe in enumerate(recipes)]


def _name_files(recipes: list[Recipe], sets: list[str], folder: Path) -> list[Path]:
    """A name for each recipe, which another recipe, another set or another version has not."""
    about = [json.dumps([VERSION, *sets, asdict(recipe)]) for recipe in recipes]
    return [folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json" for text in about]


def _accuracy(confusion: torch.Tensor) -> float:
    return (confusion.diagonal().sum() / confusion.sum()).item()


def _summarise(values: list[tuple[str, float]]) -> dict:
    """Mean and deviation over all, and over those of each network."""
    by_network = {}
    for network, value in values:
        by_network.setdefault(network, []).append(value)
    networks = {name: _mean_and_deviation(found) for name, found in by_network.items()}
    return {**_mean_and_deviation([value for _, value in values]), "networks": networks}


def _mean_and_deviation(values: list[float]) -> dict[str, float]:
    return {"value": mean(values), "std": pstdev(values)}
