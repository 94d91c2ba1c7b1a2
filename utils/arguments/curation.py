"""The options of curation: votes of private images for synthetic ones."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.values import check_between, check_positive
from utils.errors import UsageError


@dataclass
class CurationArguments:
    """Who votes for what, and what is kept."""

    synthetic: str = option(
        "the candidates: a folder that sample.py or release_means.py left, whose cost is in the "
        "same ledger; or that sample.py drew from a public model"
    )
    votes_per_row: int = option("candidates that a private image votes for, the nearest", 4)
    keep: str = option(
        "best: the candidates with the most votes; resample: candidates at random, by their votes",
        "best",
        choices=["best", "resample"],
    )
    num_images: int | None = option(
        "images to keep, balanced over the classes; default: half of the candidates", None
    )
    rounds: int = option(
        "rounds of votes; between two, the winners are varied by image-to-image with the model "
        "that drew the candidates (Private Evolution)",
        1,
    )
    variation_strength: float = option(
        "how far a variation is from its original, above 0 to 1: the share of the noise", 0.5
    )
    curation_epsilon: float | None = option(
        "epsilon of the votes alone; default: what --target_epsilon leaves after what the "
        "candidates cost",
        None,
    )

    def __post_init__(self):
        for name in ("votes_per_row", "rounds"):
            check_between(name, getattr(self, name), 1, math.inf)
        if self.num_images is not None:
            check_between("num_images", self.num_images, 1, math.inf)
        if not 0 < self.variation_strength <= 1:
            raise UsageError(f"--variation_strength {self.variation_strength} must be in (0, 1]")
        check_positive("curation_epsilon", self.curation_epsilon)
