"""What a run will spend: the plan, its calibration, two accountants, and the public statement.

The unit of privacy is one row (its image and caption), or all rows that share a value of
`--privacy_unit_column`. The number of units N is public. Epsilon is for adding or removing one
unit, and also given for replacing one.
"""

import math
from dataclasses import asdict, dataclass
from importlib.metadata import version

import dp_accounting
import numpy as np
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from utils.arguments import PrivacyArguments
from utils.errors import UsageError
from utils.replace_one import ReplaceOnePRVAccountant

ADD_OR_REMOVE_ONE = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE
REPLACE_ONE = dp_accounting.NeighboringRelation.REPLACE_ONE
SMALLEST_NOISE, LARGEST_NOISE = 0.2, 1e4  # noise multipliers that calibration looks at
PLD_INTERVAL = 1e-3  # discretisation of the privacy loss; PLD rounds it up, never down
PRV_EPSILON_ERROR = 0.01


@dataclass(frozen=True)
class PrivacyPlan:
    """Everything that the privacy of a training run depends on; all of it is public.

    Attributes:
        num_units: N.
        expected_batch_size: B, the mean of the Poisson batch size; q = B / N.
        steps: logical steps, empty batches included.
        noise_multiplier: sigma; the noise on the sum has standard deviation sigma * C.
        max_grad_norm: C, the bound on one unit's gradient (in a selection, on its scores).
        noise_multiplicity: K, draws averaged within a unit before its one clip.
        delta: the delta at which epsilon is quoted.
        clipping: how a unit's gradient is bounded (`dp_sgd.clip_scales`).
        unit_column: the column whose value tells units apart; None if each row is a unit.
        purpose: what the mechanism is for: `training`, `selection`, or `mean embedding`.
        prior: events of the ledger that this one builds on, and composes with.
        builds_on: the runs of those events.
    """

    num_units: int
    expected_batch_size: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    noise_multiplicity: int
    delta: float
    clipping: str = "flat"
    unit_column: str | None = None
    purpose: str = "training"
    prior: tuple[dict, ...] = ()
    builds_on: tuple[str, ...] = ()

    @property
    def unit_name(self) -> str:
        """What is protected, in words."""
        return "image" if self.unit_column is None else f"all images of one {self.unit_column}"

    @property
    def sampling_rate(self) -> float:
        return self.expected_batch_size / self.num_units

    @property
    def sensitivity(self) -> float:
        """How far adding or removing one unit can move the clipped sum (l2).

        C in every clipping mode: `dp_sgd.clip_scales` bounds a unit's whole gradient by it.
        """
        return self.max_grad_norm

    @property
    def noise_std(self) -> float:
        return self.noise_multiplier * self.sensitivity

    def event(self, steps: int | None = None) -> dict:
        """The mechanism as an entry of `events` in the privacy statement."""
        bound = {"clipping": self.clipping, "max_grad_norm": self.max_grad_norm}
        if self.purpose != "training":
            bound = {"sensitivity": self.sensitivity}
        return {
            "mechanism": "poisson_subsampled_gaussian",
            "purpose": self.purpose,
            "noise_multiplier": self.noise_multiplier,
            "sampling_rate": self.sampling_rate,
            "steps": self.steps if steps is None else steps,
            **bound,
            "noise_multiplicity": self.noise_multiplicity,
        }

    def events(self, steps: int | None = None) -> list[dict]:
        """This mechanism after those that it builds on."""
        return [*self.prior, self.event(steps)]

    def terms(self, is_private: bool) -> dict:
        """What a ledger records about the plan."""
        return {
            "event": self.event(),
            "delta": self.delta,
            "num_units": self.num_units,
            "privacy_unit": self.unit_name,
            "private": is_private,
            "builds_on": list(self.builds_on),
        }


def make_plan(
    num_units: int,
    privacy: PrivacyArguments,
    steps: int,
    unit_column: str | None = None,
    prior: tuple[dict, ...] = (),
    builds_on: tuple[str, ...] = (),
) -> PrivacyPlan:
    """Check the public parameters, and calibrate sigma to `--target_epsilon` unless it is given.

    The target is for this mechanism and the `prior` ones, composed.

    Raises:
        UsageError: delta >= 1/N, B > N, a budget that no finite noise reaches, neither or both of
            epsilon and sigma, or a number outside its range.
    """
    _check_plan(num_units, privacy, steps)
    sigma = privacy.noise_multiplier
    if sigma is None:
        q = privacy.expected_batch_size / num_units
        sigma = calibrate_noise_multiplier(
            privacy.target_epsilon, privacy.target_delta, q, steps, prior
        )
    return PrivacyPlan(
        num_units=num_units,
        expected_batch_size=privacy.expected_batch_size,
        steps=steps,
        noise_multiplier=sigma,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplicity=privacy.noise_multiplicity,
        delta=privacy.target_delta,
        clipping=privacy.clipping,
        unit_column=unit_column,
        prior=prior,
        builds_on=builds_on,
    )


def _check_plan(num_units: int, privacy: PrivacyArguments, steps: int) -> None:
    delta, batch, sigma = (
        privacy.target_delta,
        privacy.expected_batch_size,
        privacy.noise_multiplier,
    )
    if delta is None:
        raise UsageError(f"give --target_delta, below 1/N = {1 / num_units:.3g}")
    if not 0 < delta < 1 / num_units:
        raise UsageError(
            f"--target_delta {delta:g} must be positive and below 1/N = {1 / num_units:.3g} for "
            f"{num_units} units: at 1/N a mechanism may publish one unit outright"
        )
    if not 0 < batch <= num_units:
        raise UsageError(
            f"--expected_batch_size {batch} must be between 1 and the number of units, {num_units}"
        )
    if steps < 1:
        raise UsageError(f"--max_train_steps {steps} must be at least 1")
    if not 0 < privacy.max_grad_norm < math.inf:
        raise UsageError(f"--max_grad_norm {privacy.max_grad_norm} must be positive and finite")
    if (privacy.target_epsilon is None) == (sigma is None):
        raise UsageError("give exactly one of --target_epsilon and --noise_multiplier")
    if sigma is not None and not SMALLEST_NOISE <= sigma <= LARGEST_NOISE:
        raise UsageError(
            f"--noise_multiplier {sigma} must be between {SMALLEST_NOISE} and {LARGEST_NOISE:g}"
        )


def _dp_event(events: list[dict]) -> dp_accounting.DpEvent:
    composed = []
    for event in events:
        if event["mechanism"] != "poisson_subsampled_gaussian":
            raise UsageError(f"unknown mechanism '{event['mechanism']}'")
        gaussian = dp_accounting.GaussianDpEvent(event["noise_multiplier"])
        sampled = dp_accounting.PoissonSampledDpEvent(event["sampling_rate"], gaussian)
        composed.append(dp_accounting.SelfComposedDpEvent(sampled, event["steps"]))
    return dp_accounting.ComposedDpEvent(composed)


def pld_epsilon(events: list[dict], delta: float, relation=ADD_OR_REMOVE_ONE) -> float:
    """Epsilon of all `events` composed, by privacy loss distributions (Koskela et al. 2020;
    dp-accounting); an upper bound."""
    accountant = PLDAccountant(relation, PLD_INTERVAL)
    return accountant.compose(_dp_event(events)).get_epsilon(delta)


def epsilon_curve(events: list[dict], deltas, relation: str) -> list[float]:
    """The epsilon of `events`, by PLD, at each of `deltas`; `relation` is "add or remove one" or
    "replace one"."""
    accountant = PLDAccountant(
        REPLACE_ONE if relation == "replace one" else ADD_OR_REMOVE_ONE, PLD_INTERVAL
    )
    accountant.compose(_dp_event(events))
    return [accountant.get_epsilon(delta) for delta in deltas]


def prv_epsilon(events: list[dict], delta: float, relation=ADD_OR_REMOVE_ONE) -> float:
    """The same by privacy random variables (Gopi et al. 2021; Opacus)."""
    accountant = PRVAccountant() if relation == ADD_OR_REMOVE_ONE else ReplaceOnePRVAccountant()
    accountant.history = [(e["noise_multiplier"], e["sampling_rate"], e["steps"]) for e in events]
    with np.errstate(divide="ignore"):  # Opacus takes log(1 - q), also where q is 1
        return float(accountant.get_epsilon(delta, eps_error=PRV_EPSILON_ERROR))


def calibrate_noise_multiplier(
    epsilon: float, delta: float, q: float, steps: int, prior: tuple[dict, ...] = ()
) -> float:
    """The smallest sigma (to 1e-4) whose PLD epsilon, composed with the events in `prior`, is at
    most `epsilon`, add or remove one.

    Raises:
        UsageError: epsilon is not positive, or too small for any noise up to `LARGEST_NOISE`.
    """
    if not 0 < epsilon < math.inf:
        raise UsageError(f"--target_epsilon {epsilon} must be positive: no finite noise reaches it")

    def event(sigma: float) -> dp_accounting.DpEvent:
        return _dp_event(
            [
                *prior,
                {
                    "mechanism": "poisson_subsampled_gaussian",
                    "noise_multiplier": sigma,
                    "sampling_rate": q,
                    "steps": steps,
                },
            ]
        )

    def spent(sigma: float) -> float:
        return (
            PLDAccountant(ADD_OR_REMOVE_ONE, PLD_INTERVAL).compose(event(sigma)).get_epsilon(delta)
        )

    if prior and pld_epsilon(list(prior), delta) >= epsilon:
        raise UsageError(
            f"--target_epsilon {epsilon:g} is spent already by what this run builds on, which "
            f"comes to {pld_epsilon(list(prior), delta):.3f} at delta {delta:g}"
        )
    low, high = SMALLEST_NOISE, 1.0
    while spent(high) > epsilon:
        low, high = high, 2 * high
        if high > LARGEST_NOISE:
            raise UsageError(
                f"--target_epsilon {epsilon:g} at delta {delta:g} needs a noise multiplier above "
                f"{LARGEST_NOISE:g}: allow a larger epsilon, or take fewer steps"
            )
    if low == SMALLEST_NOISE and spent(low) <= epsilon:
        return low
    sigma = dp_accounting.calibrate_dp_mechanism(
        lambda: PLDAccountant(ADD_OR_REMOVE_ONE, PLD_INTERVAL),
        event,
        epsilon,
        delta,
        dp_accounting.ExplicitBracketInterval(low, high),
        tol=1e-4,
    )
    return float(sigma)


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
        RuntimeError: PLD and PRV differ by more than their numerical error.
    """
    spent = Spent(
        delta=delta,
        add_or_remove_one=pld_epsilon(events, delta),
        replace_one=pld_epsilon(events, delta, REPLACE_ONE),
        prv=prv_epsilon(events, delta),
        prv_replace_one=prv_epsilon(events, delta, REPLACE_ONE),
    )
    for pld, prv in (
        (spent.add_or_remove_one, spent.prv),
        (spent.replace_one, spent.prv_replace_one),
    ):
        if abs(prv - pld) > 3 * PRV_EPSILON_ERROR + 0.01 * pld:
            raise RuntimeError(f"the accountants disagree: PLD {pld:.4f}, PRV {prv:.4f}")
    return spent


def privacy_statement(
    plan: PrivacyPlan, events: list[dict], spent: Spent, is_private: bool
) -> dict:
    """The public `privacy.json`: everything needed to recompute epsilon with public tools.

    `events` are what the run was charged for, and `spent` what they come to. A run with debug
    (reproducible) noise has no guarantee, and its statement gives no epsilon.
    """
    packages = ["torch", "diffusers", "peft", "accelerate", "dp-accounting", "opacus", "numpy"]
    statement = {
        "schema_version": 1,
        "private": is_private,
        "epsilon": spent.both_relations(),
        "delta": plan.delta,
        "privacy_unit": plan.unit_name,
        "num_units": plan.num_units,
        # Of a unit of many rows any number may be drawn from: the bound is on its gradient.
        "max_rows_per_unit": 1 if plan.unit_column is None else None,
        "events": events,
        "accountants": {
            "pld": {"version": version("dp-accounting"), "epsilon": spent.add_or_remove_one},
            "prv": {"version": version("opacus"), "epsilon": spent.prv},
        },
        "not_covered": [
            "pretraining data",
            "choices made by looking at other private results",
            "the number of units, N",
        ],
        "software": {name: version(name) for name in packages},
        "audit": None,
    }
    if not is_private:
        statement["epsilon"] = {"add_or_remove_one": None, "replace_one": None}
        for accountant in statement["accountants"].values():
            accountant["epsilon"] = None
        statement["warning"] = "NOT PRIVATE: trained with reproducible noise, for debugging only"
    return statement


def plan_summary(plan: PrivacyPlan, spent: Spent) -> dict:
    """The plan and its cost, for `--dry_run` and the log."""
    return asdict(plan) | {"sampling_rate": plan.sampling_rate, "epsilon": asdict(spent)}
