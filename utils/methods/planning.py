"""From the private rows to a plan: a preview of it, or one reserved before an image is read."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from accelerate import Accelerator, PartialState
from datasets import Dataset
from diffusers import DiffusionPipeline

from utils.arguments.training import DataArguments, PrivacyArguments, TrainingArguments
from utils.data.diagnostics import list_class_captions, show_private_set, warn_of_captions
from utils.data.images import describe_left_out
from utils.data.private_set import PrivateSet, load_private_set
from utils.data.rows import load_rows, name_source, read_captions
from utils.data.units import number_units, warn_of_similar_units
from utils.errors import UsageError, on_main_process, require_alike
from utils.files import CACHE, private_folder
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.public_sets import refuse_as_private, refuse_own_images
from utils.ledger.remembered import remember_run, warn_of_other_ledgers
from utils.ledger.reservations import (
    check_new,
    check_room_for,
    confirm,
    find_ledger,
    handing_back,
    open_run,
)
from utils.ledger.runs import Run
from utils.ledger.statement import Circumstances
from utils.models.families import Family, find_family
from utils.privacy.accounting import account
from utils.privacy.plan import PrivacyPlan, make_plan, name_unit, summarise_plan
from utils.privacy.precision import describe_arithmetic
from utils.version import find_commit

ROW = "one row: an image and its caption; a picture that is in several rows is protected less"
# Options that a unit's gradient is rounded by: they may change later, but not between processes.
ROUNDS_BY = ("train_batch_size", "base_precision", "gradient_checkpointing")


@dataclass(frozen=True)
class OtherStages:
    """What one budget covers beside a stage and the training after it: events of other stages.

    Attributes:
        spent: those that the ledger has. to_come: those that it has not.
    """

    spent: tuple[dict, ...] = ()
    to_come: tuple[dict, ...] = ()


ALONE = OtherStages()


@dataclass(frozen=True)
class PrivateRows:
    """The rows of a private set, as they were loaded: no image was read. How many units there are
    is public. To plan only, there may be no rows, but the number of units."""

    data: DataArguments
    rows: Dataset | None
    num_units: int

    def __len__(self) -> int:
        """How many rows; without any, as many as units."""
        return self.num_units if self.rows is None else len(self.rows)


def load_private_rows(
    accelerator: Accelerator,
    data: DataArguments,
    training: TrainingArguments,
    public: list[str] | None = None,
) -> PrivateRows:
    """Before a base is downloaded. Whatever `datasets` caches of the images stays under
    OUTPUT_DIR/private.

    Args:
        public: folders and Hub ids of images that the stage takes as public.

    Raises:
        UsageError: see `load_rows`, `read_captions`, `number_units`, `refuse_as_private`,
            `refuse_own_images`.
    """
    name = data.train_data_dir or data.dataset_name
    if name is not None:
        refuse_own_images(public or [], name)
        on_main_process(lambda: refuse_as_private(name))
    if training.num_units is not None:
        return PrivateRows(data, None, training.num_units)
    with accelerator.main_process_first():
        rows = load_rows(data, private_folder(training.output_dir) / CACHE)
    read_captions(rows, data)
    num_units = int(number_units(rows, data.privacy_unit_column).max()) + 1
    warn_of_similar_units(rows, data.privacy_unit_column)
    return PrivateRows(data, rows, num_units)


def check_captions(
    found: PrivateRows, pipeline: DiffusionPipeline, prompts: list[str] | None
) -> None:
    """Raises: UsageError if that model cannot be told one of them, or tell the classes apart."""
    family = find_family(pipeline)
    family.check_captions(prompts or [])
    if found.rows is not None:
        family.check_captions(read_captions(found.rows, found.data))
        on_main_process(lambda: _check_classes(family, found.rows, found.data))


def _check_classes(family: Family, rows: Dataset, data: DataArguments) -> None:
    warn_of_captions(rows, data)
    captions = list_class_captions(rows, data)
    if alike := family.count_alike(captions):
        raise UsageError(
            f"{alike} of the {len(captions)} classes have captions that are the same to the model, "
            f"which reads {family.longest_caption} tokens, and perhaps no capitals: give a shorter "
            "--caption_template, or other names"
        )


def plan_training(num_units: int, privacy: PrivacyArguments, **terms) -> PrivacyPlan:
    """The plan of a training stage; `terms` are the steps and other fields of `PrivacyPlan`. B is
    at most N.

    Raises:
        UsageError: see `make_plan`.
    """
    return make_plan(
        target_epsilon=privacy.target_epsilon,
        noise_multiplier=privacy.noise_multiplier,
        num_units=num_units,
        expected_batch_size=min(privacy.expected_batch_size, num_units),
        max_grad_norm=privacy.max_grad_norm,
        delta=privacy.target_delta,
        noise_multiplicity=privacy.noise_multiplicity,
        clipping=privacy.clipping,
        **terms,
    )


def plan_later_training(
    privacy: PrivacyArguments, steps: int | None, earlier: PrivacyPlan, others: OtherStages
) -> PrivacyPlan | None:
    """What the training that is to follow a stage will spend, all composed; None if no budget for
    it was named. What has still to be chosen stands as one step on everyone.

    Raises:
        UsageError: see `make_plan`.
    """
    if privacy.target_epsilon is None and privacy.noise_multiplier is None:
        return None
    batch, draws = privacy.expected_batch_size, privacy.noise_multiplicity
    privacy = replace(
        privacy,
        expected_batch_size=earlier.num_units if batch is None else batch,
        noise_multiplicity=1 if draws is None else draws,
    )
    prior = (*others.spent, *others.to_come, earlier.event())
    terms = {"unit_column": earlier.unit_column, "prior": prior}
    steps = 1 if steps is None else steps
    return plan_training(earlier.num_units, privacy, steps=steps, **terms)


def check_later_training(
    plan: PrivacyPlan,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    others: OtherStages,
    about: Circumstances,
) -> PrivacyPlan | None:
    """Refuse, before anything is spent by a stage, what could not be trained after it; else
    `plan_later_training`. `about`: of the training.

    Raises:
        UsageError: see `make_plan` and `check_room_for`.
    """
    later = plan_later_training(privacy, training.max_train_steps, plan, others)
    if training.resume_from_checkpoint is None:
        events = [*others.to_come, plan.event(), *([] if later is None else [later.event()])]
        check_room_for(Path(training.output_dir), privacy, events, about)
    return later


def preview(
    found: PrivateRows,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    resolution: int,
    about: Circumstances,
    plan: PrivacyPlan,
) -> Mapping[str, int]:
    """Show the owner of the private rows what training would see (`show_private_set`), and how many
    images are left out, by reason; nothing is reserved. Where there are no rows, only a number of
    units, nothing is shown. `about`: as for `reserve`.

    Raises:
        UsageError: bad data, or there is no room for the plan (see `reserve`).
    """
    if found.rows is None:
        return {}

    def check() -> None:
        ledger = find_ledger(training.output_dir, privacy)
        warn_of_other_ledgers(name_source(found.data), ledger)
        check_new(Path(training.output_dir), privacy, plan, about)

    on_main_process(check)
    private_set = _check_images(found)
    show_private_set(private_set, resolution, training.output_dir)
    return private_set.left_out


def reserve(
    found: PrivateRows,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    resolution: int,
    agreed: dict,
    about: Circumstances,
    plan: PrivacyPlan,
) -> tuple[PrivateSet, Run]:
    """Reserve what will be spent on the private rows, and show their owner what training sees
    (`show_private_set`).

    What there is no room for is refused before any image is read.

    Args:
        agreed: what a checkpoint must agree with, beside the plan.
        about: what the statement will say beside the mechanisms.

    Raises:
        UsageError: bad data, or no room for the plan (see `open_run` and `confirm`); or the
            processes were not started alike.
        RuntimeError: the accountants disagree.
    """
    content = {"dataset_name", "train_data_dir"}  # of which `load_private_set` compares what counts
    data = {k: v for k, v in agreed.get("data", {}).items() if k not in content}
    told = {"data": data, "code": find_commit(), "mixed_precision": about.precision}
    told |= {"randomness": about.randomness} | {k: getattr(training, k) for k in ROUNDS_BY}
    require_alike(plan.bounds() | agreed | told | describe_arithmetic(PartialState().device))
    spent = account(plan.events(), plan.delta)  # if the accountants disagree, nothing is reserved

    def open_and_remember() -> Run:
        run = open_run(training, privacy, plan, agreed, about)
        source, branch = name_source(found.data), run.branch
        warn_of_other_ledgers(source, branch.ledger)
        if about.is_private:  # also when it resumes: the folder may be a copy, with its own ledger
            epsilon = spent.add_or_remove_one
            remember_run(source, branch.ledger, branch.run, epsilon, plan.delta)
        return run

    run = on_main_process(open_and_remember)
    with handing_back(run):
        private_set = _check_images(found)
        show_private_set(private_set, resolution, training.output_dir)
        run = on_main_process(lambda: confirm(run, privacy, plan, private_set.digest))
    return private_set, run


def _check_images(found: PrivateRows) -> PrivateSet:
    """The readable rows."""
    private_set = load_private_set(found.rows, found.data)
    if private_set.without_image and PartialState().is_main_process:
        print(
            f"{private_set.without_image} of {private_set.num_units} units have no image that can "
            f"be used ({describe_left_out(private_set.left_out)}): they add nothing, and count in "
            "N, which is published; mend or remove their images (OUTPUT_DIR/private/data.json)",
            file=sys.stderr,
        )
    return private_set


def print_plan(accelerator: Accelerator, plan: PrivacyPlan) -> PrivacyPlan:
    """The report of `--dry_run` of a stage without a model that trains; returns the plan."""
    spent = account(plan.events(), plan.delta)
    accelerator.print(json.dumps(summarise_plan(plan, spent), indent=2))
    return plan


def describe(
    plan: PrivacyPlan,
    engine: PerUnitGradients,
    unit_bytes: int,
    training: TrainingArguments,
    left_out: Mapping[str, int],
    **more,
) -> str:
    """The report of `--dry_run`, as JSON; `unit_bytes` is the memory of one unit's gradients."""
    report = summarise_plan(plan, account(plan.events(), plan.delta)) | {
        "images_left_out": dict(left_out),
        "trainable_parameters": engine.num_parameters,
        "protected": ROW if plan.unit_column is None else name_unit(plan.unit_column),
        "per_unit_gradient_bytes": unit_bytes * min(training.train_batch_size, plan.num_units),
    }
    return json.dumps(report | more, indent=2)
