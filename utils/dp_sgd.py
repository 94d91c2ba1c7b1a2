"""The pieces of DP-SGD (Abadi et al. 2016, Algorithm 1): Poisson sampling, clipping, noise."""

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast

from utils.accounting import PrivacyPlan
from utils.entropy import SecretRandomness


def draw_poisson_batch(
    plan: PrivacyPlan, randomness: SecretRandomness, accelerator: Accelerator
) -> torch.Tensor:
    """Indices of the units in this step, the same on every process; may be empty.

    Each of the N units is in independently with probability q = B / N. The main process draws, and
    the others are told: draws of their own would be another mechanism than the one accounted for.
    """
    drawn = randomness.bernoulli(plan.sampling_rate, plan.num_units)
    drawn = broadcast(drawn.to(accelerator.device, torch.uint8), from_process=0)
    return drawn.nonzero().flatten().cpu()


def clipped_sum(rows: torch.Tensor, plan: PrivacyPlan) -> torch.Tensor:
    """Bound each unit's gradient and add them up: [U, P] -> [P], changing `rows` in place.

    Flat clipping: row u is scaled by min(1, C / ||row u||). A row with a value that is not finite,
    or whose norm overflows, counts as zero: its owner's gradient is lost, everyone else's is kept.
    Adding or removing one unit moves the sum by at most C = `plan.sensitivity`.
    """
    norms = rows.norm(dim=1)
    usable = norms.isfinite()
    rows[~usable] = 0.0
    # One part in a million under C, so that rounding the products cannot lift a row above it.
    bound = plan.max_grad_norm * (1 - 1e-6)
    scale = (bound / norms.clamp_min(bound)).where(usable, torch.zeros_like(norms))
    return scale @ rows


def add_noise_once(
    total: torch.Tensor, plan: PrivacyPlan, randomness: SecretRandomness, accelerator: Accelerator
) -> torch.Tensor:
    """Add every process's clipped sums [P], then N(0, (sigma * C)^2) once, then divide by B.

    B is the public expected batch size, never the number of units that were drawn.
    """
    total = accelerator.reduce(total, reduction="sum")
    if accelerator.is_main_process:
        total = total + plan.noise_std * randomness.normal(total.shape).to(total.device)
    return broadcast(total, from_process=0) / plan.expected_batch_size
