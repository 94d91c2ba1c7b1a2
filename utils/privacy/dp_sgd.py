"""The pieces of DP-SGD (Abadi et al. 2016, Algorithm 1): Poisson sampling, clipping, noise."""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from utils.gradients.recording import Recording
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness

SMALLEST_SCALE = 2.0**-100
NO_NORM = 1e-8  # of a gradient that automatic clipping halves; those of large models are 1e-3


def sample_poisson_batch(
    plan: PrivacyPlan, randomness: SecretRandomness, accelerator: Accelerator
) -> torch.Tensor:
    """Indices of the units in this step, the same on every process; may be empty.

    Each of the N units is in independently with probability q = B / N. The main process samples for
    all: if each sampled by itself, that would be another mechanism than the one accounted for.
    """
    sampled = randomness.bernoulli(plan.sampling_rate, plan.num_units)
    sampled = broadcast(sampled.to(accelerator.device, torch.uint8), from_process=0)
    return sampled.nonzero().flatten().cpu()


def clipped_sum(record: Recording, plan: PrivacyPlan) -> torch.Tensor:
    """Bound each unit's gradient and add them up: [P].

    A unit whose gradient is not finite, or is beyond all bounds, counts as zero; all other units
    are kept. Adding or removing one unit moves the sum by at most `plan.sensitivity`.
    """
    squared_norms = record.squared_norms()
    unusable = ~squared_norms.sum(1).isfinite()
    if unusable.any():
        record.drop(unusable)
        squared_norms = squared_norms.masked_fill(unusable[:, None], 0.0)
    scales = clip_scales(squared_norms, plan)
    # Below that, fp32 rounds a scale by more than the bound allows.
    return record.weighted_sum(scales.masked_fill(scales < SMALLEST_SCALE, 0.0))


def clip_scales(squared_norms: torch.Tensor, plan: PrivacyPlan) -> torch.Tensor:
    """What to multiply each unit's gradient of each tensor by: [U, L] -> [U, L].

    Whatever the mode, the scaled gradient of a unit has norm at most C over all its tensors:

    - flat: min(1, C / norm) (Abadi et al. 2016, Algorithm 1).
    - automatic: C / (norm + 1e-8), so that every unit counts alike, however small its gradient:
      C norm / (norm + 1e-8) < C, and 0.99 C at a norm of 1e-6 (Bu et al. 2023, section 4, whose
      constant of 0.01 would swallow the gradients of a large model).
    - per_layer: each of the L tensors to min(1, (C / sqrt(L)) / norm of that tensor).
    """
    # One part in a million under C, so that rounding the products cannot lift a row above it.
    bound = plan.max_grad_norm * (1 - 1e-6)
    if plan.clipping == "per_layer":
        share = bound / squared_norms.shape[1] ** 0.5
        return share / squared_norms.sqrt().clamp_min(share)
    norms = squared_norms.sum(1, keepdim=True).sqrt()
    if plan.clipping == "automatic":
        scales = bound / (norms + NO_NORM)
    else:
        scales = bound / norms.clamp_min(bound)
    return scales.expand_as(squared_norms)


def add_noise_once(
    total: torch.Tensor, plan: PrivacyPlan, randomness: SecretRandomness, accelerator: Accelerator
) -> torch.Tensor:
    """Add every process's clipped sums [P], then N(0, (sigma * C)^2) once, then divide by B.

    B is the public expected batch size, never the number of units that were sampled.
    """
    total = accelerator.reduce(total, reduction="sum")
    if accelerator.is_main_process:
        noise = plan.noise_std * randomness.noise(total.shape).to(total.device)
        total = total + noise  # at the precision of the noise
    # Rounded on every process: what is broadcast must have one type.
    return broadcast(total.float(), from_process=0) / plan.expected_batch_size
