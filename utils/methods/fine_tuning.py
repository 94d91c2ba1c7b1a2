"""The story of every private training script: load, adapt, plan, fine-tune, publish."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from diffusers import DiffusionPipeline

from utils.arguments.methods import LdmArguments, LoDAArguments, LoraArguments, StageArguments
from utils.arguments.publishing import PublishArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.images import describe_left_out
from utils.data.rows import find_used_template
from utils.errors import on_main_process
from utils.files import CARD, explain_disk_errors, write_durably
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.hub.cards import Facts, build_model_card
from utils.hub.upload import publish_model
from utils.ledger.runs import Run
from utils.ledger.statement import UNKNOWN_BASE, describe_cost
from utils.methods.choice import find_facts_before
from utils.methods.forecast import Sizes
from utils.methods.outlook import (
    collect_facts,
    judge_plan,
    replay_if_asked,
    show_choices,
    show_plan,
)
from utils.methods.planning import (
    check_captions,
    load_private_rows,
    plan_training,
    preview,
    reserve,
)
from utils.methods.private_run import (
    build_training_state,
    collect_adapter_tensors,
    describe_weights,
    fine_tune,
    stop_here,
)
from utils.methods.public_passes import leave_out_unused, measure_unit, rehearse
from utils.methods.publishing import (
    check_early,
    choose_license,
    describe_setup,
    save_samples,
)
from utils.methods.saliency_file import Saliency
from utils.methods.stages import Stage, collect_settings, finish, load_stage, start
from utils.methods.warm_start import find_earlier_stages, join_ledger, warm_up
from utils.models.drawing import adopt_template, choose_settings, write_settings
from utils.models.families import find_family
from utils.models.placement import halve_frozen, ready_to_draw
from utils.models.targets import choose_targets
from utils.privacy.defaults import ADAPTER_RATE, PublicFacts, choose_missing
from utils.privacy.plan import PrivacyPlan


@dataclass(frozen=True)
class Method:
    """What differs between the published methods.

    Attributes:
        name: its tag on the model card.
        adapt: makes some weights of a frozen pipeline trainable.
        export: saves those weights to a folder.
        describe_usage: Python for the card that makes `pipeline` from them (`Facts.usage`).
        settings: the method's arguments; a run that is resumed must have the same.
        stages: what it builds on: a selection, a warm start.
        rate: see `PublicFacts`.
        to_come: events of first stages that a dry run planned, and that nothing was paid for yet.
        selection: of the matrices that it trains, or adapts; None if there is none.
    """

    name: str
    adapt: Callable[[DiffusionPipeline], None]
    export: Callable[[DiffusionPipeline, Path], None]
    describe_usage: Callable[[DiffusionPipeline], str]
    settings: object
    stages: StageArguments
    rate: float = ADAPTER_RATE
    to_come: tuple[dict, ...] = ()
    selection: Saliency | None = None

    def has_warm_start(self) -> bool:
        """Also one that is only planned."""
        planned = any(event["purpose"] == "means" for event in self.to_come)
        return planned or bool(self.stages.warm_start)

    def before(self, stage: Stage, facts: PublicFacts) -> PublicFacts:
        """`facts`, as far as they were known before a selection."""
        if self.selection is None:
            return facts
        adapter = None if isinstance(self.settings, LdmArguments) else self.settings
        return find_facts_before(self.selection, adapter, stage.pipeline, facts)

    def measure(self, num_rows: int, unit_bytes: int) -> Sizes:
        """How large a run is, of private rows whose gradients take so much memory a unit."""
        steps = self.stages.warm_start_steps if self.has_warm_start() else 0
        return Sizes(num_rows, unit_bytes, steps * self.stages.warm_start_batch_size)


def run_method(
    method: Method,
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    hub: PublishArguments,
) -> None:
    """Fine-tune a public pipeline on private images, and publish the result.

    Raises:
        UsageError: bad input of any kind, before anything is trained.
    """
    if training.validation_prompt is None:
        training = replace(training, validation_prompt=[data.caption or ""])
    accelerator, _lock = start(training, data.train_data_dir, data.dataset_name)
    check_early(hub, privacy, training)
    privacy, data = join_ledger(privacy, method.stages), adopt_template(data, model)

    # Adapt the public model, and choose what was not asked for.
    found = load_private_rows(accelerator, data, training, method.stages.warm_start)
    stage = load_stage(accelerator, model, data, privacy, training)
    method.adapt(stage.pipeline)
    modules = leave_out_unused(stage.pipeline, stage.resolution)
    check_captions(found, stage.pipeline, training.validation_prompt)
    facts = collect_facts(modules, found.num_units, method.rate, method.has_warm_start())
    privacy, training, reasons = choose_missing(privacy, training, method.before(stage, facts))
    engine = PerUnitGradients(modules, privacy.noise_multiplicity)
    rehearse(stage.pipeline, engine, stage.resolution)
    if training.base_precision == "bf16":
        halve_frozen(stage.pipeline, stage.public)
    stage = replay_if_asked(stage, engine, data, privacy, training)

    # Plan what will be spent: can it work? If it is meant, reserve it.
    stage, plan, report = plan_run(method, stage, data, privacy, training, facts, reasons)
    adapter, told = collect_adapter_tensors(stage), stage.describe_circumstances()
    if training.dry_run:
        left_out = preview(found, privacy, training, stage.resolution, told, plan)
        sizes = method.measure(len(found), measure_unit(stage, engine))
        return show_plan(stage, engine, training, plan, left_out, sizes, report)
    settings = collect_settings(method.name, method.settings, data, training)
    agreed = settings | describe_weights(stage, engine, adapter)
    if method.stages.warm_start is not None and training.resume_from_checkpoint is None:
        warm_up(stage, engine, adapter, method.stages, training)
    private_set, run = reserve(found, privacy, training, stage.resolution, agreed, told, plan)
    accelerator.print(announce(stage, plan, run, engine, private_set.left_out))

    # Train by DP-SGD.
    state = build_training_state(engine, adapter, plan, run, training)
    if training.publish_now:
        plan = stop_here(stage, plan, state)
    encoded_dir = fine_tune(stage, state, private_set, plan, run, training)

    # Publish: the ledger, then the statement, then the weights that it accounts for.
    on_main_process(lambda: publish(method, stage, plan, run, training, hub, data))
    sentence = f"saved the weights, privacy.json, README.md and samples/ in {run.output_dir}"
    finish(stage, data, training, encoded_dir, sentence)
    accelerator.end_training()
    if hub.push_to_hub and accelerator.is_main_process:  # nobody waits for the upload
        print(f"published {publish_model(run.output_dir, hub)}")


def plan_run(
    method: Method,
    stage: Stage,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    facts: PublicFacts,
    reasons: list[str],
) -> tuple[Stage, PrivacyPlan, dict]:
    """The plan, after the stages that the method builds on; `stage`, of which is doubted what was
    doubted of those; and what is told of the plan: what was chosen and why, and a verdict.

    Raises:
        UsageError: see `find_earlier_stages` and `plan_training`.
    """
    output_dir, base = Path(training.output_dir), stage.base_checksum
    earlier = on_main_process(
        lambda: find_earlier_stages(method.stages, output_dir, privacy, base, stage.base_statement)
    )
    terms = {"steps": training.max_train_steps, "unit_column": data.privacy_unit_column}
    terms |= {"prior": earlier.events + method.to_come, "builds_on": earlier.runs}
    show_choices(reasons)
    plan = plan_training(facts.num_units, privacy, **terms)
    report = {"chosen": reasons, "verdict": asdict(judge_plan(plan, facts))}
    is_known = stage.is_base_known and UNKNOWN_BASE not in earlier.doubts
    return replace(stage, is_base_known=is_known), plan, report


def announce(
    stage: Stage, plan: PrivacyPlan, run: Run, engine: PerUnitGradients, left_out: Mapping
) -> str:
    """One sentence before training: what will train, and what it will cost."""
    return (
        f"{plan.num_units} private units ({describe_left_out(left_out)}), "
        f"{engine.num_parameters:,} trainable parameters, noise multiplier "
        f"{plan.noise_multiplier:.4f}, {describe_cost(plan, stage.base_statement, run.recharged)}"
    )


def publish(
    method: Method,
    stage: Stage,
    plan: PrivacyPlan,
    run: Run,
    training: TrainingArguments,
    hub: PublishArguments,
    data: DataArguments,
) -> None:
    """Write the weights with their statement, then the card and the samples.

    Raises:
        UsageError: see `Run.publish`.
    """
    statement = run.publish(lambda folder: method.export(stage.pipeline, folder), plan)
    drawing = choose_settings(stage.pipeline, training, stage.resolution, stage.base_settings)
    drawing = replace(drawing, caption_template=find_used_template(data))
    settings = method.settings
    if isinstance(settings, LoraArguments | LoDAArguments):
        settings = choose_targets(settings, stage.pipeline)
    facts = Facts(
        method=method.name,
        usage=method.describe_usage(stage.pipeline),
        base=stage.model,
        pipeline=type(stage.pipeline).__name__,
        drawing=drawing,
        prompts=training.validation_prompt,
        prompt_code=find_family(stage.pipeline).describe_prompt(training.validation_prompt[0]),
        num_samples=training.num_validation_images,
        setup=describe_setup(training, plan, settings, stage.resolution),
        license=choose_license(hub.hub_license, stage.model),
    )
    with explain_disk_errors(run.output_dir):
        write_durably(run.output_dir / CARD, build_model_card(facts, statement))
        write_settings(drawing, run.output_dir)
        with ready_to_draw(stage.pipeline):
            save_samples(stage.pipeline, training, drawing)
