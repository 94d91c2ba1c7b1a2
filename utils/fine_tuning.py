"""The story that every private training script tells: load, adapt, plan, fine-tune, publish."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, set_seed
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from filelock import FileLock

from utils.accounting import PrivacyPlan, account, make_plan
from utils.arguments import DataArguments, ModelArguments, PrivacyArguments, TrainingArguments
from utils.cards import Facts, model_card
from utils.checkpoints import StopRequest
from utils.entropy import SecretRandomness, secret_randomness
from utils.errors import PATIENCE, Stopped, UsageError, on_main_process
from utils.hub import PublishArguments, publish_model, write_durably
from utils.latent_files import discard_copies
from utils.latents import private_losses
from utils.optimizers import make_optimizer
from utils.per_unit_gradients import PerUnitGradients
from utils.pipelines import (
    check_resolution,
    denoising_loss,
    encode_text,
    image_side,
    load_pipeline,
    parts_of,
    tokenize,
    trained_modules,
)
from utils.planning import describe, read_and_plan
from utils.publishing import check_repository, save_samples, setup_of
from utils.reservations import selection_paid_for
from utils.runs import Run, claim_output_dir, disk_errors_told, private_folder
from utils.training import TrainingState, UnitLosses, checksum, private_steps

ARGUMENTS = (ModelArguments, DataArguments, PrivacyArguments, TrainingArguments, PublishArguments)


@dataclass(frozen=True)
class Method:
    """All that tells one published method from another.

    Attributes:
        name: its tag on the model card.
        adapt: makes some weights of a frozen pipeline trainable.
        export: saves those weights to a folder.
        usage: Python for the card that makes `pipeline` from them; `{base}` is the base model.
        settings: its own arguments; a run that is gone on with must have the same.
    """

    name: str
    adapt: Callable[[DiffusionPipeline], None]
    export: Callable[[DiffusionPipeline, Path], None]
    usage: str
    settings: object


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
    accelerator, _lock = start(training)
    check_repository(hub, privacy)
    randomness = secret_randomness(privacy)

    # Adapt the public model.
    pipeline = load_pipeline(model.pretrained_model_name_or_path, model.revision)
    resolution = training_resolution(pipeline, data)
    pipeline.to(accelerator.device)
    public = public_parameters(pipeline)
    base = checksum(public).item()
    method.adapt(pipeline)
    if training.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    engine = PerUnitGradients(trained_modules(pipeline))
    unit_bytes = rehearse(pipeline, engine, privacy.noise_multiplicity, resolution)
    adapter = adapter_tensors(pipeline, public)

    # Plan what will be spent, and reserve it.
    agreed = settings_of(method.name, method.settings, data, training) | {
        "base_model_checksum": base,
        "trained": engine.names,
        "adapter": {name: list(tensor.shape) for name, tensor in adapter.items()},
    }
    prior, builds_on = on_main_process(
        lambda: selection_paid_for(Path(training.output_dir), privacy, base)
    )

    def make(num_units: int) -> PrivacyPlan:
        unit, steps = data.privacy_unit_column, training.max_train_steps
        return make_plan(num_units, privacy, steps, unit, prior, builds_on)

    private_set, plan, run = read_and_plan(accelerator, data, privacy, training, agreed, make)
    recharged = 0 if run is None else run.recharged
    spent = account(plan.events(plan.steps + recharged), plan.delta)
    if run is None:
        nbytes = unit_bytes * min(training.train_batch_size, plan.num_units)
        accelerator.print(describe(private_set, plan, spent, engine, nbytes))
        return
    accelerator.print(
        f"{plan.num_units} private units ({private_set.skipped} unreadable images, skipped), "
        f"{engine.num_parameters:,} trainable parameters, noise multiplier "
        f"{plan.noise_multiplier:.4f}, epsilon {spent.add_or_remove_one:.3f} "
        f"at delta {plan.delta:g}"
    )

    # Train by DP-SGD.
    draws = plan.noise_multiplicity
    losses_of, latents = private_losses(
        pipeline, private_set, resolution, training, draws, randomness
    )
    state = training_state(engine, adapter, plan, training)
    if run.checkpoint is not None:
        state.load_state_dict(run.saved_state())
    state.recharged = recharged
    if training.report_to is not None:
        accelerator.init_trackers("private-adapter", {"noise_multiplier": plan.noise_multiplier})
    fine_tune(accelerator, state, losses_of, plan, randomness, run, training)

    # Publish: the ledger, then the statement, then the weights that it accounts for.
    def publish():
        statement = run.publish(
            lambda folder: method.export(pipeline, folder), plan, randomness.is_private
        )
        facts = Facts(
            method=method.name,
            usage=method.usage,
            base_model=model.pretrained_model_name_or_path,
            pipeline=type(pipeline).__name__,
            prompts=training.validation_prompt,
            num_samples=training.num_validation_images,
            setup=setup_of(training, plan, method.settings, resolution),
            license=hub.hub_license,
        )
        with disk_errors_told(run.output_dir):
            write_durably(run.output_dir / "README.md", model_card(facts, statement))
            save_samples(pipeline, training, resolution)

    on_main_process(publish)
    if training.discard_latents:
        discard_copies(run.output_dir, latents)
    accelerator.print(
        f"saved the weights, privacy.json, README.md and samples/ in {run.output_dir}"
    )
    accelerator.end_training()
    if hub.push_to_hub and accelerator.is_main_process:  # nobody waits for the upload
        print(f"published {publish_model(run.output_dir, hub)}")


def start(training: TrainingArguments) -> tuple[Accelerator, list[FileLock]]:
    """Claim the output folder, seed what is not private, and set up the devices.

    Nobody else can claim the folder while what is returned lives.

    Raises:
        UsageError: see `claim_output_dir`; or there is no such tracker.
    """
    logs = private_folder(training.output_dir) / "logs"
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision,
            log_with=training.report_to,
            project_dir=logs,
            kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
        )
    except (ValueError, ImportError) as error:
        if training.report_to is None:
            raise
        raise UsageError(f"--report_to {training.report_to}: {error}") from error
    if training.seed is not None:
        set_seed(training.seed)
    lock = []
    on_main_process(lambda: lock.append(claim_output_dir(training)))
    return accelerator, lock


def rehearse(
    pipeline: DiffusionPipeline,
    engine: PerUnitGradients,
    draws: int,
    resolution: int,
    norms_only: bool = False,
) -> int:
    """One step on a blank image, before any private one is read; returns a unit's bytes.

    Raises:
        UsageError: a trainable layer is not used by this model.
        RuntimeError: a layer mixes rows of the batch.
    """
    unet, side = pipeline.unet, resolution // pipeline.vae_scale_factor
    latents = torch.zeros(draws, unet.config.in_channels, side, side, device=engine.device)
    ids = tokenize(pipeline, [""] * draws)
    timesteps = torch.zeros(draws, dtype=torch.long, device=engine.device)
    with engine.recording(1, norms_only) as record:
        text = encode_text(pipeline, ids, resolution)
        losses = denoising_loss(unet, pipeline.scheduler, latents, text, latents, timesteps)
        losses.mean().backward()
    return record.nbytes()


# What may change when a run is gone on with: where, how fast, and what is shown.
FREE_TO_CHANGE = {
    *("output_dir", "resume_from_checkpoint", "checkpointing_steps", "checkpoints_total_limit"),
    *("train_batch_size", "mixed_precision", "gradient_checkpointing", "strict_images", "seed"),
    *("validation_prompt", "num_validation_images", "report_to", "latents_dir", "discard_latents"),
}


def settings_of(name: str, own: object, data: DataArguments, training: TrainingArguments) -> dict:
    """The arguments that a checkpoint must agree with, as they come back from JSON; `own` are those
    of the method."""
    groups = {"method": own, "data": data, "training": training}
    settings = {
        group: {k: v for k, v in asdict(values).items() if k not in FREE_TO_CHANGE}
        for group, values in groups.items()
    }
    return json.loads(json.dumps(settings | {"name": name}))


def public_parameters(pipeline: DiffusionPipeline) -> list[torch.nn.Parameter]:
    """All weights of the pipeline, before an adapter joins them."""
    return [parameter for part in parts_of(pipeline) for parameter in part.parameters()]


def adapter_tensors(
    pipeline: DiffusionPipeline, public: list[torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """By name, what is trained or is not the public model's: all that a checkpoint must hold."""
    known = {id(parameter) for parameter in public}
    named = trained_modules(pipeline).named_parameters()
    return {name: p for name, p in named if p.requires_grad or id(p) not in known}


def training_state(
    engine: PerUnitGradients,
    adapter: dict[str, torch.Tensor],
    plan: PrivacyPlan,
    training: TrainingArguments,
) -> TrainingState:
    """Optimizer, schedule and moving average, at step 0."""
    optimizer = make_optimizer(training, engine.parameters, plan)
    lr_scheduler = get_scheduler(
        training.lr_scheduler,
        optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=plan.steps,
    )
    average = None
    if training.ema_decay:
        average = EMAModel(engine.parameters, decay=training.ema_decay)
    return TrainingState(engine, optimizer, lr_scheduler, average, adapter)


def fine_tune(
    accelerator: Accelerator,
    state: TrainingState,
    losses_of: UnitLosses,
    plan: PrivacyPlan,
    randomness: SecretRandomness,
    run: Run,
    training: TrainingArguments,
) -> None:
    """Take the private steps that are left, saving checkpoints; end with the weights to publish.

    Raises:
        Stopped: asked to by a signal, after a checkpoint.
    """
    limit = training.checkpoints_total_limit
    if run.checkpoint is None:
        run.save(0, state.state_dict, limit)  # from here on, an interrupted run can always go on
    with StopRequest() as request:
        for step in private_steps(
            accelerator, state, losses_of, plan, randomness, training.train_batch_size
        ):
            signal = request.anywhere(accelerator)
            if signal or step % training.checkpointing_steps == 0 or step == plan.steps:
                run.save(step, state.state_dict, limit)
            if signal:
                raise Stopped(
                    f"stopped after step {step} of {plan.steps}, at a checkpoint: go on with "
                    "--resume_from_checkpoint latest",
                    signal,
                )
    if state.average is not None:
        state.average.copy_to(state.engine.parameters)


def training_resolution(pipeline: DiffusionPipeline, data: DataArguments) -> int:
    """`--resolution`, or what the model makes.

    Raises:
        UsageError: the model cannot take that many pixels.
    """
    resolution = image_side(pipeline, data.resolution)
    check_resolution(pipeline, resolution)
    return resolution
