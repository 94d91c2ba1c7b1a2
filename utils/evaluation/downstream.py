"""How useful synthetic images are: classifiers trained on them, tested on real ones."""

from collections.abc import Callable
from dataclasses import dataclass
from statistics import mean, pstdev
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import nn
from torchmetrics.functional.classification import multilabel_auroc

from utils.errors import UsageError
from utils.metrics.synthetic_accuracy.classifiers import (
    Recipe,
    compute_logits,
    predict_classes,
    train_classifier,
)

T = TypeVar("T")


@dataclass(frozen=True)
class LabelledImages:
    """Pixels, uint8 [N, 3, R, R], and the class name of each, or the names of its labels."""

    pixels: torch.Tensor
    labels: list[str] | list[frozenset[str]]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Classifiers:
    """Which networks are trained.

    Attributes:
        networks: the optimizer steps of each. seeds: how many of each.
    """

    networks: dict[str, int]
    seeds: int

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
    number = {name: i for i, name in enumerate(names)}
    labels, wanted = (
        torch.tensor([number[name] for name in images.labels]) for images in (trained_on, tested_on)
    )

    def judge(model: nn.Module) -> torch.Tensor:
        predicted = predict_classes(model, tested_on.pixels, state.device)
        pairs = torch.bincount(wanted * len(names) + predicted, minlength=len(names) ** 2)
        return pairs.view(len(names), -1)

    results = _train_all(trained_on.pixels, labels, len(names), classifiers, state, judge)
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

    results = _train_all(trained_on.pixels, labels, len(names), classifiers, state, judge)
    by_label = torch.stack([areas for _, areas in results]).mean(0)
    return {
        **_summarise([(network, areas.mean().item()) for network, areas in results]),
        "per_class": dict(zip(names, by_label.tolist(), strict=True)),
        "not_measured": sorted(learnt.union(*tested_on.labels) - set(names)),
        "num_real": len(tested_on),
        **classifiers.about(),
    }


def _train_all(
    pixels: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    classifiers: Classifiers,
    state: PartialState,
    judge: Callable[[nn.Module], T],
) -> list[tuple[str, T]]:
    """The name of each network, and what `judge` makes of it; each process trains its share."""
    jobs = [(name, seed) for name in classifiers.networks for seed in range(classifiers.seeds)]
    results = []
    for name, seed in jobs[state.process_index :: state.num_processes]:
        recipe = Recipe(name, num_classes, classifiers.networks[name], seed)
        results.append((name, judge(train_classifier(pixels, labels, recipe, state.device))))
    return gather_object(results)


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
