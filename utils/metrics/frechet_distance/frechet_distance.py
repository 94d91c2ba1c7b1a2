"""The Frechet distance between two sets of features (Heusel et al. 2017, section 4).

With the features of Inception it is FID; with any other extractor it is another number, and the
extractor must be named with it.
"""

import datasets
import evaluate
import numpy as np
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

CITATION = """@inproceedings{heusel2017gans,
  title={{GANs} trained by a two time-scale update rule converge to a local {Nash} equilibrium},
  author={Heusel, Martin and Ramsauer, Hubert and Unterthiner, Thomas and Nessler, Bernhard and
          Hochreiter, Sepp},
  booktitle={Advances in Neural Information Processing Systems},
  year={2017}
}"""


class Precomputed(nn.Identity):
    """Features that are computed already, where torchmetrics expects a network."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features


def frechet_distance(predictions: np.ndarray, references: np.ndarray, block: int = 4096) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64; means and covariances are streamed.

    Args:
        predictions, references: features of the synthetic and the real images, [N, d] and [M, d].

    Raises:
        ValueError: fewer than two rows in a set.
    """
    if min(len(predictions), len(references)) < 2:
        raise ValueError("a Frechet distance needs at least two images in each set")
    metric = FrechetInceptionDistance(Precomputed(predictions.shape[1]), sync_on_compute=False)
    for features, is_real in ((references, True), (predictions, False)):
        for start in range(0, len(features), block):
            part = np.asarray(features[start : start + block], np.float64)
            metric.update(torch.from_numpy(part), real=is_real)
    return max(0.0, metric.compute().item())  # rounding may leave equal sets below zero


def frechet_distance_by_class(
    predictions: np.ndarray, references: np.ndarray, prediction_labels: list, reference_labels: list
) -> dict:
    """The Frechet distance between the images of each class that has two in both sets.

    Args:
        prediction_labels, reference_labels: the class of each row, [N] and [M].
    """
    found, labels = {}, [np.asarray(own) for own in (prediction_labels, reference_labels)]
    for name in sorted(set(prediction_labels) & set(reference_labels)):
        both = zip((predictions, references), labels, strict=True)
        of_class = [rows[own == name] for rows, own in both]
        if min(map(len, of_class)) > 1:
            found[name] = frechet_distance(*of_class)
    return found


class FrechetDistance(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Frechet distance between two sets of features; FID if Inception's.",
            citation=CITATION,
            inputs_description=(
                "predictions, references: features [N, d] and [M, d]; prediction_labels [N] and "
                "reference_labels [M]: for the distance of each class, too."
            ),
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def compute(self, *, predictions, references, prediction_labels=None, reference_labels=None):
        """Unlike in `evaluate`, nothing is cached on disk: the rows may describe private images."""
        rows = np.asarray(predictions), np.asarray(references)
        return self._compute(*rows, prediction_labels, reference_labels)

    def _compute(self, predictions, references, prediction_labels=None, reference_labels=None):
        result = {"frechet_distance": frechet_distance(predictions, references)}
        if prediction_labels is not None and reference_labels is not None:
            labels = list(prediction_labels), list(reference_labels)
            result["per_class"] = frechet_distance_by_class(predictions, references, *labels)
        return result
