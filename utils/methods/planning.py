"""From the private rows to a plan: a preview of it, or one reserved before an image is read."""

import json
from collections.abc import Callable

from accelerate import Accelerator
from datasets import Dataset

from utils.arguments.training import DataArguments, PrivacyArguments, TrainingArguments
from utils.data.diagnostics import show_private_set
from utils.data.private_set import PrivateSet, load_private_set
from utils.data.rows import load_rows, name_source, number_units, read_captions
from utils.errors import UsageError, on_main_process
from utils.files import CACHE, private_folder
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.remembered import remember_run, warn_of_other_ledgers
from utils.ledger.reservations import confirm, find_ledger, open_run
from utils.ledger.runs import Run
from utils.privacy.accounting import account
from utils.privacy.plan import PrivacyPlan, make_plan, name_unit, summarise_plan

ROW = "one row: an image and its caption; a picture that is in several rows is protected less"
# The plan for a number of units; raises UsageError if it is impossible.
PlanFor = Callable[[int], PrivacyPlan]


def plan_training(num_units: int, privacy: PrivacyArguments, **terms) -> PrivacyPlan:
    """The plan of a training stage; `terms` are the steps and other fields of `PrivacyPlan`.

    Raises:
        UsageError: see `make_plan`.
    """
    return make_plan(
        target_epsilon=privacy.target_epsilon,
        noise_multiplier=privacy.noise_multiplier,
        num_units=num_units,
        expected_batch_size=privacy.expected_batch_size,
        max_grad_norm=privacy.max_grad_norm,
        delta=privacy.target_delta,
        noise_multiplicity=privacy.noise_multiplicity,
        clipping=privacy.clipping,
        **terms,
    )


def plan_later_training(
    privacy: PrivacyArguments, steps: int, earlier: PrivacyPlan
) -> PrivacyPlan | None:
    """What the training that is to follow a stage will spend, both composed; None if no budget for
    it was named.

    Raises:
        UsageError: see `make_plan`.
    """
    if privacy.target_epsilon is None and privacy.noise_multiplier is None:
        return None
    terms = {"steps": steps, "unit_column": earlier.unit_column, "prior": (earlier.event(),)}
    return plan_training(earlier.num_units, privacy, **terms)


def preview(
    accelerator: Accelerator,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    resolution: int,
    plan_for: PlanFor,
) -> tuple[PrivateSet, PrivacyPlan]:
    """Load the private rows, plan what would be spent on them, and show their owner what training
    would see (`show_private_set`); nothing is reserved.

    Raises:
        UsageError: bad data, or an impossible plan (see `reserve`).
    """
    rows, plan = _load_and_plan(accelerator, data, training, plan_for)
    is_private = privacy.debug_noise_seed is None

    def check() -> None:
        ledger = find_ledger(training.output_dir, privacy)
        warn_of_other_ledgers(name_source(data), ledger)
        ledger.check(plan.terms(is_private), privacy.total_epsilon)

    on_main_process(check)
    private_set, plan = _check_images(rows, data, plan, plan_for)
    show_private_set(private_set, resolution, training.output_dir)
    return private_set, plan


def reserve(
    accelerator: Accelerator,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    resolution: int,
    agreed: dict,
    plan_for: PlanFor,
) -> tuple[PrivateSet, PrivacyPlan, Run]:
    """Load the private rows, plan and reserve what will be spent on them, and show their owner what
    training sees (`show_private_set`).

    An impossible plan is refused before any image is read. Whatever `datasets` caches of the images
    stays under OUTPUT_DIR/private.

    Args:
        agreed: what a checkpoint must agree with, beside the plan.

    Raises:
        UsageError: bad data or an impossible plan (see `load_rows`, `read_captions`, `make_plan`,
            `open_run` and `confirm`).
        RuntimeError: the accountants disagree.
    """
    rows, plan = _load_and_plan(accelerator, data, training, plan_for)
    spent = account(plan.events(), plan.delta)  # if the accountants disagree, nothing is reserved
    is_private = privacy.debug_noise_seed is None

    def open_and_remember() -> Run:
        run, source = open_run(training, privacy, plan, agreed, is_private), name_source(data)
        branch = run.branch
        warn_of_other_ledgers(source, branch.ledger)
        if run.checkpoint is None and is_private:
            epsilon = spent.add_or_remove_one
            remember_run(source, branch.ledger, branch.run, epsilon, plan.delta)
        return run

    run = on_main_process(open_and_remember)
    try:
        private_set, plan = _check_images(rows, data, plan, plan_for)
        show_private_set(private_set, resolution, training.output_dir)
        run = on_main_process(lambda: confirm(run, privacy, plan, is_private))
    except UsageError:
        if run.checkpoint is None:
            on_main_process(run.branch.give_up)
        raise
    return private_set, plan, run


def _load_and_plan(
    accelerator: Accelerator, data: DataArguments, training: TrainingArguments, plan_for: PlanFor
) -> tuple[Dataset, PrivacyPlan]:
    with accelerator.main_process_first():
        rows = load_rows(data, private_folder(training.output_dir) / CACHE)
    read_captions(rows, data)
    return rows, plan_for(int(number_units(rows, data.privacy_unit_column).max()) + 1)


def _check_images(
    rows: Dataset, data: DataArguments, plan: PrivacyPlan, plan_for: PlanFor
) -> tuple[PrivateSet, PrivacyPlan]:
    """The readable rows; if units were lost with the others, a plan for those that are left."""
    private_set = load_private_set(rows, data)
    if private_set.num_units != plan.num_units:
        plan = plan_for(private_set.num_units)
    return private_set, plan


def describe(
    private_set: PrivateSet,
    plan: PrivacyPlan,
    engine: PerUnitGradients,
    unit_bytes: int,
    training: TrainingArguments,
    audit: dict | None = None,
) -> str:
    """The report of `--dry_run`, as JSON; `unit_bytes` is the memory of one unit's gradients."""
    report = summarise_plan(plan, account(plan.events(), plan.delta)) | {
        "images_left_out": dict(private_set.left_out),
        "trainable_parameters": engine.num_parameters,
        "audit": audit,
        "protected": ROW if plan.unit_column is None else name_unit(plan.unit_column),
        "per_unit_gradient_bytes": unit_bytes * min(training.train_batch_size, plan.num_units),
    }
    return json.dumps(report, indent=2)
