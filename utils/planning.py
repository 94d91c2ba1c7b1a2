"""From the private rows to a plan, reserved in the ledger before an image is read."""

import hashlib
import json
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object
from datasets import Dataset

from utils.accounting import PrivacyPlan, Spent, plan_summary
from utils.arguments import DataArguments, PrivacyArguments, TrainingArguments
from utils.data import PrivateSet, captions_of, readable_rows, rows_of, units_of
from utils.errors import UsageError, on_main_process
from utils.per_unit_gradients import PerUnitGradients
from utils.reservations import confirm, open_run
from utils.runs import Run, private_folder


def read_and_plan(
    accelerator: Accelerator,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    agreed: dict,
    make: Callable[[int], PrivacyPlan],
) -> tuple[PrivateSet, PrivacyPlan, Run | None]:
    """Load the private rows, and plan and reserve what will be spent on them.

    An impossible plan is refused before any image is read. Whatever `datasets` caches of the images
    stays under OUTPUT_DIR/private. With `--dry_run` nothing is reserved, and there is no run.

    Args:
        agreed: what a checkpoint must agree with, beside the plan.
        make: the plan for a number of units.

    Raises:
        UsageError: bad data or an impossible plan (see `rows_of`, `captions_of`, `make_plan`,
            `open_run` and `confirm`).
    """
    cache = private_folder(training.output_dir) / "cache"
    with accelerator.main_process_first():
        rows = rows_of(data, cache)
    captions_of(rows, data.caption_column, data.label_column, data.caption_template)
    plan = make(int(units_of(rows, data.privacy_unit_column).max()) + 1)
    is_private = privacy.debug_noise_seed is None
    run = on_main_process(lambda: open_run(training, privacy, plan, agreed, is_private))
    try:
        private_set = private_set_of(rows, data)
        if private_set.num_units != plan.num_units:
            plan = make(private_set.num_units)
        if run is not None:
            run = on_main_process(lambda: confirm(run, privacy, plan, is_private))
    except UsageError:
        if run is not None and run.checkpoint is None:
            on_main_process(run.page.give_up)
        raise
    return private_set, plan, run


def private_set_of(rows: Dataset, data: DataArguments) -> PrivateSet:
    """The readable rows, with the caption and the privacy unit of each.

    Raises:
        UsageError: see `readable_rows`, `captions_of` and `units_of`; or the processes read
            different data.
    """
    good, digests = on_main_process(
        lambda: readable_rows(rows, data.image_column, data.strict_images)
    )
    skipped = len(rows) - len(good)
    rows = rows.select(good) if skipped else rows
    captions = captions_of(rows, data.caption_column, data.label_column, data.caption_template)
    unit_of_row = units_of(rows, data.privacy_unit_column)
    content = hashlib.sha256(unit_of_row.numpy().tobytes())
    for caption in captions:
        content.update(repr(caption).encode())
    if len(set(gather_object([content.hexdigest()]))) > 1:  # compared in memory, and forgotten
        raise UsageError("the processes read different data: give all of them the same")
    return PrivateSet(rows, data.image_column, captions, unit_of_row, skipped, digests)


def describe(
    private_set: PrivateSet, plan: PrivacyPlan, spent: Spent, engine: PerUnitGradients, nbytes: int
) -> str:
    """The report of `--dry_run`, as JSON; `nbytes` is the memory of a micro-batch's gradients."""
    report = plan_summary(plan, spent) | {
        "unreadable_images": private_set.skipped,
        "trainable_parameters": engine.num_parameters,
        "per_unit_gradient_bytes": nbytes,
    }
    return json.dumps(report, indent=2)
