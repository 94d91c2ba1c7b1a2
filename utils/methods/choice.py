"""DP-SAPF: which matrices to keep, from noisy scores alone.

Nothing here reads private data: it is all post-processing, which costs nothing.

Shapes: S scored candidates (matrices, or layers of them).
"""

from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from utils.arguments.methods import LoDAArguments, LoraArguments, SaliencyArguments
from utils.methods.saliency import Scoring
from utils.methods.saliency_file import Saliency
from utils.models.families import find_family
from utils.privacy.defaults import PublicFacts, median_width
from utils.privacy.plan import PrivacyPlan

Adapter = LoraArguments | LoDAArguments
USUAL_SHARE = 0.3  # of the candidates, where noisy scores will say how many are kept


@dataclass(frozen=True)
class Keep:
    """What is public and decides what is kept: sizes [S], LoRA weights [S], and the plan."""

    sizes: np.ndarray
    trained: np.ndarray
    plan: PrivacyPlan | None = None

    def choose(self, scores: np.ndarray, args: SaliencyArguments) -> np.ndarray:
        """Indices of what is kept, best first; a function of the noisy scores [S] alone.

        - `--top_ratio`, `--top_count`: the largest.
        - `--top_mass`: the fewest that hold that share of the score; negative ones count as zero.
        - `--top_ratio auto`: see `auto_count`.
        """
        ranked = scores / self.sizes if args.normalise == "per_parameter" else scores
        order = np.argsort(-ranked, kind="stable")
        if args.top_count is not None:
            return order[: args.top_count]
        held = np.cumsum(np.clip(scores, 0, None)[order])
        if args.top_mass is not None:
            return order[: 1 + np.searchsorted(held, args.top_mass * held[-1] * (1 - 1e-12))]
        if args.top_ratio == "auto":
            return order[: self.auto_count(held, self.trained[order])]
        return order[: max(1, round(float(args.top_ratio) * len(order)))]

    def auto_count(self, held: np.ndarray, trained: np.ndarray) -> int:
        """How many of the ranked candidates to keep, by expected progress under noise.

        With a step of the best length along a noisy gradient, a quadratic loss falls in proportion
        to m^2 / (m + v): m the squared norm of the gradient in the trained directions, v the
        variance of the noise on them. Keeping the first k candidates, m is at most the mean squared
        norm that they hold, in units of C^2: the noisy scores' running sum. T steps average the
        noise, so v = (sigma / B)^2 / T for each trained weight. k makes the bound largest.
        """
        noise = (self.plan.noise_multiplier / self.plan.expected_batch_size) ** 2 / self.plan.steps
        signal = np.maximum(held, 1e-12)
        return 1 + int(np.argmax(signal**2 / (signal + noise * np.cumsum(trained))))


def build_keep(candidates: dict[str, nn.Module], scoring: Scoring, lora: LoraArguments) -> Keep:
    """The public sizes of what is scored, and of the LoRA to come."""
    sizes, trained = np.zeros(len(scoring.names)), np.zeros(len(scoring.names))
    for module, group in zip(candidates.values(), scoring.groups, strict=True):
        shape, index = module.weight.shape, scoring.names.index(group)
        sizes[index] += shape.numel()
        trained[index] += count_trained(shape, lora)
    return Keep(sizes, trained)


def list_trained(shape: torch.Size, adapter: Adapter | None) -> list[torch.Size]:
    """The shapes of what trains for a weight of this shape: A, unless it is frozen, and B beside
    it; without an adapter, itself."""
    if adapter is None:
        return [shape]
    a, b = torch.Size([adapter.rank, *shape[1:]]), torch.Size([shape[0], adapter.rank])
    return [b] if getattr(adapter, "freeze_lora_a", False) else [a, b]


def count_trained(shape: torch.Size, adapter: Adapter | None) -> int:
    return sum(part.numel() for part in list_trained(shape, adapter))


def find_facts_before(
    saliency: Saliency, adapter: Adapter | None, pipeline: DiffusionPipeline, facts: PublicFacts
) -> PublicFacts:
    """`facts` of a training, as they were before the selection: the same share of all candidates,
    and whatever else trains.

    A plan by what was selected would be one by the private images: mechanisms compose to what is
    stated if their sizes are fixed beforehand, and else to a little more.

    Args:
        adapter: what trains beside the selected weights; None where they train themselves.
    """
    if saliency.mechanism == "random":
        return facts
    denoiser, asked = find_family(pipeline).denoiser, saliency.settings
    modules = {name: denoiser.get_submodule(name) for name in saliency.candidates}
    shapes = {n: getattr(m, "base_layer", m).weight.shape for n, m in modules.items()}
    counts = {name: count_trained(shape, adapter) for name, shape in shapes.items()}
    outside = facts.num_parameters - sum(counts[name] for name in saliency.selected)
    if asked["top_count"] is not None:
        share = min(1.0, asked["top_count"] / len(set(saliency.scored)))
    elif asked["top_mass"] is not None or asked["top_ratio"] == "auto":
        share = USUAL_SHARE
    else:
        share = float(asked["top_ratio"])
    number = max(1, outside + round(share * sum(counts.values())))
    parts = [part for shape in shapes.values() for part in list_trained(shape, adapter)]
    return replace(facts, num_parameters=number, width=median_width(parts))


def stability(
    scores: np.ndarray, noise_std: float, keep: Keep, args: SaliencyArguments, trials: int = 1000
) -> np.ndarray:
    """How often each candidate would be kept again under the same noise: [S], between 0 and 1.

    Simulated from the noisy scores alone, as if they were the true ones: noise is added to them
    once more. What was kept was partly lucky, so this flatters it: compare with
    `pure_noise_stability`.
    """
    rng = np.random.default_rng(0)
    counts = np.zeros(len(scores))
    for _ in range(trials):
        counts[keep.choose(scores + noise_std * rng.standard_normal(len(scores)), args)] += 1
    return counts / trials


def pure_noise_stability(noise_std: float, keep: Keep, args: SaliencyArguments) -> float:
    """The mean stability of what is kept where all true scores are alike: what luck looks like."""
    scores = noise_std * np.random.default_rng(1).standard_normal(len(keep.sizes))
    return float(stability(scores, noise_std, keep, args)[keep.choose(scores, args)].mean())


def conclude(
    scores: np.ndarray,
    scoring: Scoring,
    keep: Keep,
    args: SaliencyArguments,
    base_model_checksum: int,
    plan: PrivacyPlan | None = None,
) -> Saliency:
    """The selection that follows from noisy scores [S]; without a plan, from random ones."""
    names = scoring.names
    kept = {names[i] for i in keep.choose(scores, args)}
    candidates = list(scoring.candidates)
    saliency = Saliency(
        mechanism=args.mechanism,
        scope=args.scope,
        normalise=args.normalise,
        candidates=candidates,
        scored=list(scoring.groups),
        selected=[c for c, g in zip(candidates, scoring.groups, strict=True) if g in kept],
        base_model_checksum=base_model_checksum,
        settings=asdict(args),
    )
    if plan is None:
        return saliency
    noise_std = plan.noise_std / plan.expected_batch_size
    again = stability(scores, noise_std, keep, args)
    return replace(
        saliency,
        noisy_scores=dict(zip(names, scores.tolist(), strict=True)),
        noise_std=noise_std,
        stability=dict(zip(names, again.tolist(), strict=True)),
        of_pure_noise=pure_noise_stability(noise_std, keep, args),
        event=plan.event(),
    )
