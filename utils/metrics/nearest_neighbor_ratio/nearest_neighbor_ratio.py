"""Are synthetic images nearer to the private ones than to others of the same kind?"""

import datasets
import evaluate
import numpy as np
import torch

CITATION = """@article{platzer2021holdout,
  title={Holdout-based empirical assessment of mixed-type synthetic data},
  author={Platzer, Michael and Reutterer, Thomas},
  journal={Frontiers in Big Data},
  volume={4},
  year={2021}
}"""


def find_nearest(
    queries: np.ndarray, points: np.ndarray, k: int = 1, block: int = 1024
) -> tuple[np.ndarray, np.ndarray]:
    """Euclidean distances to the k nearest points, nearest first, and their numbers: [N, k] twice.

    The k nearest are found at single precision, and their distances computed again from the
    differences, so that a copy is at distance zero.

    Raises:
        ValueError: there are fewer than k points.
    """
    if len(points) < k:
        raise ValueError(f"there are {len(points)} points, fewer than k = {k}")
    queries, points = (torch.from_numpy(np.array(a, np.float32)) for a in (queries, points))
    centre = points.mean(0)
    queries -= centre  # short vectors round less
    points -= centre
    distances, numbers = [], []
    for start in range(0, len(queries), block):
        part = queries[start : start + block]
        found = torch.cdist(part, points).topk(k, largest=False).indices
        exact = torch.stack([(part - points[index]).norm(dim=1) for index in found.unbind(1)], 1)
        order = exact.argsort(1)
        distances.append(exact.gather(1, order))
        numbers.append(found.gather(1, order))
    return torch.cat(distances).numpy(), torch.cat(numbers).numpy()


def measure_both_distances(
    predictions: np.ndarray, references: np.ndarray, held_out: np.ndarray, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Distance of each synthetic row to its nearest private and nearest held-out row, [N] twice.

    Both are measured to as many rows (a random choice of the larger set): the more rows there are,
    the nearer is the nearest.
    """
    generator = np.random.default_rng(seed)
    size = min(len(references), len(held_out))
    chosen = [
        np.asarray(rows)[np.sort(generator.permutation(len(rows))[:size])]
        for rows in (references, held_out)
    ]
    to_private, to_others = (find_nearest(predictions, rows)[0][:, 0] for rows in chosen)
    return to_private, to_others


def compute_ratio(to_private: np.ndarray, to_others: np.ndarray) -> dict[str, float]:
    """Summary of `measure_both_distances` (after Platzer and Reutterer 2021, section 2.2).

    A generator that has learned the distribution, and none of its rows, has a ratio near one, and
    half of its images nearer to either.

    Returns:
        `nearest_neighbor_ratio`, the median over the synthetic rows of the distance to the nearest
        private row over that to the nearest held-out row; `share_nearer`, the share of them that
        are nearer to a private row (ties count half); `standard_error` of that share, as if the
        synthetic rows were independent.
    """
    ties = to_private == to_others
    ratio = np.where(ties, 1.0, to_private / np.maximum(to_others, np.finfo(np.float32).tiny))
    share = float(((to_private < to_others) + 0.5 * ties).mean())
    return {
        "nearest_neighbor_ratio": float(np.median(ratio)),
        "share_nearer": share,
        "standard_error": float(np.sqrt(share * (1 - share) / len(ratio))),
    }


class NearestNeighborRatio(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Distance to the nearest private image over that to a held-out one.",
            citation=CITATION,
            inputs_description=(
                "predictions: synthetic rows [N, d]; references: private rows [M, d]; held_out: "
                "rows [H, d] of the same kind that nothing was trained on; seed."
            ),
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def compute(self, *, predictions, references, held_out, **options):
        """Unlike in `evaluate`, nothing is cached on disk: the rows may describe private images."""
        rows = (np.asarray(predictions), np.asarray(references), np.asarray(held_out))
        return self._compute(*rows, **options)

    def _compute(self, predictions, references, held_out, **options):
        return compute_ratio(*measure_both_distances(predictions, references, held_out, **options))
