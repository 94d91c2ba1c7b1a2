"""What mechanisms cost: epsilon by two accountants, and the noise that fits a budget.

An event says what a mechanism did, as in `events` of the privacy statement. Epsilon is for adding
or removing one unit, and also given for replacing one.
"""

import copy
import functools
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from dp_accounting.pld.common import DifferentialPrivacyParameters
from dp_accounting.pld.privacy_loss_mechanism import GaussianPrivacyLoss
from scipy.optimize import brentq, minimize_scalar

from utils.arguments.training import LARGEST_NOISE, SMALLEST_NOISE
from utils.errors import UsageError

ADD_OR_REMOVE_ONE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE
PLD_INTERVAL = 1e-3  # discretisation of the privacy loss; PLD rounds it up, never down
NOISE_TOLERANCE = 1e-4
BRACKET = 1.1  # how near a guessed sigma is looked for, at first
PRV_EPSILON_ERROR, PRV_RELATIVE_ERROR = 0.01, 1e-3
# Beyond these, fp64 is too coarse for one of the accountants.
SMALLEST_DELTA, LARGEST_EPSILON = 1e-9, 600.0
# What PLD's Fourier transforms may lose of all probability, a step: each rounds to 2.2e-16. It is
# asked at a delta that is so much smaller; else, of 100,000 steps at 1e-9, it is below the truth.
ROUNDING = 9e-16


Numbers = tuple[tuple[float, float, int], ...]  # noise multiplier, sampling rate, steps; an event


def _list_numbers(events: list[dict]) -> Numbers:
    for event in events:
        if event["mechanism"] != "poisson_subsampled_gaussian":
            raise UsageError(f"unknown mechanism '{event['mechanism']}'")
    return tuple((e["noise_multiplier"], e["sampling_rate"], e["steps"]) for e in events)


def _dp_event(numbers: Numbers) -> dp_accounting.DpEvent:
    composed = []
    for sigma, rate, steps in numbers:
        if rate < 1:
            gaussian = dp_accounting.GaussianDpEvent(sigma)
            sampled = dp_accounting.PoissonSampledDpEvent(rate, gaussian)
            composed.append(dp_accounting.SelfComposedDpEvent(sampled, steps))
    whole = sum(steps / sigma**2 for sigma, rate, steps in numbers if rate == 1)
    if whole:  # Gaussians of everyone are together one, exactly
        composed.append(dp_accounting.GaussianDpEvent(whole**-0.5))
    return dp_accounting.ComposedDpEvent(composed)


def quote(epsilon: float, decimals: int = 3) -> str:
    """An epsilon, or another bound, as it is told: never less than it is."""
    if not math.isfinite(epsilon):
        return "inf"
    units = max(math.ceil(epsilon * 10**decimals - 1e-6), int(epsilon > 0))
    return f"{units / 10**decimals:.{decimals}f}"


def pld_epsilon(events: list[dict], delta: float, relation=ADD_OR_REMOVE_ONE) -> float:
    """Epsilon of all `events` composed, by privacy loss distributions (Koskela et al. 2020;
    dp-accounting); an upper bound from a delta of `SMALLEST_DELTA`, infinite where what the
    accountant rounds is not below delta."""
    return _pld_epsilon(_list_numbers(events), delta, relation)


@functools.lru_cache(maxsize=512)  # a run asks for the same several times, each time for seconds
def _pld_epsilon(numbers: Numbers, delta: float, relation) -> float:
    left = delta - _rounding(numbers)
    return _compose(numbers, relation).get_epsilon(left) if left > 0 else math.inf


def _rounding(numbers: Numbers) -> float:
    return ROUNDING * sum(steps for _, rate, steps in numbers if rate < 1)


@functools.lru_cache(maxsize=16)  # each is megabytes where epsilon is in the hundreds
def _compose(numbers: Numbers, relation) -> PLDAccountant:
    before = copy.deepcopy(_compose_prior(numbers[:-1], relation))
    return before.compose(_dp_event(numbers[-1:]))


@functools.lru_cache(maxsize=4)  # a search for the noise of the last event asks for it each time
def _compose_prior(numbers: Numbers, relation) -> PLDAccountant:
    return PLDAccountant(relation, PLD_INTERVAL).compose(_dp_event(numbers))


def pld_both_relations(events: list[dict], delta: float) -> dict[str, float]:
    """The epsilon of `events`, by PLD, by the name of each relation."""
    return {
        "add_or_remove_one": pld_epsilon(events, delta),
        "replace_one": pld_epsilon(events, delta, REPLACE_ONE),
    }


def split_budget(events: list[dict], delta: float) -> list[float]:
    """What each event adds to the epsilon of those before it; all together, that is epsilon.

    Alone, each would cost more than it adds: privacy composes better than by sums.
    """
    steps = [pld_epsilon(events[: number + 1], delta) for number in range(len(events))]
    return [step - before for before, step in zip([0.0, *steps], steps, strict=False)]


def membership_power(events: list[dict], rates: tuple[float, ...] = (0.01, 0.001)) -> dict:
    """The most that any attacker can achieve who tells from the result of `events` whether a unit
    was in: at each false-positive rate, the true-positive rate; keyed by the rate, as text.

    For every epsilon, TPR <= e^epsilon FPR + delta(epsilon) (Kairouz et al. 2015, theorem 2.1), so
    the smallest of these bounds holds, too. It is convex in e^epsilon.
    """
    numbers = _list_numbers(events)
    accountant, rounding = _compose(numbers, ADD_OR_REMOVE_ONE), _rounding(numbers)

    def bound(epsilon: float, rate: float) -> float:
        return math.exp(epsilon) * rate + accountant.get_delta(epsilon) + rounding

    power = {}
    for rate in rates:
        largest = -math.log(rate)  # beyond it, the bound is above 1
        found = minimize_scalar(bound, bounds=(0.0, largest), args=(rate,), method="bounded")
        power[f"{rate:g}"] = min(1.0, float(found.fun), bound(0.0, rate))
    return power


def prv_error(epsilon: float) -> float:
    """How exactly PRV is asked for an epsilon about as large: to 0.01, or one part in a thousand.

    Its time grows with epsilon / error, to a minute for an epsilon of hundreds at 0.01.
    """
    return max(PRV_EPSILON_ERROR, PRV_RELATIVE_ERROR * epsilon)


def prv_epsilon(
    events: list[dict],
    delta: float,
    relation=ADD_OR_REMOVE_ONE,
    error: float = PRV_EPSILON_ERROR,
) -> float:
    """The same by privacy random variables (Gopi et al. 2021; Opacus); an upper bound, at most
    2 * `error` too large."""
    return _prv_epsilon(_list_numbers(events), delta, relation, error)


@functools.lru_cache(maxsize=512)
def _prv_epsilon(numbers: Numbers, delta: float, relation, error: float) -> float:
    # Opacus takes seconds to import.
    from opacus.accountants import PRVAccountant

    from utils.privacy.replace_one import ReplaceOnePRVAccountant

    accountant = PRVAccountant() if relation == ADD_OR_REMOVE_ONE else ReplaceOnePRVAccountant()
    accountant.history = list(numbers)
    with np.errstate(all="ignore"), warnings.catch_warnings():
        # Opacus takes log(1 - q), also where q is 1, and suggests what its user cannot set.
        warnings.simplefilter("ignore")
        epsilon = float(accountant.get_epsilon(delta, eps_error=error))
    return epsilon if not epsilon < 0 else 0.0  # negative where delta alone covers everything


def calibrate_noise_multiplier(
    epsilon: float, delta: float, q: float, steps: int, prior: tuple[dict, ...] = ()
) -> float:
    """The smallest sigma (to `NOISE_TOLERANCE`) whose PLD epsilon, composed with the events in
    `prior`, is at most `epsilon`, add or remove one.

    Raises:
        UsageError: epsilon is not positive, above `LARGEST_EPSILON`, or too small for any noise up
            to `LARGEST_NOISE`.
    """
    if not 0 < epsilon < math.inf:
        raise UsageError(f"--target_epsilon {epsilon} must be a positive, finite number")
    if epsilon > LARGEST_EPSILON:
        raise UsageError(
            f"--target_epsilon {epsilon:g} is above {LARGEST_EPSILON:g}: it protects nobody, and "
            "is more than the accountants can compute; common budgets are 1 to 10"
        )
    if prior and pld_epsilon(list(prior), delta) >= epsilon:
        raise UsageError(
            f"--target_epsilon {epsilon:g} is spent already by what this run builds on, which "
            f"comes to {quote(pld_epsilon(list(prior), delta))} at delta {delta:g}"
        )
    before = _list_numbers(list(prior))

    def spent(sigma: float) -> float:
        return _pld_epsilon((*before, (sigma, q, steps)), delta, ADD_OR_REMOVE_ONE)

    low, high = _bracket_noise(spent, epsilon, _guess_noise(epsilon, delta, q, steps))
    if spent(high) > epsilon:
        raise UsageError(
            f"--target_epsilon {epsilon:g} at delta {delta:g} needs a noise multiplier above "
            f"{LARGEST_NOISE:g}: allow a larger epsilon, or take fewer steps"
        )
    if low == high:
        return low

    def excess(sigma: float) -> float:
        return math.log(min(max(spent(sigma) / epsilon, 1e-9), 1e9))

    sigma = brentq(excess, low, high, xtol=NOISE_TOLERANCE / 2)
    while spent(sigma) > epsilon:
        sigma += NOISE_TOLERANCE / 2
    return float(sigma)


def _guess_noise(epsilon: float, delta: float, q: float, steps: int) -> float:
    """Sigma in a closed form: exact for q = 1 (Balle and Wang 2018, theorem 8), else by the central
    limit of Bu et al. 2020, which is no bound but comes near."""
    budget = DifferentialPrivacyParameters(epsilon, delta)
    sigma = GaussianPrivacyLoss.from_privacy_guarantee(budget).standard_deviation
    if q == 1:
        return sigma * math.sqrt(steps)
    return 1 / math.sqrt(math.log1p(1 / (sigma * q) ** 2 / steps))


def _bracket_noise(spent: Callable, epsilon: float, guess: float) -> tuple[float, float]:
    """Two sigmas, near the guess, that spend more than epsilon and at most epsilon; the smallest
    there is, twice, if that spends no more, and the largest as the second if all spend more."""
    low = high = min(max(guess, SMALLEST_NOISE), LARGEST_NOISE)
    while high < LARGEST_NOISE and spent(high) > epsilon:
        low, high = high, min(BRACKET * high, LARGEST_NOISE)
    while low == high or spent(low) <= epsilon:
        if high == SMALLEST_NOISE:
            return high, high
        low, high = max(low / BRACKET, SMALLEST_NOISE), low
    return low, high


@dataclass(frozen=True)
class Spent:
    """Epsilon of some events at one delta, by both accountants and under both relations."""

    delta: float
    add_or_remove_one: float
    replace_one: float
    prv: float
    prv_replace_one: float

    def both_relations(self) -> dict:
        return {"add_or_remove_one": self.add_or_remove_one, "replace_one": self.replace_one}


def account(events: list[dict], delta: float) -> Spent:
    """Account for `events` twice.

    Raises:
        UsageError: they come to more than `LARGEST_EPSILON`.
        RuntimeError: PLD and PRV differ by more than their numerical error.
    """
    plds, prvs = [], []
    for relation, what in ((ADD_OR_REMOVE_ONE, "adding or removing"), (REPLACE_ONE, "replacing")):
        pld = pld_epsilon(events, delta, relation)
        if pld > LARGEST_EPSILON:
            raise UsageError(
                f"epsilon comes to {pld:.0f} for {what} one unit, which protects nobody and is "
                f"more than the accountants can compute ({LARGEST_EPSILON:g}): take more noise, "
                "fewer steps or smaller batches"
            )
        prv = prv_epsilon(events, delta, relation, prv_error(pld))
        if not abs(prv - pld) <= 3 * PRV_EPSILON_ERROR + 0.01 * pld:  # also where one is NaN
            raise RuntimeError(f"the accountants disagree: PLD {pld:.4f}, PRV {prv:.4f}")
        plds.append(pld)
        prvs.append(prv)
    return Spent(delta, *plds, *prvs)
