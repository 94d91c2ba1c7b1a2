"""What an attack's guesses prove about epsilon: privacy auditing in one training run.

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run". Each of m canaries
is put into the training set or left out by a fair coin. The auditor sees what training released,
scores every canary, and says of the r highest-scoring ones that they were in. Were the training
(epsilon, delta)-private, so many right guesses would be too unlikely.

Here are the attacker's scores, the bound that guesses prove, and a plot of the findings.
"""

from pathlib import Path

import matplotlib
import numpy as np
from scipy.optimize import brentq
from scipy.stats import binom

LARGEST_BOUND = 50.0


def chance_of_guesses(right: int, guesses: int, num_canaries: int, epsilon: float, delta: float):
    """A bound on the chance of at least `right` right guesses out of `guesses`, if training were
    (epsilon, delta)-private for adding or removing one canary.

    Source: theorem 5.2 of the paper. Without delta each guess is right with probability at most
    e^epsilon / (1 + e^epsilon), so the count is at most binomial; delta adds 2 * m * delta times
    the largest mean, over i, of the binomial's mass on the i counts below `right`.
    """
    accuracy = 1 / (1 + np.exp(-epsilon))
    tail = binom.sf(right - 1, guesses, accuracy)
    below = np.arange(1, right + 1)
    mass = np.cumsum(binom.pmf(right - below, guesses, accuracy))
    steepest = (mass / below).max() if right else 0.0
    return min(1.0, tail + 2 * num_canaries * delta * steepest)


def epsilon_lower_bound(
    right: int, guesses: int, num_canaries: int, delta: float, confidence: float
) -> float:
    """The largest epsilon that the guesses refute: training is not (less than this, delta)-private.

    Zero if they refute nothing. True with probability at least `confidence` over the run.
    """

    def excess(epsilon: float) -> float:
        chance = chance_of_guesses(right, guesses, num_canaries, epsilon, delta)
        return chance - (1 - confidence)

    if excess(0.0) > 0:
        return 0.0
    if excess(LARGEST_BOUND) <= 0:
        return LARGEST_BOUND
    return float(brentq(excess, 0.0, LARGEST_BOUND))


def measure(
    scores: dict[str, np.ndarray],
    included: np.ndarray,
    guesses: int,
    delta: float,
    confidence: float,
) -> dict:
    """Guess by each score [m], and keep the one that proves most.

    The chance of error is shared between the scores, so the best of them holds with `confidence`.
    """
    findings = []
    for name, values in scores.items():
        order = np.argsort(-values, kind="stable")
        right = int(included[order[:guesses]].sum())
        level = 1 - (1 - confidence) / len(scores)
        bound = epsilon_lower_bound(right, guesses, len(included), delta, level)
        findings.append(
            {
                "lower_bound": bound,
                "right": right,
                "guesses": guesses,
                "score": name,
                "scores": values,
                "included": included,
                "threshold": values[order[guesses - 1]],
            }
        )
    return max(findings, key=lambda finding: finding["lower_bound"])


def log_likelihood_ratio(seen: np.ndarray, sampling_rate: float, sigma: float) -> np.ndarray:
    """The best score, if training does what it says: in against out. [steps, m] -> [m].

    Args:
        seen: each step's noisy sum along each canary's direction, in units of the clipping bound:
            N(0, sigma^2), plus 1 if the canary was in the batch.
    """
    ratio = np.minimum((2 * seen - 1) / (2 * sigma**2), 500.0)
    return np.log1p(sampling_rate * np.expm1(ratio)).sum(0)


def spread(seen: np.ndarray) -> np.ndarray:
    """A score for noise that repeats itself: what changes between steps is then the canary. [m]."""
    return seen.max(0) - seen.min(0)


def plot_findings(findings: list[dict], path: Path) -> None:
    """The scores of canaries that were in and out, one panel a run, and where guessing started."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        len(findings), 1, figsize=(7, 2.2 * len(findings)), squeeze=False, layout="constrained"
    )
    for f, axis in zip(findings, axes[:, 0], strict=True):
        low, high = np.quantile(f["scores"], [0.001, 0.999])
        bins = np.linspace(low, high + 1e-9, 80)
        for value, label in ((False, "out"), (True, "in")):
            scores = f["scores"][f["included"] == value].clip(low, high)
            axis.hist(scores, bins, alpha=0.5, label=f"canaries that were {label}")
        axis.axvline(min(f["threshold"], high), color="black", lw=1, label="guessed in, from here")
        axis.set_title(
            f"{f['mutant'] or 'the loop as it is'}: reported epsilon {f['reported_epsilon']:.2f}, "
            f"proven at least {f['lower_bound']:.2f}",
            fontsize=9,
        )
        axis.set_yscale("log")
        axis.set_xlabel(f["score"], fontsize=8)
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=110)
