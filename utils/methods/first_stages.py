"""Stages that a training command does first, within one budget: released means, a selection."""

from dataclasses import asdict, replace
from pathlib import Path

from utils.arguments.means import MeansArguments
from utils.arguments.methods import BothStagesArguments, LoraArguments, SaliencyArguments
from utils.arguments.publishing import PublishArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.audit.replay import REPLAY
from utils.data.latent_files import choose_latents_folder
from utils.errors import UsageError, need_one_process, on_main_process
from utils.files import CHECKPOINTS, LEDGER, MEANS, SALIENCY, private_folder
from utils.ledger.checkpoints import list_differences, list_steps
from utils.ledger.ledger import Ledger
from utils.ledger.runs import FIRST_MEANS, SELECTION, claim_output_dir, is_free
from utils.ledger.statement import Circumstances
from utils.methods.means import read_means, run_release
from utils.methods.planning import (
    ALONE,
    OtherStages,
    check_captions,
    check_later_training,
    load_private_rows,
)
from utils.methods.public_passes import leave_out_unused
from utils.methods.publishing import check_early
from utils.methods.saliency_file import Saliency, read_saliency
from utils.methods.selection import plan_selection, run_selection
from utils.methods.stages import find_base_statement, load_stage, start
from utils.methods.warm_start import find_earlier_stages, join_ledger
from utils.models.drawing import adopt_template
from utils.models.lora import add_lora
from utils.privacy.plan import PrivacyPlan
from utils.sampling.paid_sets import find_paid_set
from utils.sampling.shards import SET

Common = tuple[ModelArguments, DataArguments, PrivacyArguments, TrainingArguments, PublishArguments]


def do_first_stages(
    stages: BothStagesArguments,
    common: Common,
    lora: LoraArguments,
    saliency: SaliencyArguments,
    means: MeansArguments,
) -> tuple[BothStagesArguments, Saliency | None, tuple[dict, ...]]:
    """Do what `--release_means` and `--select_saliency` ask for, unless an earlier attempt at this
    run has paid for it. Returns the stages to build on, None, and no events.

    After a dry run the stages lack what was not made, and are followed by a selection of as many
    matrices as will be selected, at random, and by the events of what was planned.

    Raises:
        UsageError: see `run_release` and `run_selection`; or an earlier attempt had other settings.
    """
    model, data, privacy, training, hub = common
    check_early(hub, privacy, training)
    if privacy.replay_audit:  # which comes when they are paid for
        need_one_process(REPLAY)
    check_adapter(model, data, privacy, training, lora)
    privacy = _share(join_ledger(privacy, stages), training)
    others, planned, to_come = ALONE, None, []
    if stages.release_means:
        later = saliency if stages.select_saliency else None
        found, plan = release_first(model, data, privacy, training, means, later)
        to_come = [plan.event()] if plan is not None and training.dry_run else []
        stages = replace(stages, release_means=False, warm_start=None if to_come else [str(found)])
        others = OtherStages(to_come=tuple(to_come))
    if stages.select_saliency:
        if stages.warm_start is not None:
            others = OtherStages(spent=list_spent(stages, model, data, privacy, training))
        found, planned = select_first(model, data, privacy, training, lora, saliency, others)
        stages = replace(stages, select_saliency=False)
        if planned is None:
            stages = replace(stages, saliency_file=str(found))
        else:
            to_come += [] if planned.event is None else [planned.event]
    return stages, planned, tuple(to_come)


def check_adapter(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    lora: LoraArguments,
) -> None:
    """Refuse, before a stage is paid for, a base, an adapter or captions that could not be trained
    with after it.

    Raises:
        UsageError: see `load_private_rows`, `load_stage`, `add_lora`, `leave_out_unused` and
            `check_captions`.
    """
    accelerator, _lock = start(training, data.train_data_dir, data.dataset_name)
    found = load_private_rows(accelerator, adopt_template(data, model), training)
    stage = load_stage(accelerator, model, data, privacy, training)
    add_lora(stage.pipeline, lora)
    leave_out_unused(stage.pipeline, stage.resolution, silently=True)  # training says what
    check_captions(found, stage.pipeline, training.validation_prompt)


def select_first(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    lora: LoraArguments,
    args: SaliencyArguments,
    others: OtherStages,
) -> tuple[Path, Saliency | None]:
    """Select into OUTPUT_DIR/selection; returns the saliency file, or what stands for it in a dry
    run, which does not make it.

    Args:
        others: that the training builds on, too.

    Raises:
        UsageError: see `do_first_stages`.
    """
    folder = Path(training.output_dir) / SELECTION
    found = folder / SALIENCY
    if found.exists():
        _refuse_changes(found, read_saliency(found).settings, asdict(args))
        return found, None
    within = _make_room(training, folder, "selection")
    return found, run_selection(model, data, privacy, within, lora, args, others)


def release_first(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    args: MeansArguments,
    later: SaliencyArguments | None,
) -> tuple[Path, PrivacyPlan | None]:
    """Release means into OUTPUT_DIR/means; returns the set drawn to match them, which a dry run
    does not make, and what they cost, unless an earlier attempt has paid for all.

    Args:
        later: of the selection that is to follow; None if there is none.

    Raises:
        UsageError: see `do_first_stages`.
    """
    folder = Path(training.output_dir) / FIRST_MEANS
    found = folder / SET
    if (folder / MEANS).exists():
        _refuse_changes(folder, read_means(folder / MEANS)[1]["settings"], asdict(args))
    if found.exists():
        try:
            find_paid_set(str(found), Ledger(private_folder(folder) / LEDGER), "--warm_start", "")
            return found, None
        except UsageError:
            pass  # interrupted while it was drawn: drawn again, for nothing
    within = _make_room(training, folder, "means")
    base, is_known = on_main_process(lambda: find_base_statement(model, data))

    def check_later(plan: PrivacyPlan, about: Circumstances) -> None:
        others, trained = ALONE, replace(about, base=base, is_base_known=is_known)
        if later is not None and later.mechanism != "random":
            settled = replace(
                privacy, noise_multiplicity=privacy.noise_multiplicity or 1
            )  # is free
            selection = plan_selection(plan.num_units, settled, later, 1.0, plan.unit_column)
            others = OtherStages(to_come=(selection.event(),))
        check_later_training(plan, privacy, within, others, trained)

    return found, run_release(model, data, privacy, within, args, check_later)


def list_spent(
    stages: BothStagesArguments,
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
) -> tuple[dict, ...]:
    """The events of the warm start that the training builds on.

    Raises:
        UsageError: see `find_base_statement` and `find_earlier_stages`.
    """

    def find() -> tuple[dict, ...]:
        base, _ = find_base_statement(model, data)
        return find_earlier_stages(stages, Path(training.output_dir), privacy, 0, base).events

    return on_main_process(find)


def _refuse_changes(found: Path, then: dict, now: dict) -> None:
    changed = list_differences(then, now)
    if changed:
        raise UsageError(f"{found} was made with other settings: {'; '.join(changed)}")


def _share(privacy: PrivacyArguments, training: TrainingArguments) -> PrivacyArguments:
    """`privacy` with the ledger that all stages of a run share: that of its folder, unless it names
    one."""
    if privacy.privacy_ledger is not None:
        return privacy
    ledger = str(private_folder(training.output_dir) / LEDGER)
    return replace(privacy, privacy_ledger=ledger, start_ledger=True)


def _make_room(training: TrainingArguments, folder: Path, what: str) -> TrainingArguments:
    """The arguments of a stage in `folder`, which resumes if an earlier attempt has paid.

    Raises:
        UsageError: see `claim_output_dir`; or there is nothing to resume.
    """
    on_main_process(lambda: claim_output_dir(training).release())
    # An earlier attempt, interrupted; one that released nothing is begun anew.
    paid = list_steps(private_folder(folder) / CHECKPOINTS) and not is_free(folder)
    if training.resume_from_checkpoint is not None and not paid:
        raise UsageError(f"--output_dir {training.output_dir} holds no {what} to resume from")
    return replace(
        training,
        output_dir=str(folder),
        resume_from_checkpoint="latest" if paid else None,
        latents_dir=str(choose_latents_folder(training)),
        discard_latents=False,
    )
