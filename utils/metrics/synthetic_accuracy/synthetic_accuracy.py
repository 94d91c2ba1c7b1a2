"""Accuracy on real images of classifiers that were trained on synthetic ones."""

import datasets
import evaluate
import numpy as np
import torch

from .classifiers import Recipe, predict_classes, train_classifier

CITATION = """@inproceedings{ravuri2019classification,
  title={Classification accuracy score for conditional generative models},
  author={Ravuri, Suman and Vinyals, Oriol},
  booktitle={Advances in Neural Information Processing Systems},
  year={2019}
}"""


def _to_tensor(values) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values))


class SyntheticAccuracy(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Accuracy on real images of a classifier trained on synthetic ones.",
            citation=CITATION,
            inputs_description=(
                "predictions: synthetic images, uint8 [N, 3, R, R]; references: real images, uint8 "
                "[M, 3, R, R]; prediction_labels [N] and reference_labels [M], integers from 0; "
                "classifier (cnn, wide-cnn, resnet9 or wrn-40-4), steps, seeds."
            ),
            features=datasets.Features(
                {
                    "predictions": datasets.Array3D((3, None, None), "uint8"),
                    "references": datasets.Array3D((3, None, None), "uint8"),
                }
            ),
        )

    def compute(self, *, predictions, references, prediction_labels, reference_labels, **options):
        """Unlike in `evaluate`, nothing is cached on disk: the images may be private."""
        return self._compute(
            *map(_to_tensor, (predictions, references, prediction_labels, reference_labels)),
            **options,
        )

    def _compute(
        self, synthetic, real, synthetic_labels, real_labels, classifier="cnn", steps=600, seeds=3
    ):
        num_classes = 1 + int(max(synthetic_labels.max(), real_labels.max()))
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        values = []
        for seed in range(seeds):
            recipe = Recipe(classifier, num_classes, steps, seed)
            model = train_classifier(synthetic, synthetic_labels, recipe, device)
            predicted = predict_classes(model, real, device)
            values.append((predicted == real_labels).double().mean().item())
        return {
            "synthetic_accuracy": float(np.mean(values)),
            "standard_deviation": float(np.std(values)),
        }
