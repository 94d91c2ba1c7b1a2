"""The options of released means, and of a warm start from what was drawn to match them."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.training import ModelArguments
from utils.arguments.values import check_between, check_positive
from utils.errors import UsageError

CENTRAL, MOMENTS = ["central_images"], ["moments"]  # each a release of its own
RELEASES = ["random_features", "perceptual_features", *CENTRAL, *MOMENTS]
# What the means take of a budget; benchmarks/RESULTS.md, "The share of the means".
ENOUGH, LEAST_SHARE, LARGEST_SHARE = 3.0, 0.3, 0.9


@dataclass
class MeansArguments:
    """Which noisy means are released, and the generator that is fitted to them."""

    release: list[str] = option(
        f"means of which features, one or more of {', '.join(RELEASES)}: of random Fourier "
        "features of the pixels (DP-MERF), or of the activations of a network trained on public "
        "images and of their squares (DP-MEPF); both share one noise. central_images, by itself: "
        "of small images, over a few Poisson batches (DP-FETA). moments, by itself: means and "
        "second moments of each class, from which images are drawn as mixtures of Gaussians",
        ["random_features"],
    )
    class_names: list[str] | None = option(
        "public list of the classes; default: those that --label_column names; without labels, one "
        "mean of all images is released",
        None,
    )
    class_prompts: list[str] | None = option(
        "for captions, without labels: public list of prompts; a row counts towards the prompt "
        "that its caption is nearest to, by the text encoder of --pretrained_model_name_or_path",
        None,
    )
    grey: bool = option("the images are grey, which is public: draw grey ones", False)
    length_scale: float = option(
        "of the random features, in the distance between grey images of 32 pixels in [-1, 1]", 20.0
    )
    num_frequencies: int = option("of the random features", 2000)
    num_generators: int = option("generators fitted to the means, each from another start", 1)
    generator_steps: int = option("optimizer steps of each generator", 300)
    generator_batch: int = option("images a step", 100)
    generator_learning_rate: float = option("of Adam", 2e-3)
    central_side: int = option("side of central images, in pixels", 8)
    central_batches: int = option("Poisson batches, each of which gives an image a class", 4)
    central_rate: float = option("probability that a unit is in such a batch", 0.5)
    moment_side: int = option("cosines each way that moments are of, from the lowest", 12)
    moment_components: int | None = option(
        "Gaussians a class; default: as many as the noise leaves apart, at most 64", None
    )
    moment_rounds: int = option("releases of moments, each about places that the last one told", 2)
    num_synthetic_images: int = option("images to draw, balanced over the classes", 2000)
    release_epsilon: float | None = option(
        "epsilon of the means; default: all of --target_epsilon, or --release_share of it where "
        "training follows in the same command",
        None,
    )
    release_share: float | None = option(
        "share of --target_epsilon for the means, where training follows; default: epsilon 3, but "
        "at least 0.3 and at most 0.9 of it",
        None,
    )

    def __post_init__(self):
        unknown = sorted(set(self.release) - set(RELEASES))
        if unknown or len(set(self.release)) < len(self.release):
            wrong = unknown[0] if unknown else "one of them twice"
            raise UsageError(f"--release {wrong}: there are {', '.join(RELEASES)}")
        alone = next((kind for kind in (*CENTRAL, *MOMENTS) if kind in self.release), None)
        if alone is not None and len(self.release) > 1:
            raise UsageError(
                f"--release {alone} is a release of its own: do both in one ledger, and give both "
                "sets to --warm_start"
            )
        check_between("moment_side", self.moment_side, 2, 32)
        if self.moment_components is not None:
            check_between("moment_components", self.moment_components, 1, 1000)
        check_between("moment_rounds", self.moment_rounds, 1, math.inf)
        check_between("central_side", self.central_side, 1, 32)
        check_between("central_batches", self.central_batches, 1, math.inf)
        if not 0 < self.central_rate <= 1:
            raise UsageError(f"--central_rate {self.central_rate} must be in (0, 1]")
        if self.class_prompts is not None and len(self.class_prompts) < 2:
            raise UsageError("--class_prompts: one prompt for all is --caption TEXT")
        if self.class_names is not None and len(set(self.class_names)) < len(self.class_names):
            raise UsageError("--class_names names a class twice")
        for name in ("num_frequencies", "num_generators", "generator_steps", "generator_batch"):
            check_between(name, getattr(self, name), 1, math.inf)
        check_between("num_synthetic_images", self.num_synthetic_images, 1, math.inf)
        for name in ("length_scale", "generator_learning_rate", "release_epsilon"):
            check_positive(name, getattr(self, name))
        if self.release_share is not None and not 0 < self.release_share < 1:
            raise UsageError(f"--release_share {self.release_share} must be in (0, 1)")

    def choose_share(self, target_epsilon: float) -> float:
        """The share of `target_epsilon` that the means take."""
        if self.release_share is not None:
            return self.release_share
        return min(max(ENOUGH / target_epsilon, LEAST_SHARE), LARGEST_SHARE)


@dataclass
class LaterModelArguments(ModelArguments):
    """The public pipeline of the training that may follow; here, captions that are compared with
    prompts need it."""

    pretrained_model_name_or_path: str | None = option(
        "diffusers pipeline, whose text encoder compares captions with the classes' prompts", None
    )


@dataclass
class WarmStartArguments:
    """A start from synthetic images, before the first private step."""

    warm_start: list[str] | None = option(
        "synthetic sets of release_means.py, curate.py or sample.py, in the same ledger, to fit "
        "the adapter to first: ordinary training, which costs nothing more; what the sets cost is "
        "composed, and --target_epsilon is for all",
        None,
    )
    warm_start_is_public: bool = option(
        "all of --warm_start are public images (with the column text), which cost nothing", False
    )
    warm_start_steps: int = option("optimizer steps of the warm start", 150)
    warm_start_batch_size: int = option("images a step of the warm start", 64)
    warm_start_learning_rate: float = option("of AdamW, with a cosine schedule", 4e-3)

    def __post_init__(self):
        for name in ("warm_start_steps", "warm_start_batch_size"):
            check_between(name, getattr(self, name), 1, math.inf)
        check_positive("warm_start_learning_rate", self.warm_start_learning_rate)
        if self.warm_start_is_public and self.warm_start is None:
            raise UsageError("--warm_start_is_public needs --warm_start, the set")
