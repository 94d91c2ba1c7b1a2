"""The private steps of a run: its state, as new or as a checkpoint has it; the steps, and between
them images and checkpoints."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from utils.arguments.training import TrainingArguments
from utils.data.latents import prepare_losses
from utils.data.private_set import PrivateSet
from utils.errors import Stopped, StopRequest, UsageError, first_line, on_main_process
from utils.files import LOGS, private_folder
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.reservations import handing_back
from utils.ledger.runs import Run
from utils.ledger.statement import describe_cost, quote_plan
from utils.methods.film import draw_sheet, is_due
from utils.methods.stages import Stage
from utils.models.drawing import choose_settings
from utils.models.families import find_family
from utils.models.pipelines import collect_trained_modules
from utils.models.placement import park
from utils.privacy.optimizers import build_optimizer
from utils.privacy.plan import PrivacyPlan
from utils.privacy.training import TrainingState, private_steps


def collect_adapter_tensors(stage: Stage) -> dict[str, torch.Tensor]:
    """By name, what is trained or is not the public model's: all that a checkpoint must hold."""
    known = {id(parameter) for parameter in stage.public}
    named = collect_trained_modules(stage.pipeline).named_parameters()
    return {name: p for name, p in named if p.requires_grad or id(p) not in known}


def describe_weights(
    stage: Stage, engine: PerUnitGradients, adapter: dict[str, torch.Tensor]
) -> dict:
    """What a checkpoint must agree with, of the weights and of how captions are read."""
    reading = repr(find_family(stage.pipeline).describe_reading())
    return {
        "reading": hashlib.sha256(reading.encode()).hexdigest(),
        "base_model_checksum": stage.base_checksum,
        "trained": engine.names,
        "adapter": {name: list(tensor.shape) for name, tensor in adapter.items()},
    }


def build_training_state(
    engine: PerUnitGradients,
    adapter: dict[str, torch.Tensor],
    plan: PrivacyPlan,
    run: Run,
    training: TrainingArguments,
) -> TrainingState:
    """The state of a run: at step 0, or as its checkpoint has it."""
    state = build_state(engine, plan, training)
    state.adapter, state.recharged, state.behind = adapter, run.recharged, run.behind
    if run.checkpoint is not None:
        state.load_state_dict(run.saved_state())
    return state


def build_state(
    engine: PerUnitGradients, plan: PrivacyPlan, training: TrainingArguments
) -> TrainingState:
    """Optimizer, schedule and moving average, at step 0."""
    optimizer = build_optimizer(training, engine.parameters, plan)
    lr_scheduler = get_scheduler(
        training.lr_scheduler,
        optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=plan.steps,
    )
    average = None
    if training.ema_decay:
        average = EMAModel(engine.parameters, decay=training.ema_decay)
    return TrainingState(engine, optimizer, lr_scheduler, average)


def stop_here(stage: Stage, plan: PrivacyPlan, state: TrainingState) -> PrivacyPlan:
    """`plan`, as if it had ended where the checkpoint is.

    Raises:
        UsageError: no private step was taken.
    """
    if state.step == 0:
        raise UsageError("--publish_now: no private step was taken; there is nothing to publish")
    shorter = replace(plan, steps=state.step)
    cost = describe_cost(shorter, stage.base_statement, state.recharged)
    stage.accelerator.print(
        f"publishing the weights after step {state.step} of {plan.steps}: {cost}, if nobody chose "
        "that step by looking at the run"
    )
    return shorter


def describe_for_trackers(
    plan: PrivacyPlan, base: dict | None, recharged: int, training: TrainingArguments
) -> dict:
    """The public plan, as trackers take it: nothing else of a run is public before its end.
    Epsilon and delta are with what is behind a private `base`."""
    epsilon, delta = quote_plan(plan, base, recharged)
    facts = asdict(plan) | {
        "sampling_rate": plan.sampling_rate,
        "epsilon": epsilon["add_or_remove_one"],
        "epsilon_replace_one": epsilon["replace_one"],
        "delta": delta,
        "cost": describe_cost(plan, base, recharged),
        "optimizer": training.optimizer,
        "learning_rate": training.learning_rate,
        "lr_scheduler": training.lr_scheduler,
    }
    return {k: v for k, v in facts.items() if isinstance(v, int | float | str)}


def keep_quiet(output_dir: Path) -> dict[str, dict]:
    """By tracker, what makes it take nothing but what it is told: not what a run prints, nor the
    load of the machine every few seconds, which follows how long each step takes."""
    folder = private_folder(output_dir) / LOGS
    folder.mkdir(exist_ok=True)
    off = {"console": "off", "disable_git": True, "x_save_requirements": False}
    off |= {f"x_disable_{what}": True for what in ("stats", "meta", "machine_info")}
    return {"wandb": {"dir": str(folder), "settings": off}}


def start_tracker(stage: Stage, plan: PrivacyPlan, run: Run, training: TrainingArguments) -> None:
    """Begin to log, before hours go by with encoding.

    Raises:
        UsageError: the tracker does not start, as without a login.
    """

    def begin() -> None:
        facts = describe_for_trackers(plan, stage.base_statement, run.recharged, training)
        try:
            stage.accelerator.init_trackers("private-adapter", facts, keep_quiet(run.output_dir))
        except Exception as error:  # each raises its own
            raise UsageError(
                f"--report_to {training.report_to} does not start: {first_line(error)} (or leave "
                "it out)"
            ) from error

    on_main_process(begin)


def fine_tune(
    stage: Stage,
    state: TrainingState,
    private_set: PrivateSet,
    plan: PrivacyPlan,
    run: Run,
    training: TrainingArguments,
) -> Path:
    """Encode the private set; take the private steps that are left, saving checkpoints; end with
    the weights to publish. Returns the folder of the encoded images.

    Raises:
        Stopped: asked to by a signal, after a checkpoint.
    """
    accelerator, limit = stage.accelerator, training.checkpoints_total_limit
    randomness, draws = stage.randomness, plan.noise_multiplicity
    with handing_back(run):
        if training.report_to is not None:
            start_tracker(stage, plan, run, training)
        unit_losses, encoded_dir = prepare_losses(
            stage.pipeline, private_set, stage.resolution, training, draws, randomness
        )
    park(stage.pipeline, text_too=unit_losses.units.text is not None)
    drawing = choose_settings(stage.pipeline, training, stage.resolution, stage.base_settings)
    if run.checkpoint is None:
        run.save(0, state.state_dict, limit)  # from here on, an interrupted run can be resumed
        if is_due(0, training):
            draw_sheet(accelerator, stage.pipeline, state, training, drawing)
    steps = private_steps(
        accelerator, state, unit_losses, plan, randomness, training.train_batch_size
    )
    for step in save_between(steps, accelerator, state, plan, run, training):
        if is_due(step, training):
            draw_sheet(accelerator, stage.pipeline, state, training, drawing)
    if state.average is not None:
        state.average.copy_to(state.engine.parameters)
    return encoded_dir


def save_between(
    steps: Iterator[int],
    accelerator: Accelerator,
    state: TrainingState,
    plan: PrivacyPlan,
    run: Run,
    training: TrainingArguments,
) -> Iterator[int]:
    """The private steps of a run, with a checkpoint after each that is due, or is to be seen.

    Raises:
        Stopped: asked to by a signal, after a checkpoint.
    """
    with StopRequest() as request:
        for step in steps:
            signal = request.find_signal(accelerator)
            due = step % training.checkpointing_steps == 0 or step == plan.steps
            if signal or due or is_due(step, training):
                run.save(step, state.state_dict, training.checkpoints_total_limit)
            if signal:
                raise Stopped(
                    f"stopped after step {step} of {plan.steps}, at a checkpoint: resume with "
                    "--resume_from_checkpoint latest",
                    signal,
                )
            yield step
