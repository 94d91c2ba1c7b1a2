"""What a run will spend, before it spends it: every number that its privacy depends on.

The unit of privacy is one row (its image and caption), or all rows that share a value of
`--privacy_unit_column`. The number of units N is public.
"""

from dataclasses import asdict, dataclass, replace

from tqdm import tqdm

from utils.arguments.training import LARGEST_NOISE, SMALLEST_NOISE
from utils.errors import UsageError
from utils.privacy.accounting import (
    SMALLEST_DELTA,
    Spent,
    calibrate_noise_multiplier,
    pld_epsilon,
)

LARGEST_BOUND = 1e10


def name_unit(column: str | None) -> str:
    """What is protected, in words: an image, or all that share a value of `column`."""
    return "image" if column is None else f"all images of one {column}"


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """Everything that the privacy of a training run depends on; all of it is public.

    Attributes:
        num_units: N.
        expected_batch_size: B, the mean of the Poisson batch size; q = B / N.
        steps: logical steps, empty batches included.
        noise_multiplier: sigma; the noise on the sum has standard deviation sigma * C.
        max_grad_norm: C, the bound on one unit's gradient (in a selection, on its scores).
        delta: the delta at which epsilon is quoted.
        noise_multiplicity: K, draws averaged within a unit before its one clip.
        clipping: how a unit's gradient is bounded (`dp_sgd.clip_scales`).
        unit_column: the column whose value tells units apart; None if each row is a unit.
        purpose: what the mechanism is for: `training`, `selection`, `means`, `curation` or
            `relabelling`.
        prior: events of the ledger that this one builds on, and composes with.
        builds_on: the runs of those events.
    """

    num_units: int
    expected_batch_size: float
    steps: int
    noise_multiplier: float
    max_grad_norm: float
    delta: float
    noise_multiplicity: int = 1
    clipping: str = "flat"
    unit_column: str | None = None
    purpose: str = "training"
    prior: tuple[dict, ...] = ()
    builds_on: tuple[str, ...] = ()

    @property
    def unit_name(self) -> str:
        """What is protected, in words."""
        return name_unit(self.unit_column)

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

    def bounds(self) -> dict:
        """What each process heeds by itself. The noise is the main one's, which adds it."""
        own = {"noise_multiplier", "prior", "builds_on"}
        return {name: value for name, value in asdict(self).items() if name not in own}

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
    *, target_epsilon: float | None = None, noise_multiplier: float | None = None, **numbers
) -> PrivacyPlan:
    """Check the numbers of a plan, and calibrate sigma to `target_epsilon` unless it is given.

    The target is for this mechanism and the `prior` ones, composed.

    Args:
        numbers: all other fields of `PrivacyPlan`.

    Raises:
        UsageError: delta >= 1/N, B > N, a budget that no finite noise reaches, neither or both of
            epsilon and sigma, or a number outside its range.
    """
    plan = PrivacyPlan(noise_multiplier=noise_multiplier, **numbers)
    _check_plan(plan, target_epsilon)
    if noise_multiplier is not None:
        return plan
    q = plan.sampling_rate
    sigma = calibrate_noise_multiplier(target_epsilon, plan.delta, q, plan.steps, plan.prior)
    return replace(plan, noise_multiplier=sigma)


def check_budget(target_epsilon: float | None, noise_multiplier: float | None) -> None:
    """Raises: UsageError if neither is given, or both are."""
    if (target_epsilon is None) == (noise_multiplier is None):
        raise UsageError("give exactly one of --target_epsilon and --noise_multiplier")


def _check_plan(plan: PrivacyPlan, target_epsilon: float | None) -> None:
    units, delta, sigma = plan.num_units, plan.delta, plan.noise_multiplier
    if delta is None:
        raise UsageError(f"give --target_delta, below 1/N = {1 / units:.3g}")
    if not 0 < delta < 1 / units:
        raise UsageError(
            f"--target_delta {delta:g} must be positive and below 1/N = {1 / units:.3g} for "
            f"{units} units: at 1/N a mechanism may publish one unit outright"
        )
    if delta < SMALLEST_DELTA:
        raise UsageError(
            f"--target_delta {delta:g} is below {SMALLEST_DELTA:g}, where the rounding of numbers "
            "hides what the accountants compute; 1 / (N ln N) is a common choice"
        )
    if not 0 < plan.expected_batch_size <= units:
        raise UsageError(
            f"--expected_batch_size {plan.expected_batch_size:g} must be between 1 and the number "
            f"of units, {units}"
        )
    if plan.steps < 1:
        raise UsageError(f"--max_train_steps {plan.steps} must be at least 1")
    if plan.noise_multiplicity < 1:
        raise UsageError(f"--noise_multiplicity {plan.noise_multiplicity} must be at least 1")
    if not 1 / LARGEST_BOUND <= plan.max_grad_norm <= LARGEST_BOUND:
        raise UsageError(
            f"--max_grad_norm {plan.max_grad_norm} must be between {1 / LARGEST_BOUND:g} and "
            f"{LARGEST_BOUND:g}, for sums in fp32"
        )
    check_budget(target_epsilon, sigma)
    if sigma is not None and not SMALLEST_NOISE <= sigma <= LARGEST_NOISE:
        raise UsageError(
            f"--noise_multiplier {sigma} must be between {SMALLEST_NOISE} and {LARGEST_NOISE:g}"
        )


def summarise_plan(plan: PrivacyPlan, spent: Spent) -> dict:
    """The plan and its cost, for `--dry_run`."""
    return asdict(plan) | {"sampling_rate": plan.sampling_rate, "epsilon": asdict(spent)}


def calibrate_table(plan: PrivacyPlan, targets: set[float]) -> list[dict]:
    """The noise multiplier that `plan` would need for each target epsilon, smallest first; of those
    that are above what it builds on, and that some noise reaches."""
    table, spent = [], pld_epsilon(list(plan.prior), plan.delta) if plan.prior else 0.0
    terms = (plan.delta, plan.sampling_rate, plan.steps, plan.prior)
    for target in tqdm(sorted(t for t in targets if t > spent), "calibrating", leave=False):
        try:
            sigma = calibrate_noise_multiplier(target, *terms)
        except UsageError:
            continue
        table.append({"epsilon": target, "noise_multiplier": sigma})
    return table
