"""Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020)."""

import datasets
import evaluate
import numpy as np
import torch

CITATION = """@inproceedings{naeem2020reliable,
  title={Reliable fidelity and diversity metrics for generative models},
  author={Naeem, Muhammad Ferjad and Oh, Seong Joon and Uh, Youngjung and Choi, Yunjey and
          Yoo, Jaejun},
  booktitle={International Conference on Machine Learning},
  year={2020}
}"""


def precision_recall_density_coverage(
    predictions: np.ndarray, references: np.ndarray, k: int = 5, block: int = 1024
) -> dict[str, float]:
    """How far the balls around the real features, each reaching to its k-th neighbour, hold the
    synthetic ones, and the reverse (Naeem et al. 2020, section 3).

    precision: share of synthetic rows inside any real ball; recall: share of real rows inside any
    synthetic ball; density: real balls that hold a synthetic row, on average, over k; coverage:
    share of real balls that hold any synthetic row. Memory is `block` rows of distances.

    Args:
        predictions, references: features of the synthetic and the real images, [N, d] and [M, d].

    Raises:
        ValueError: a set has k rows or fewer.
    """
    if min(len(predictions), len(references)) <= k:
        raise ValueError(f"precision and recall with k = {k} need more than {k} images in each set")
    synthetic, real = (
        torch.from_numpy(np.asarray(rows, np.float32)) for rows in (predictions, references)
    )
    centre = real.mean(0)
    synthetic, real = synthetic - centre, real - centre  # short vectors round less
    real_radii = radii(real, k, block)
    synthetic_radii = radii(synthetic, k, block)
    balls_around = torch.zeros(len(synthetic), dtype=torch.int64)
    covered = torch.zeros(len(real), dtype=torch.bool)
    recalled = torch.zeros(len(real), dtype=torch.bool)
    for start in range(0, len(synthetic), block):
        part = slice(start, start + block)
        distances = torch.cdist(synthetic[part], real)  # [block, M]
        inside = distances < real_radii
        balls_around[part] = inside.sum(1)
        covered |= inside.any(0)
        recalled |= (distances < synthetic_radii[part, None]).any(0)
    return {
        "precision": (balls_around > 0).double().mean().item(),
        "recall": recalled.double().mean().item(),
        "density": balls_around.double().mean().item() / k,
        "coverage": covered.double().mean().item(),
    }


def radii(rows: torch.Tensor, k: int, block: int) -> torch.Tensor:
    """The distance of each row to its k-th neighbour among the others: [N, d] -> [N]."""
    parts = []
    for start in range(0, len(rows), block):
        distances = torch.cdist(rows[start : start + block], rows)
        index = torch.arange(len(distances))
        distances[index, start + index] = torch.inf  # a row is not its own neighbour
        parts.append(distances.topk(k, largest=False).values[:, -1])
    return torch.cat(parts)


class PrecisionRecallDensityCoverage(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Precision, recall, density and coverage of synthetic features.",
            citation=CITATION,
            inputs_description="predictions, references: features [N, d] and [M, d]; k.",
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def compute(self, *, predictions, references, **options):
        """Unlike in `evaluate`, nothing is cached on disk: the rows may describe private images."""
        return self._compute(np.asarray(predictions), np.asarray(references), **options)

    def _compute(self, predictions, references, **options):
        return precision_recall_density_coverage(predictions, references, **options)
