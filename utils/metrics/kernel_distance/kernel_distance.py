"""The kernel distance between two sets of features (Binkowski et al. 2018, section 4).

With the features of Inception it is KID; with any other extractor it is another number, and the
extractor must be named with it.
"""

import warnings

import datasets
import evaluate
import numpy as np
import torch
from torch import nn
from torchmetrics.image.kid import KernelInceptionDistance

CITATION = """@inproceedings{binkowski2018demystifying,
  title={Demystifying {MMD} {GANs}},
  author={Bi{\\'n}kowski, Miko{\\l}aj and Sutherland, Danica J. and Arbel, Michael and
          Gretton, Arthur},
  booktitle={International Conference on Learning Representations},
  year={2018}
}"""


def kernel_distance(
    predictions: np.ndarray,
    references: np.ndarray,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> tuple[float, float | None]:
    """The unbiased squared MMD under the kernel (x.y / d + 1)^3, float64: mean and standard
    deviation over `subsets` random subsets of `subset_size` rows (at most all of them: where a
    subset is everything there is no deviation, None).

    Args:
        predictions, references: features of the synthetic and the real images, [N, d] and [M, d].

    Raises:
        ValueError: fewer than two rows in a set.
    """
    if min(len(predictions), len(references)) < 2:
        raise ValueError("a kernel distance needs at least two images in each set")
    subset_size = min(subset_size, len(predictions), len(references))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns that it keeps all features
        metric = KernelInceptionDistance(nn.Identity(), subsets, subset_size, sync_on_compute=False)
    metric.update(torch.from_numpy(np.asarray(references, np.float64)), real=True)
    metric.update(torch.from_numpy(np.asarray(predictions, np.float64)), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, spread = metric.compute()
    everything = subset_size == len(predictions) == len(references)
    return mean.item(), None if everything else spread.item()


class KernelDistance(evaluate.Metric):
    def _info(self):
        row = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Kernel distance between two sets of features; KID if Inception's.",
            citation=CITATION,
            inputs_description=(
                "predictions, references: features [N, d] and [M, d]; subsets, subset_size, seed."
            ),
            features=datasets.Features({"predictions": row, "references": row}),
        )

    def compute(self, *, predictions, references, **options):
        """Unlike in `evaluate`, nothing is cached on disk: the rows may describe private images."""
        return self._compute(np.asarray(predictions), np.asarray(references), **options)

    def _compute(self, predictions, references, **options):
        mean, spread = kernel_distance(predictions, references, **options)
        return {"kernel_distance": mean, "standard_deviation": spread}
