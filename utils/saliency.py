"""DP-SAPF's first stage: which weight matrices matter, told with differential privacy.

Each privacy unit gives every candidate matrix a score of at least zero; the scores of a unit, as a
vector over the candidates, have an l2 norm of at most the sensitivity, which is what adding or
removing the unit can move their sum by. One noisy release of the sum is one step of the Poisson
sampled Gaussian mechanism, so it uses the plan, the sampler, the noise and the ledger of training.
What is kept is chosen from the noisy scores alone (`utils/selection.py`).

Shapes: U units, L candidates. Source: Gong et al. 2026 (DP-SAPF).
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import nn
from tqdm import tqdm

from utils.accounting import LARGEST_NOISE, SMALLEST_NOISE
from utils.arguments import option
from utils.errors import UsageError
from utils.per_unit_gradients import PerUnitGradients
from utils.training import UnitLosses

MECHANISMS = ["squared_norm", "voting", "layer", "random"]
SCOPES = ["attention", "convolution", "all"]


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
    selection_epsilon: float | None = option("or the budget of the selection", None)
    selection_share: float = option(
        "or the selection's share of --target_epsilon, if neither is given", 0.05
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


def candidates_of(unet: UNet2DConditionModel, scope: str) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers whose weights are ranked, by name, from input to output.

    Attention: everything inside the attention blocks, projections and feed-forward included.
    Convolution: all of Conv2d outside them.
    """
    found = {}
    for name, module in unet.named_modules():
        inside = ".attentions." in name
        if type(module) not in (nn.Linear, nn.Conv2d):
            continue
        if scope == "all" or (inside if scope == "attention" else type(module) is nn.Conv2d):
            if scope != "convolution" or not inside:
                found[name] = module
    return found


def layer_of(name: str) -> str:
    """The layer that a matrix belongs to: its attention, feed-forward, ResNet block or itself."""
    parts = name.split(".")
    for marker in ("attn1", "attn2", "ff"):
        if marker in parts:
            return ".".join(parts[: parts.index(marker) + 1])
    if "resnets" in parts:
        return ".".join(parts[: parts.index("resnets") + 2])
    return name


@dataclass(frozen=True)
class Scoring:
    """How a unit's squared gradient norms become its scores.

    Attributes:
        mechanism: see `SaliencyArguments`. candidates: [L], names. groups: [L], what each is
            scored as.
        votes: of one unit. clip: bound on a unit's gradient over all candidates.
    """

    mechanism: str
    candidates: tuple[str, ...]
    groups: tuple[str, ...]
    votes: int
    clip: float

    @property
    def names(self) -> list[str]:
        """What is scored, in order: [S]."""
        return list(dict.fromkeys(self.groups))

    @property
    def sensitivity(self) -> float:
        """How far adding or removing one unit can move the sum of scores (l2).

        A unit's gradient is clipped to norm C over all candidates together and measured in units of
        C, so its squared norms are at least 0 and add up to at most 1; so do their sums over
        layers, and the l2 norm of such a vector is at most 1. Votes are 0 or 1, and k of them 1.
        """
        return self.votes**0.5 if self.mechanism == "voting" else 1.0

    def scores(self, squared_norms: torch.Tensor) -> torch.Tensor:
        """Each unit's scores: [U, L] -> [U, S]. A unit whose gradient is not finite gives none."""
        squared_norms = squared_norms.double()
        usable = squared_norms.sum(1).isfinite()
        squared_norms = squared_norms.masked_fill(~usable[:, None], 0.0)
        if self.mechanism == "voting":
            chosen = squared_norms.topk(self.votes, dim=1).indices
            votes = torch.zeros_like(squared_norms).scatter(1, chosen, 1.0)
            return votes * (squared_norms.sum(1) > 0)[:, None]
        total = squared_norms.sum(1, keepdim=True).clamp_min(self.clip**2)
        parts = squared_norms / total * (1 - 1e-9)  # so that rounding cannot lift the sum above 1
        index = torch.tensor([self.names.index(group) for group in self.groups])
        merged = torch.zeros(len(parts), len(self.names), dtype=parts.dtype)
        return merged.index_add(1, index, parts.cpu())


def scoring_of(candidates: list[str], args: SaliencyArguments) -> Scoring:
    """How these candidates are scored.

    Raises:
        UsageError: `--top_ratio auto` with votes, which are not squared norms.
    """
    if args.top_ratio == "auto" and args.mechanism not in ("squared_norm", "layer"):
        raise UsageError("--top_ratio auto reads squared norms: use --mechanism squared_norm")
    whole_layers = args.mechanism == "layer"
    groups = tuple(layer_of(name) if whole_layers else name for name in candidates)
    count = len(set(groups))
    share = 0.3 if args.top_ratio == "auto" else float(args.top_ratio)
    votes = args.votes or args.top_count or max(1, round(share * count))
    return Scoring(
        args.mechanism, tuple(candidates), groups, min(votes, count), args.selection_clip
    )


def summed_scores(
    accelerator: Accelerator,
    engine: PerUnitGradients,
    unit_losses: UnitLosses,
    indices: torch.Tensor,
    scoring: Scoring,
    micro_batch_size: int,
    show_progress: bool = False,
) -> torch.Tensor:
    """Sum over `indices` of each unit's scores: [S], fp64. PRIVATE until noise is added.

    No gradient is kept: each is measured as the backward pass makes it. The length of a bar tells
    how many units there are: show it only if that is public.
    """
    total = torch.zeros(len(scoring.names), dtype=torch.float64)
    parts = indices.split(micro_batch_size) if len(indices) else []
    for units in tqdm(parts, "scoring", disable=not show_progress):
        with engine.recording(len(units), norms_only=True) as record:
            with accelerator.autocast():
                losses = unit_losses(units)
            losses.sum().backward()
        total += scoring.scores(record.squared_norms()).sum(0).cpu()
    return total
