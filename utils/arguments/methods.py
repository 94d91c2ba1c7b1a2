"""The options of the methods: which weights train, and how a selection chooses them."""

import math
from dataclasses import dataclass

from utils.arguments.means import MeansArguments, WarmStartArguments
from utils.arguments.parsing import option
from utils.arguments.publishing import PublishArguments
from utils.arguments.training import (
    LARGEST_NOISE,
    SMALLEST_NOISE,
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.arguments.values import check_between
from utils.errors import UsageError

# What every private stage takes; then come the options of its method.
SHARED = (ModelArguments, DataArguments, PrivacyArguments, TrainingArguments, PublishArguments)

MECHANISMS = ["squared_norm", "voting", "layer", "random"]
SCOPES = ["attention", "convolution", "all"]


@dataclass
class LoraArguments:
    """The adapter."""

    rank: int = option("rank of the adapter", 8)
    lora_alpha: int | None = option("scale of the adapter times its rank; default: the rank", None)
    target_modules: list[str] | None = option(
        "layers to adapt, by suffix of their name; default: attention and projections", None
    )
    freeze_lora_a: bool = option(
        "train B only, and leave A at its random start: fewer weights, so less noise in all "
        "(FFA-LoRA, Sun et al. 2024)",
        False,
    )

    def __post_init__(self):
        check_between("rank", self.rank, 1, math.inf)
        if self.lora_alpha is not None:
            check_between("lora_alpha", self.lora_alpha, 1, math.inf)


@dataclass
class LoDAArguments:
    """The adapter."""

    rank: int = option("r, the channels between A and B", 4)
    target_modules: list[str] | None = option(
        "layers to adapt, by suffix of their name; default: attention, projections, feed-forward "
        "and convolutions",
        None,
    )
    activation: str = option(
        "between A and B; identity makes it a LoRA",
        "leaky_relu",
        choices=["leaky_relu", "gelu", "identity"],
    )
    negative_slope: float = option("slope of the leaky_relu below zero", 0.1)


@dataclass
class LdmArguments:
    """Which weights train."""

    trainable: str = option(
        "attention blocks (DP-LDM) or the whole denoiser (DP-Diffusion)",
        "attention",
        choices=["attention", "all"],
    )
    trainable_blocks: list[str] | None = option(
        "only within these parts, such as down_blocks.1 or mid_block; default: everywhere", None
    )
    train_text_encoder: bool = option(
        "train the conditioning too: a LoRA on the text encoder, under the same clip", False
    )
    text_encoder_rank: int = option("rank of the LoRA on the text encoder", 4)


@dataclass
class StageArguments(WarmStartArguments):
    """What to build on: a warm start; a selection (DP-SAPF)."""

    saliency_file: str | None = option(
        "saliency.json of select_saliency.py: train what it selected; its cost is composed, and "
        "--target_epsilon is for both; its ledger is used unless --privacy_ledger names another",
        None,
    )


@dataclass
class BothStagesArguments(StageArguments):
    """What to build on, or to do first: a warm start; a selection (DP-SAPF)."""

    release_means: bool = option(
        "first release noisy means into OUTPUT_DIR/means, within the same budget, and start from "
        "images that match them",
        False,
    )
    select_saliency: bool = option(
        "first select what to train, into OUTPUT_DIR/selection, within the same budget", False
    )

    def __post_init__(self):
        super().__post_init__()
        if self.release_means and self.warm_start is not None:
            raise UsageError("give --release_means or --warm_start, not both")
        if self.select_saliency and self.saliency_file is not None:
            raise UsageError("give --select_saliency or --saliency_file, not both")


@dataclass
class SaliencyArguments:
    """How matrices are scored and kept (DP-SAPF)."""

    mechanism: str = option(
        "what a unit gives a matrix: the squared norm of its clipped gradient; a vote if it is "
        "among the unit's largest; the squared norms summed over a layer, which is kept whole; or "
        "nothing (random costs no privacy)",
        "squared_norm",
        choices=MECHANISMS,
    )
    scope: str = option("which matrices are candidates", "all", choices=SCOPES)
    normalise: str = option(
        "rank by the noisy score, or by the noisy score for each weight of the matrix",
        "none",
        choices=["none", "per_parameter"],
    )
    top_ratio: str = option(
        "share of the candidates to keep; auto: chosen from the noisy scores and the training plan",
        "0.3",
    )
    top_count: int | None = option("how many candidates to keep, instead of a share", None)
    top_mass: float | None = option(
        "keep as many as hold this share of the noisy score, instead", None
    )
    votes: int | None = option("votes of a unit; default: as many as are kept", None)
    sampling_rate: float = option("probability that a unit is in the one batch of selection", 1.0)
    selection_clip: float = option("bound on a unit's gradient over all candidates together", 1.0)
    selection_noise_multiplier: float | None = option("sigma of the selection", None)
    selection_epsilon: float | None = option("epsilon of the selection, instead", None)
    selection_share: float = option(
        "share of --target_epsilon for the selection, if neither is given", 0.05
    )

    def __post_init__(self):
        if not 0 < self.sampling_rate <= 1:
            raise UsageError(f"--sampling_rate {self.sampling_rate} must be in (0, 1]")
        if not 0 < self.selection_share < 1:
            raise UsageError(f"--selection_share {self.selection_share} must be in (0, 1)")
        if not 1e-100 < self.selection_clip < 1e100:
            raise UsageError(f"--selection_clip {self.selection_clip} must be positive and finite")
        sigma, epsilon = self.selection_noise_multiplier, self.selection_epsilon
        if sigma is not None and epsilon is not None:
            raise UsageError("give --selection_epsilon or --selection_noise_multiplier, not both")
        if sigma is not None and not SMALLEST_NOISE <= sigma <= LARGEST_NOISE:
            raise UsageError(
                f"--selection_noise_multiplier {sigma} must be between {SMALLEST_NOISE} and "
                f"{LARGEST_NOISE:g}"
            )
        if self.top_count is not None and self.top_count < 1:
            raise UsageError(f"--top_count {self.top_count} must be at least 1")
        if self.votes is not None and self.votes < 1:
            raise UsageError(f"--votes {self.votes} must be at least 1")
        if self.top_mass is not None and not 0 < self.top_mass <= 1:
            raise UsageError(f"--top_mass {self.top_mass} must be in (0, 1]")
        if self.top_count is not None and self.top_mass is not None:
            raise UsageError("give --top_count or --top_mass, not both")
        if self.top_ratio != "auto":
            try:
                good = 0 < float(self.top_ratio) <= 1
            except ValueError:
                good = False
            if not good:
                raise UsageError(f"--top_ratio {self.top_ratio} must be auto or in (0, 1]")


# What one training script or another takes beside SHARED.
OF_TRAINING = (
    *(LoraArguments, LoDAArguments, LdmArguments),
    *(BothStagesArguments, SaliencyArguments, MeansArguments),
)


def refuse_of_training(
    what: str, privacy: PrivacyArguments, training: TrainingArguments, budget: str | None = None
) -> None:
    """Refuse what only a training run heeds, and what decides there how much is spent.

    Args:
        what: the stage that would ignore it. budget: the option that it takes in place of
            --noise_multiplier; None if it heeds that.

    Raises:
        UsageError: such an option was given.
    """
    if training.publish_now:
        raise UsageError(f"--publish_now ends a training run: {what} is done whole, or not at all")
    if privacy.replay_audit:
        raise UsageError(f"--replay_audit replays training steps: {what} takes none")
    if budget is not None and privacy.noise_multiplier is not None:
        raise UsageError(f"--noise_multiplier is of training: {what} takes {budget}")
