"""How useful synthetic images are: classifiers trained on them, tested on real ones."""

from dataclasses import dataclass
from statistics import mean, pstdev

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from utils.errors import UsageError
from utils.metrics.synthetic_accuracy.classifiers import Recipe, predict_classes, train_classifier


@dataclass(frozen=True)
class LabelledImages:
    """Pixels, uint8 [N, 3, R, R], and the class name of each."""

    pixels: torch.Tensor
    labels: list[str]

    def __len__(self) -> int:
        return len(self.labels)


def measure_downstream_accuracy(
    trained_on: LabelledImages,
    tested_on: LabelledImages,
    networks: dict[str, int],
    seeds: int,
    state: PartialState,
) -> dict:
    """Accuracy of classifiers, over networks and seeds: mean and standard deviation; by class; and
    which classes were confused. Each process trains its share of the classifiers.

    Args:
        networks: the optimizer steps of each.

    Raises:
        UsageError: the two sets have no class in common.
    """
    names = sorted(set(trained_on.labels) | set(tested_on.labels))
    if not set(trained_on.labels) & set(tested_on.labels):
        raise UsageError("the two sets have no class in common: check --label_column")
    number = {name: i for i, name in enumerate(names)}
    labels, wanted = (
        torch.tensor([number[name] for name in images.labels]) for images in (trained_on, tested_on)
    )
    jobs = [(network, seed) for network in networks for seed in range(seeds)]
    results = []
    for network, seed in jobs[state.process_index :: state.num_processes]:
        recipe = Recipe(network, len(names), networks[network], seed)
        model = train_classifier(trained_on.pixels, labels, recipe, state.device)
        predicted = predict_classes(model, tested_on.pixels, state.device)
        pairs = torch.bincount(wanted * len(names) + predicted, minlength=len(names) ** 2)
        results.append((network, pairs.view(len(names), -1)))
    results = gather_object(results)
    accuracies = [(network, _accuracy(table)) for network, table in results]
    confusion = sum(table for _, table in results)
    counts = confusion.sum(1)
    return {
        "value": mean(value for _, value in accuracies),
        "std": pstdev(value for _, value in accuracies),
        "networks": {
            network: _mean_and_deviation([v for n, v in accuracies if n == network])
            for network in networks
        },
        "per_class": {
            name: (confusion[i, i] / counts[i]).item() for name, i in number.items() if counts[i]
        },
        "class_names": names,
        # [real class][predicted]: shares of the class, over all classifiers
        "confusion": (confusion / counts[:, None].clamp_min(1)).tolist(),
        "num_real": len(tested_on),
        "classifier_steps": networks,
        "classifier_seeds": seeds,
    }


def _accuracy(confusion: torch.Tensor) -> float:
    return (confusion.diagonal().sum() / confusion.sum()).item()


def _mean_and_deviation(values: list[float]) -> dict[str, float]:
    return {"value": mean(values), "std": pstdev(values)}
