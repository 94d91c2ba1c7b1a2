"""DP-SAPF's first stage: the scores that private units give to weight matrices.

Each privacy unit gives every candidate matrix a score of at least zero; the scores of a unit, as a
vector over the candidates, have an l2 norm of at most the sensitivity, which is what adding or
removing the unit can move their sum by. One noisy release of the sum is one step of the Poisson
sampled Gaussian mechanism, so it uses the plan, the sampler, the noise and the ledger of training.
What is kept is chosen from the noisy scores alone (`choice`).

Shapes: U units, L candidates. Source: Gong et al. 2026 (DP-SAPF).
"""

from dataclasses import dataclass
from functools import partial

import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from torch import nn
from tqdm import tqdm

from utils.arguments.methods import SaliencyArguments
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.families import find_family
from utils.privacy.training import UnitLosses, reduce_micro_batches, split_units

# What models call an attention or a feed-forward layer.
LAYERS = ("attn", "attn1", "attn2", "attention", "ff", "ff_context", "feed_forward")
# A squared norm that stands for none: the engine adds at most this much for rounding.
NO_GRADIENT = 1e-20


def find_candidates(pipeline: DiffusionPipeline, scope: str) -> dict[str, nn.Module]:
    """The Linear and Conv2d layers whose weights are ranked, by name, from input to output.

    Attention: everything inside the attention blocks, projections and feed-forward included.
    Convolution: all of Conv2d outside them.
    """
    family, found = find_family(pipeline), {}
    for name, module in family.denoiser.named_modules():
        inside = family.is_attention(name)
        if type(module) not in (nn.Linear, nn.Conv2d) or family.packs_rows(name):
            continue
        if getattr(module, "groups", 1) != 1:  # whose gradients by unit are not known
            continue
        if scope == "all" or (inside if scope == "attention" else type(module) is nn.Conv2d):
            if scope != "convolution" or not inside:
                found[name] = module
    return found


def find_layer(name: str) -> str:
    """The layer that a matrix belongs to: its attention, feed-forward, ResNet block or itself."""
    parts = name.split(".")
    for marker in LAYERS:
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
            return votes * (squared_norms.sum(1) > NO_GRADIENT)[:, None]
        total = squared_norms.sum(1, keepdim=True).clamp_min(self.clip**2)
        parts = squared_norms / total * (1 - 1e-9)  # so that rounding cannot lift the sum above 1
        index = torch.tensor([self.names.index(group) for group in self.groups])
        merged = torch.zeros(len(parts), len(self.names), dtype=parts.dtype)
        return merged.index_add(1, index, parts.cpu())


def build_scoring(candidates: list[str], args: SaliencyArguments) -> Scoring:
    """How these candidates are scored.

    Raises:
        UsageError: `--top_ratio auto` with votes, which are not squared norms.
    """
    if args.top_ratio == "auto" and args.mechanism not in ("squared_norm", "layer"):
        raise UsageError("--top_ratio auto reads squared norms: use --mechanism squared_norm")
    whole_layers = args.mechanism == "layer"
    groups = tuple(find_layer(name) if whole_layers else name for name in candidates)
    count = len(set(groups))
    share = 0.3 if args.top_ratio == "auto" else float(args.top_ratio)
    votes = args.votes or args.top_count or max(1, round(share * count))
    return Scoring(
        args.mechanism, tuple(candidates), groups, min(votes, count), args.selection_clip
    )


def sum_scores(
    accelerator: Accelerator,
    engine: PerUnitGradients,
    unit_losses: UnitLosses,
    indices: torch.Tensor,
    scoring: Scoring,
    micro_batch_size: int,
    show_progress: bool = False,
) -> torch.Tensor:
    """Sum over `indices` of each unit's scores: [S], fp64. PRIVATE until noise is added.

    No gradient is kept: each is measured as the backward pass makes it. The length of a bar gives
    away how many units there are: show it only if that is public.
    """
    micro_batches = split_units(indices, micro_batch_size)
    total = torch.zeros(len(scoring.names), dtype=torch.float64)
    parts = reduce_micro_batches(
        accelerator,
        partial(engine.recording, norms_only=True),
        unit_losses,
        micro_batches,
        lambda record: scoring.scores(record.squared_norms()).sum(0).cpu(),
    )
    for part in tqdm(parts, "scoring", total=len(micro_batches), disable=not show_progress):
        total += part
    return total
