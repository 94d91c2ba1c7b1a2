"""Can a plan work? Its noise against the largest signal that it could find, before it is paid for.

The grades were calibrated on this project's own runs; docs/tuning.md has them.
"""

from dataclasses import dataclass

from utils.privacy.accounting import LARGEST_EPSILON, calibrate_noise_multiplier
from utils.privacy.defaults import noise_to_signal
from utils.privacy.plan import PrivacyPlan

# Noise of the whole run over the largest signal: up to here it learns; up to here it may.
LEARNS, MAY_LEARN = 0.15, 0.6
WILL_LEARN, BORDERLINE, NOISE_WINS = "will learn", "borderline", "noise will win"
FEWEST_KEPT = 50  # one weight in so many: fewer is no adapter any more
HIGHEST_ADVISED = 20  # epsilon that anyone should be advised to take


@dataclass(frozen=True)
class Verdict:
    """What noise leaves of a signal.

    Attributes:
        per_step, in_all: length of the noise, of one step and averaged over all, in units of the
            largest signal (`noise_to_signal`).
        grade: `will learn`, `borderline` or `noise will win`.
        advice: what would help most, a sentence each; none if it will learn.
    """

    per_step: float
    in_all: float
    grade: str
    advice: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{self.grade}: the noise is {self.per_step:.2g} times the largest possible signal in "
            f"a step, {self.in_all:.2g} times over all steps"
        ]
        return "\n  ".join([*lines, *self.advice])


def judge(
    plan: PrivacyPlan, num_parameters: int, epsilon: float, has_warm_start: bool = False
) -> Verdict:
    """What to expect of a plan for `num_parameters` trained weights.

    Args:
        epsilon: of the plan, with what it builds on.
    """
    sigma, batch = plan.noise_multiplier, plan.expected_batch_size
    per_step = noise_to_signal(num_parameters, sigma, batch)
    in_all = noise_to_signal(num_parameters, sigma, batch, plan.steps)
    if in_all <= LEARNS:
        return Verdict(per_step, in_all, WILL_LEARN)
    grade = BORDERLINE if in_all <= MAY_LEARN else NOISE_WINS
    advice = _advise(plan, num_parameters, epsilon, in_all, has_warm_start)
    return Verdict(per_step, in_all, grade, tuple(advice))


def _advise(
    plan: PrivacyPlan, num_parameters: int, epsilon: float, in_all: float, has_warm_start: bool
) -> list[str]:
    """What would bring the noise down, what helps most first; figures are estimates."""
    excess, advice = in_all / LEARNS, []
    if not has_warm_start:
        advice.append(
            "a warm start: --release_means, which one noisy mean pays for, works with far fewer "
            "images, if classes or a few prompts tell them apart and the base draws them badly"
        )
    everyone = plan.num_units
    if plan.expected_batch_size < everyone and epsilon <= LARGEST_EPSILON:
        sigma = calibrate_noise_multiplier(epsilon, plan.delta, 1.0, plan.steps, plan.prior)
        least = noise_to_signal(num_parameters, sigma, everyone, plan.steps)
        if least < 0.9 * in_all:
            advice.append(f"--expected_batch_size {everyone}: {least:.2g} times the signal")
            excess = least / LEARNS
    if excess <= 1:
        return advice
    fewer = int(float(f"{num_parameters / excess**2:.1g}"))
    if fewer * FEWEST_KEPT >= num_parameters:
        advice.append(
            f"fewer weights: about {fewer:,} instead of {num_parameters:,} (--freeze_lora_a, a "
            "smaller --rank, fewer --target_modules, --select_saliency)"
        )
    advice.append(f"more images: about {float(f'{everyone * excess:.2g}'):,.0f} units")
    if epsilon * excess <= HIGHEST_ADVISED:
        advice.append(f"a larger budget: about epsilon {epsilon * excess:.2g}")
    return advice
