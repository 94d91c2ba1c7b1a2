"""The model's own weights: what DP-LDM and DP-Diffusion train, and a LoRA on the text encoder."""

import json
from pathlib import Path

from diffusers import DiffusionPipeline
from peft import LoraConfig

from utils.arguments.methods import LdmArguments
from utils.errors import UsageError
from utils.files import PRIVATE_MARK
from utils.models.families import find_family
from utils.models.lora import write_lora
from utils.models.pipelines import trains_text


def unfreeze(
    pipeline: DiffusionPipeline, args: LdmArguments, selected: list[str] | None = None
) -> None:
    """Make the chosen weights of the denoiser trainable: of `selected` layers only, if given.

    Raises:
        UsageError: a block that is not there, or that holds no attention.
    """
    family, blocks = find_family(pipeline), args.trainable_blocks or [""]
    if selected is not None:
        modules = dict(family.denoiser.named_modules())
        unknown = [name for name in selected if name not in modules]
        if args.trainable_blocks or unknown:
            raise UsageError(
                f"--saliency_file selects {unknown[0]}, which this model does not have"
                if unknown
                else "give --saliency_file or --trainable_blocks, not both"
            )
        for name in selected:
            modules[name].weight.requires_grad_(True)
        blocks = []
    for block in blocks:
        chosen = [
            parameter
            for name, parameter in family.denoiser.named_parameters()
            if (not block or name.startswith(block + "."))
            and (args.trainable == "all" or family.is_attention(name))
        ]
        if not chosen:
            raise UsageError(
                f"--trainable_blocks {block} holds no {args.trainable} weights; there are: "
                f"{', '.join(family.list_blocks())}"
            )
        for parameter in chosen:
            parameter.requires_grad_(True)
    if args.train_text_encoder:
        if not family.can_train_text:
            raise UsageError(f"--train_text_encoder is not supported for {family.title}")
        if args.text_encoder_rank < 1:
            raise UsageError("--text_encoder_rank must be at least 1")
        pipeline.text_encoder.add_adapter(
            LoraConfig(
                r=args.text_encoder_rank,
                lora_alpha=args.text_encoder_rank,
                init_lora_weights="gaussian",
                target_modules=["q_proj", "k_proj", "v_proj", "out_proj"],
            )
        )


def describe_denoiser(pipeline: DiffusionPipeline) -> str:
    """Python that loads it: see `Facts.usage`."""
    family = find_family(pipeline)
    kind, part = type(family.denoiser).__name__, family.part
    usage = f"""{part} = {kind}.from_pretrained("{{adapter}}", subfolder="{part}")
pipeline = {{load}}({{base}}, {part}={part})"""
    if trains_text(pipeline):
        usage += '\npipeline.load_lora_weights("{adapter}")  # of the text encoder'
    return usage


def save_denoiser(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """Save the whole denoiser, which plain diffusers loads, and the text encoder's LoRA if any. It
    says of itself that it needs a statement (`PRIVATE_MARK`)."""
    family = find_family(pipeline)
    family.denoiser.save_pretrained(output_dir / family.part)
    config = output_dir / family.part / "config.json"
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)  # where the base model lies on this machine
    config.write_text(json.dumps(values | {PRIVATE_MARK: True}, indent=2) + "\n")
    if trains_text(pipeline):
        write_lora(pipeline, "text_encoder", output_dir)
