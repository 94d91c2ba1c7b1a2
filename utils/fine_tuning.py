"""The story that every private training script tells: load, adapt, plan, fine-tune, publish."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel

from utils.accounting import (
    PrivacyPlan,
    Spent,
    account,
    make_plan,
    plan_summary,
    privacy_statement,
)
from utils.arguments import DataArguments, ModelArguments, PrivacyArguments, TrainingArguments
from utils.data import PrivateSet, captions_of, keep_readable, load_rows, units_of
from utils.entropy import SecretRandomness, SecureRandomness
from utils.errors import UsageError
from utils.generation import generate, image_grid, use_dpm_solver
from utils.hub import claim_output_dir, write_card, write_statement
from utils.latents import Objective, encode_units, unit_losses
from utils.optimizers import make_optimizer
from utils.per_unit_gradients import PerUnitGradients
from utils.pipelines import (
    check_resolution,
    denoising_loss,
    encode_captions,
    load_pipeline,
    trained_modules,
)
from utils.training import train_privately

ARGUMENTS = (ModelArguments, DataArguments, PrivacyArguments, TrainingArguments)


@dataclass(frozen=True)
class Method:
    """All that tells one published method from another.

    Attributes:
        name: its tag on the model card.
        adapt: makes some weights of a frozen pipeline trainable.
        export: saves those weights to a folder.
        usage: Python for the card that makes `pipeline` from them; `{base}` is the base model.
    """

    name: str
    adapt: Callable[[StableDiffusionPipeline], None]
    export: Callable[[StableDiffusionPipeline, Path], None]
    usage: str


def run_method(
    method: Method,
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
) -> None:
    """Fine-tune a public pipeline on private images, and publish the result.

    Raises:
        UsageError: bad input of any kind, before anything is trained.
    """
    accelerator = start(training)
    randomness = secret_randomness(privacy)

    # Adapt the public model.
    pipeline = load_pipeline(model.pretrained_model_name_or_path, model.revision)
    resolution = training_resolution(pipeline, data)
    pipeline.to(accelerator.device)
    method.adapt(pipeline)
    if training.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    engine = PerUnitGradients(trained_modules(pipeline))
    unit_bytes = rehearse(pipeline, engine, privacy.noise_multiplicity, resolution)

    # Plan what will be spent.
    private_set, plan, spent = read_and_plan(accelerator, data, privacy, training)
    if privacy.dry_run:
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
    fine_tune(accelerator, pipeline, engine, private_set, plan, resolution, training, randomness)

    # Publish: the statement before the weights that it accounts for.
    if accelerator.is_main_process:
        output_dir = Path(training.output_dir)
        statement = privacy_statement(plan, randomness.is_private, spent)
        write_statement(statement, output_dir)
        method.export(pipeline, output_dir)
        base, prompt = model.pretrained_model_name_or_path, training.validation_prompt[0]
        write_card(base, statement, method.name, method.usage, prompt, output_dir)
        save_samples(pipeline, training)
        print(f"saved the weights, privacy.json, README.md and samples/ in {output_dir}")
    accelerator.end_training()


def start(training: TrainingArguments) -> Accelerator:
    """Claim the output folder, seed what is not private, and set up the devices.

    Raises:
        UsageError: the folder holds another run, a count is out of range, or no such tracker.
    """
    logs = Path(training.output_dir) / "private" / "logs"
    if training.train_batch_size < 1 or training.num_validation_images < 0:
        raise UsageError(
            "--train_batch_size must be at least 1, --num_validation_images at least 0"
        )
    try:
        accelerator = Accelerator(
            mixed_precision=training.mixed_precision, log_with=training.report_to, project_dir=logs
        )
    except (ValueError, ImportError) as error:
        raise UsageError(f"--report_to {training.report_to}: {error}") from error
    if training.seed is not None:
        set_seed(training.seed)
    if accelerator.is_main_process:
        claim_output_dir(training.output_dir)
    return accelerator


def read_and_plan(
    accelerator: Accelerator,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
) -> tuple[PrivateSet, PrivacyPlan, Spent]:
    """Load the private rows, and plan what will be spent on them.

    An impossible plan is refused before any image is read. Whatever `datasets` caches of the images
    stays under OUTPUT_DIR/private.

    Raises:
        UsageError: bad data or an impossible plan (see `load_rows`, `captions_of`, `make_plan`).
    """
    cache = Path(training.output_dir) / "private" / "cache"
    with accelerator.main_process_first():
        rows = load_rows(
            data.dataset_name, data.dataset_config_name, data.train_data_dir, data.split, cache
        )
    captions_of(rows, data.caption_column, data.label_column, data.caption_template)
    unit_of_row, steps = units_of(rows, data.privacy_unit_column), training.max_train_steps
    plan = make_plan(int(unit_of_row.max()) + 1, privacy, steps, data.privacy_unit_column)
    private_set = private_set_of(rows, data)
    if private_set.num_units != plan.num_units:
        plan = make_plan(private_set.num_units, privacy, steps, data.privacy_unit_column)
    return private_set, plan, account([plan.event()], plan.delta)


def private_set_of(rows: Dataset, data: DataArguments) -> PrivateSet:
    """The readable rows, with the caption and the privacy unit of each.

    Raises:
        UsageError: see `keep_readable`, `captions_of` and `units_of`.
    """
    rows, skipped = keep_readable(rows, data.image_column, data.strict_images)
    captions = captions_of(rows, data.caption_column, data.label_column, data.caption_template)
    unit_of_row = units_of(rows, data.privacy_unit_column)
    return PrivateSet(rows, data.image_column, captions, unit_of_row, skipped)


def rehearse(
    pipeline: StableDiffusionPipeline, engine: PerUnitGradients, draws: int, resolution: int
) -> int:
    """One step on a blank image, before any private one is read; returns a unit's bytes.

    Raises:
        UsageError: a trainable layer is not used by this model.
        RuntimeError: a layer mixes rows of the batch.
    """
    unet, side = pipeline.unet, resolution // pipeline.vae_scale_factor
    latents = torch.zeros(draws, unet.config.in_channels, side, side, device=engine.device)
    ids = encode_captions(pipeline.tokenizer, [""] * draws).to(engine.device)
    timesteps = torch.zeros(draws, dtype=torch.long, device=engine.device)
    with engine.recording(1) as record:
        embeddings = pipeline.text_encoder(ids)[0]
        losses = denoising_loss(unet, pipeline.scheduler, latents, embeddings, latents, timesteps)
        losses.mean().backward()
    return record.nbytes()


def describe(private_set: PrivateSet, plan, spent, engine: PerUnitGradients, nbytes: int) -> str:
    """The report of `--dry_run`, as JSON; `nbytes` is the memory of a micro-batch's gradients."""
    report = plan_summary(plan, spent) | {
        "unreadable_images": private_set.skipped,
        "trainable_parameters": engine.num_parameters,
        "per_unit_gradient_bytes": nbytes,
    }
    return json.dumps(report, indent=2)


def secret_randomness(privacy: PrivacyArguments) -> SecretRandomness:
    """The source of the noise and of the batches.

    Raises:
        UsageError: both reproducible and secure noise were asked for.
    """
    if not privacy.secure_noise:
        return SecretRandomness(privacy.debug_noise_seed)
    if privacy.debug_noise_seed is not None:
        raise UsageError("--secure_noise and --debug_noise_seed exclude each other")
    return SecureRandomness()


def fine_tune(
    accelerator: Accelerator,
    pipeline: StableDiffusionPipeline,
    engine: PerUnitGradients,
    private_set: PrivateSet,
    plan: PrivacyPlan,
    resolution: int,
    training: TrainingArguments,
    randomness: SecretRandomness,
) -> None:
    """Encode every image once, then train what `engine` covers by DP-SGD."""
    units = encode_units(
        pipeline,
        private_set,
        resolution,
        training.random_flip,
        show_progress=accelerator.is_main_process,
    )
    optimizer = make_optimizer(training, engine.parameters, plan)
    average = None
    if training.ema_decay:
        average = EMAModel(engine.parameters, decay=training.ema_decay)
        optimizer.register_step_post_hook(lambda *_: average.step(engine.parameters))
    lr_scheduler = get_scheduler(
        training.lr_scheduler,
        optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=plan.steps,
    )
    if training.report_to is not None:
        accelerator.init_trackers("private-adapter", {"noise_multiplier": plan.noise_multiplier})

    objective = Objective(plan.noise_multiplicity, training.timestep_sampling, training.snr_gamma)

    def losses_of(indices: torch.Tensor) -> torch.Tensor:
        return unit_losses(pipeline, units, indices, objective, randomness)

    train_privately(
        accelerator,
        engine,
        losses_of,
        plan,
        optimizer,
        lr_scheduler,
        randomness,
        training.train_batch_size,
    )
    if average is not None:
        average.copy_to(engine.parameters)


def training_resolution(pipeline: StableDiffusionPipeline, data: DataArguments) -> int:
    """`--resolution`, or what the model makes.

    Raises:
        UsageError: the model cannot take that many pixels.
    """
    native = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    resolution = native if data.resolution is None else data.resolution
    check_resolution(pipeline, resolution)
    return resolution


def save_samples(pipeline: StableDiffusionPipeline, training: TrainingArguments) -> None:
    """Draw images of the trained model into samples/, balanced over the prompts, and a grid."""
    folder = Path(training.output_dir) / "samples"
    folder.mkdir()
    prompts, count = training.validation_prompt, training.num_validation_images
    use_dpm_solver(pipeline)
    images = []
    for start in range(0, count, 16):
        indices = list(range(start, min(start + 16, count)))
        chosen = [prompts[i % len(prompts)] for i in indices]
        images += generate(pipeline, chosen, indices, training.seed or 0)
    for index, image in enumerate(images):
        image.save(folder / f"{index:04}.png")
    if images:
        columns = min(len(prompts), 10) if len(prompts) > 1 else 8
        image_grid(images, columns).save(folder / "grid.png")
