"""Plans that train: what was not asked for, chosen from public facts alone.

A unit contributes at most C to a sum, so the mean of B units is at most C long, and the noise on it
is sigma C sqrt(P) / B long over P weights. After T steps the noise has been averaged to
sigma sqrt(P) / (B sqrt(T)) of the largest signal (`noise_to_signal`). That is least where every
unit is in every step, and then the same for any T: T steps of the Gaussian mechanism are one with
a sigma that is sqrt(T) smaller. All choices below follow from that one number (`least_noise`).
docs/tuning.md says how they were found, and how well they do.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.errors import UsageError
from utils.privacy.accounting import calibrate_noise_multiplier

PASSES = 8  # over the private set, if no unit were drawn twice
FEWEST_STEPS, MOST_STEPS = 8, 128
STEPS_WITHOUT_BUDGET = 100  # if sigma is given, and not epsilon
ALIGNED = 0.15  # of the largest signal, what units that are scaled alike have in common
NOISE_PER_DRAW, MOST_DRAWS = 0.018, 16
ADAPTER_RATE, WEIGHTS_RATE = 0.04, 0.014  # over all steps, where layers are `WIDTH` wide
WIDTH = 128
AFTER_WARM_START = 0.2


@dataclass(frozen=True)
class PublicFacts:
    """What the choice depends on.

    Attributes:
        num_units: N. num_parameters: P, trained.
        width: median of the longer side of the trained matrices.
        rate: how far all steps together may move a weight, at `WIDTH`: `ADAPTER_RATE`, or
            `WEIGHTS_RATE` for weights of the model itself.
        has_warm_start: the weights start where synthetic images have brought them.
    """

    num_units: int
    num_parameters: int
    width: float
    rate: float
    has_warm_start: bool = False


def median_width(shapes: Iterable[Sequence[int]]) -> float:
    """`PublicFacts.width` of weights of these shapes; vectors do not count, unless there is nothing
    else."""
    shapes = list(shapes)
    matrices = [max(shape[:2]) for shape in shapes if len(shape) > 1]
    return median(matrices or [shape[0] for shape in shapes])


def noise_to_signal(num_parameters: int, noise: float, batch: float, steps: int = 1) -> float:
    """Length of the noise on the mean over B units, averaged over T steps, in units of C, which is
    the largest that a signal can be: sigma sqrt(P) / (B sqrt(T))."""
    return noise * math.sqrt(num_parameters / steps) / batch


def least_noise(facts: PublicFacts, epsilon: float, delta: float) -> float:
    """What `noise_to_signal` is at least for a budget, whatever the batch and the steps.

    Raises:
        UsageError: see `calibrate_noise_multiplier`.
    """
    sigma = calibrate_noise_multiplier(epsilon, delta, 1.0, 1)
    return noise_to_signal(facts.num_parameters, sigma, facts.num_units)


def choose_missing(
    privacy: PrivacyArguments, training: TrainingArguments, facts: PublicFacts
) -> tuple[PrivacyArguments, TrainingArguments, list[str]]:
    """The arguments with steps, B, K and the rate filled in where they are not given, B at most N;
    and why, a sentence for each.

    Raises:
        UsageError: delta is missing, or not positive.
    """
    steps, batch = training.max_train_steps, privacy.expected_batch_size
    draws, rate = privacy.noise_multiplicity, training.learning_rate
    units, reasons = facts.num_units, []
    noise = _read_noise(privacy, facts)
    if steps is None:
        steps = _choose_steps(noise)
        why = "for noise that is --noise_multiplier, whatever is averaged"
        if noise is not None:
            why = f"the noise of the whole run is at least {noise:.2g} of the largest signal"
        reasons.append(f"--max_train_steps {steps}: {why}")
    if batch is None:
        batch = min(units, max(1, round(PASSES * units / steps)))
        everyone = "every unit in every step" if batch == units else f"{PASSES} passes in all"
        reasons.append(f"--expected_batch_size {batch}: {everyone}")
    elif batch > units:
        reasons.append(f"--expected_batch_size {units}: all that there are, not {batch:g}")
        batch = units
    if draws is None:
        if noise is None and min(privacy.noise_multiplier or 0, batch) > 0:
            noise = noise_to_signal(facts.num_parameters, privacy.noise_multiplier, batch, steps)
        draws = _choose_draws(noise)
        why = "more draws steady a unit's gradient" if draws > 1 else "other units do the averaging"
        reasons.append(f"--noise_multiplicity {draws}: {why}")
    if rate is None:
        rate = facts.rate * math.sqrt(WIDTH / facts.width / steps)
        rate *= AFTER_WARM_START if facts.has_warm_start else 1
        rate = float(f"{rate:.2g}")
        after = ", less after a warm start" if facts.has_warm_start else ""
        reasons.append(f"--learning_rate {rate:g}: for {steps} noisy steps{after}")
    privacy = replace(privacy, expected_batch_size=batch, noise_multiplicity=draws)
    return privacy, replace(training, max_train_steps=steps, learning_rate=rate), reasons


def _read_noise(privacy: PrivacyArguments, facts: PublicFacts) -> float | None:
    if privacy.target_epsilon is None or privacy.noise_multiplier is not None:
        return None  # sigma is given; both are refused with the plan
    if privacy.target_delta is None or not 0 < privacy.target_delta < 1:
        raise UsageError(f"give --target_delta, below 1/N = {1 / facts.num_units:.3g}")
    return least_noise(facts, privacy.target_epsilon, privacy.target_delta)


def _choose_steps(noise: float | None) -> int:
    """More steps than it takes until the noise is as long as the signal add nothing."""
    if noise is None:
        return STEPS_WITHOUT_BUDGET
    return round(min(max((ALIGNED / noise) ** 2, FEWEST_STEPS), MOST_STEPS))


def _choose_draws(noise: float | None) -> int:
    """A power of two: with little noise, draws are better spent on other units. One if nobody can
    tell: no budget was named, or one that the plan will refuse."""
    if noise is None or not 0 < noise < math.inf:
        return 1
    return min(max(1, 2 ** round(math.log2(noise / NOISE_PER_DRAW))), MOST_DRAWS)
