"""How much synthetic images look like real ones, seen through one extractor."""

import warnings

import numpy as np
import torch
from torch import nn
from torchmetrics.image.inception import InceptionScore
from tqdm import tqdm

from utils.evaluation.features import ExtractedFeatures
from utils.metrics.clip_score.clip_score import clip_score
from utils.metrics.frechet_distance.frechet_distance import frechet_distance
from utils.metrics.kernel_distance.kernel_distance import kernel_distance
from utils.metrics.precision_recall_density_coverage.precision_recall_density_coverage import (
    precision_recall_density_coverage,
)

USUAL = 10_000  # images a set; with fewer, a Frechet distance comes out too large
NEIGHBOURS = 5


def measure_fidelity(
    synthetic: ExtractedFeatures, real: ExtractedFeatures, has_epsilon: bool, public: bool
) -> dict[str, dict]:
    """The metrics by name, each with its value, its spread, and what it was computed from.

    Args:
        has_epsilon: whether an epsilon covers the synthetic images.
        public: whether the real images are public.

    Raises:
        ValueError: too few images (`frechet_distance`, `precision_recall_density_coverage`).
    """
    sets = (synthetic.features, real.features)
    about = synthetic.about | {"num_synthetic": len(synthetic), "num_real": len(real)}
    if min(len(synthetic), len(real)) < USUAL:
        about["warning"] = (
            f"fewer than {USUAL} images in a set: compare only with numbers of as many images"
        )
    entries = {}

    def put(name: str, value: float, spread: float | None = None, **more) -> None:
        entry = {"value": value, "std": spread, "covered_by_epsilon": has_epsilon and public}
        entries[name] = entry | about | more

    def put_unseen(name: str, value: float, spread: float | None = None, **more) -> None:
        """Of a metric that sees no real image."""
        put(name, value, spread, **more)
        entries[name]["covered_by_epsilon"] = has_epsilon
        del entries[name]["num_real"]

    with tqdm(total=4, desc="fidelity", leave=False) as bar:
        put("frechet_distance", frechet_distance(*sets))
        bar.update()
        put("kernel_distance", *kernel_distance(*sets))
        bar.update()
        neighbours = precision_recall_density_coverage(*sets, NEIGHBOURS)
        for name, value in neighbours.items():
            put(name, value, k=NEIGHBOURS)
        bar.update()
        if synthetic.log_probabilities is not None:
            put_unseen("inception_score", *inception_score(synthetic.log_probabilities))
        if synthetic.prompts is not None:
            score, error = clip_score(synthetic.features, synthetic.prompts)
            put_unseen("clip_score", score, standard_error=error)
        bar.update()
    return entries


def inception_score(log_probabilities: np.ndarray, splits: int = 10) -> tuple[float, float | None]:
    """exp E KL(p(y|x) || p(y)), mean and deviation over splits (Salimans et al. 2016, section 4).

    Args:
        log_probabilities: of the extractor's classes, [N, c].
    """
    splits = min(splits, len(log_probabilities))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # it warns that it keeps all features
        torch.manual_seed(0)
        score = InceptionScore(feature=nn.Identity(), splits=splits, sync_on_compute=False)
        score.update(torch.from_numpy(log_probabilities.astype(np.float64)))
        mean, spread = score.compute()
    return mean.item(), spread.item() if splits > 1 else None
