"""DP-LoRA: fine-tune a latent diffusion model on private images, with differential privacy.

    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml

    # Stable Diffusion on an image folder with captions in metadata.jsonl
    accelerate launch train_dp_lora.py \\
        --pretrained_model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --train_data_dir scans --caption_column text --resolution 512 \\
        --target_epsilon 8 --target_delta 1e-6 --expected_batch_size 1024 --max_train_steps 300 \\
        --noise_multiplicity 4 --mixed_precision bf16 --output_dir runs/scans

    # what would it cost? prints the plan and stops
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --dry_run

LoRA on the attention and projection layers of the U-Net, trained by DP-SGD (Tsai et al. 2025).
Writes pytorch_lora_weights.safetensors, which plain diffusers loads, the privacy statement
privacy.json, a model card and samples. No loss is shown: it is not private.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from utils.accounting import account, make_plan, plan_summary, privacy_statement
from utils.arguments import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
    option,
    parse,
)
from utils.data import captions_of, keep_readable, load_rows
from utils.entropy import SecretRandomness
from utils.errors import UsageError, run_script
from utils.generation import generate, image_grid, use_dpm_solver
from utils.hub import claim_output_dir, write_lora_card, write_statement
from utils.latents import encode_units, unit_losses
from utils.per_unit_gradients import PerUnitGradients
from utils.pipelines import DEFAULT_TARGETS, check_resolution, load_pipeline, resolve_targets
from utils.training import train_privately


@dataclass
class LoraArguments:
    """The adapter."""

    rank: int = option("rank of the adapter", 8)
    lora_alpha: int | None = option("scale of the adapter times its rank; default: the rank", None)
    target_modules: list[str] = option("layers to adapt, by suffix of their name", DEFAULT_TARGETS)


def add_lora(pipeline: StableDiffusionPipeline, args: LoraArguments) -> None:
    """Put a trainable LoRA beside the target modules; B starts at zero: nothing changes yet.

    Raises:
        UsageError: an unknown target, or a rank or alpha below 1.
    """
    if args.rank < 1 or (args.lora_alpha is not None and args.lora_alpha < 1):
        raise UsageError("--rank and --lora_alpha must be at least 1")
    targets = resolve_targets(pipeline.unet, args.target_modules)
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    pipeline.unet.add_adapter(
        LoraConfig(
            r=args.rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets
        )
    )


def save_lora(pipeline: StableDiffusionPipeline, output_dir: Path) -> None:
    """Save the adapter with its alpha, without which it would reload at the wrong scale."""
    StableDiffusionPipeline.save_lora_weights(
        output_dir,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        **_collate_lora_metadata({"unet": pipeline.unet}),
    )


def save_samples(pipeline, prompts: list[str], count: int, seed: int, output_dir: Path) -> None:
    """Draw `count` images of the trained model, balanced over `prompts`, and a grid of them."""
    folder = output_dir / "samples"
    folder.mkdir()
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    images = []
    use_dpm_solver(pipeline)
    for start in range(0, count, 16):
        part = chosen[start : start + 16]
        indices = list(range(start, start + len(part)))
        images += generate(pipeline, part, indices, seed)
    for index, image in enumerate(images):
        image.save(folder / f"{index:04}.png")
    image_grid(images, min(len(prompts), 10) if len(prompts) > 1 else 8).save(folder / "grid.png")


def main():
    model, data, privacy, lora, training = parse(
        ModelArguments,
        DataArguments,
        PrivacyArguments,
        LoraArguments,
        TrainingArguments,
        description=__doc__,
    )
    accelerator = Accelerator(mixed_precision=training.mixed_precision, log_with=training.report_to)
    if privacy.target_delta is None:
        raise UsageError("give --target_delta, below 1/N")
    if training.seed is not None:
        set_seed(training.seed)

    # Load the private rows; whatever `datasets` caches of them stays under private/.
    output_dir = Path(training.output_dir)
    if accelerator.is_main_process:
        claim_output_dir(output_dir)
    with accelerator.main_process_first():
        rows = load_rows(
            data.dataset_name,
            data.dataset_config_name,
            data.train_data_dir,
            data.split,
            cache_dir=output_dir / "private" / "cache",
        )
    captions_of(rows, data.caption_column, data.label_column, data.caption_template)
    rows, skipped = keep_readable(rows, data.image_column, data.strict_images)
    captions = captions_of(rows, data.caption_column, data.label_column, data.caption_template)

    # Adapt the public model.
    pipeline = load_pipeline(model.pretrained_model_name_or_path, model.revision)
    resolution = data.resolution or pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    check_resolution(pipeline, resolution)
    pipeline.to(accelerator.device)
    add_lora(pipeline, lora)
    if training.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    engine = PerUnitGradients(pipeline.unet)

    # Plan what will be spent.
    plan = make_plan(
        num_units=len(rows),
        expected_batch_size=privacy.expected_batch_size,
        steps=training.max_train_steps,
        max_grad_norm=privacy.max_grad_norm,
        noise_multiplicity=privacy.noise_multiplicity,
        delta=privacy.target_delta,
        target_epsilon=privacy.target_epsilon,
        noise_multiplier=privacy.noise_multiplier,
    )
    spent = account([plan.event()], plan.delta)
    if privacy.dry_run:
        buffer_bytes = 4 * engine.num_parameters * min(training.train_batch_size, len(rows))
        report = plan_summary(plan, spent) | {
            "trainable_parameters": engine.num_parameters,
            "unreadable_images": skipped,
            "per_unit_gradient_bytes": buffer_bytes,
        }
        accelerator.print(json.dumps(report, indent=2))
        return
    accelerator.print(
        f"{plan.num_units} private images ({skipped} unreadable, skipped), "
        f"{engine.num_parameters:,} trainable parameters, noise multiplier "
        f"{plan.noise_multiplier:.4f}, epsilon {spent.add_or_remove_one:.3f} "
        f"at delta {plan.delta:g}"
    )

    # Encode every image once, then train.
    units = encode_units(
        pipeline,
        rows,
        data.image_column,
        captions,
        resolution,
        training.random_flip,
        show_progress=accelerator.is_main_process,
    )
    randomness = SecretRandomness(privacy.debug_noise_seed)
    optimizer = torch.optim.AdamW(
        engine.parameters,
        lr=training.learning_rate,
        betas=(training.adam_beta1, training.adam_beta2),
        weight_decay=training.adam_weight_decay,
        eps=training.adam_epsilon,
    )
    lr_scheduler = get_scheduler(
        training.lr_scheduler,
        optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=plan.steps,
    )
    if training.report_to:
        accelerator.init_trackers("dp-lora", config=plan_summary(plan, spent))

    def losses_of(indices: torch.Tensor) -> torch.Tensor:
        return unit_losses(
            pipeline.unet,
            pipeline.scheduler,
            units,
            indices,
            plan.noise_multiplicity,
            randomness,
            accelerator.device,
        )

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

    # Publish: the statement before the weights that it accounts for.
    if accelerator.is_main_process:
        statement = privacy_statement(plan, randomness.is_private, spent)
        write_statement(statement, output_dir)
        save_lora(pipeline, output_dir)
        prompts = training.validation_prompt
        write_lora_card(model.pretrained_model_name_or_path, statement, prompts[0], output_dir)
        save_samples(
            pipeline, prompts, training.num_validation_images, training.seed or 0, output_dir
        )
        print(f"saved the adapter, privacy.json, README.md and samples/ in {output_dir}")
    accelerator.wait_for_everyone()
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
