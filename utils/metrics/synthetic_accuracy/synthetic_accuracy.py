"""Accuracy on real images of classifiers that were trained on synthetic ones; or ROC areas."""

import datasets
import evaluate
import numpy as np
import torch
from torchmetrics.functional.classification import multilabel_auroc

from .classifiers import Recipe, compute_logits, train_classifier

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
                "[M, 3, R, R]; prediction_labels [N] and reference_labels [M], integers from 0; or "
                "for several labels an image zeros and ones [N, L] and [M, L]; classifier (cnn, "
                "wide-cnn, resnet9 or wrn-40-4), steps, seeds."
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
        several = synthetic_labels.ndim == 2
        num_classes = 1 + int(max(synthetic_labels.max(), real_labels.max()))
        if several:
            num_classes = synthetic_labels.shape[1]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        values = []
        for seed in range(seeds):
            recipe = Recipe(classifier, num_classes, steps, seed)
            model = train_classifier(synthetic, synthetic_labels, recipe, device)
            logits = compute_logits(model, real, device)
            if several:
                areas = multilabel_auroc(logits, real_labels.long(), num_classes, average="none")
                values.append(areas.double().numpy())
            else:
                values.append((logits.argmax(1) == real_labels).double().mean().item())
        name = "synthetic_auroc" if several else "synthetic_accuracy"
        by_seed = np.array(values).reshape(seeds, -1).mean(1)
        result = {name: float(by_seed.mean()), "standard_deviation": float(by_seed.std())}
        return result | ({"per_label": np.mean(values, 0).tolist()} if several else {})
