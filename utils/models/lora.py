"""LoRA on the denoiser: what DP-LoRA and DP-SAPF train."""

from pathlib import Path

from diffusers import DiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from utils.arguments.methods import LoraArguments
from utils.models.families import find_family
from utils.models.loda.loda import save_adapter
from utils.models.targets import choose_targets, inject_adapter, resolve_targets


def add_lora(pipeline: DiffusionPipeline, args: LoraArguments) -> None:
    """Put a trainable LoRA beside the target modules; B starts at zero: nothing changes yet.

    Raises:
        UsageError: an unknown target.
    """
    family = find_family(pipeline)
    targets = resolve_targets(family.denoiser, choose_targets(args, pipeline).target_modules)
    alpha = args.rank if args.lora_alpha is None else args.lora_alpha
    config = LoraConfig(
        r=args.rank, lora_alpha=alpha, init_lora_weights="gaussian", target_modules=targets
    )
    inject_adapter(family.denoiser, config)
    if args.freeze_lora_a:
        for name, parameter in family.denoiser.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)


def loads_lora(pipeline: DiffusionPipeline | type[DiffusionPipeline]) -> bool:
    """Does plain diffusers load a LoRA into such a pipeline?"""
    return hasattr(pipeline, "load_lora_weights")


def describe_lora(pipeline: DiffusionPipeline) -> str:
    """Python that loads it: see `Facts.usage`. Some of diffusers' pipelines load no LoRA."""
    if not loads_lora(pipeline):
        part = f"pipeline.{find_family(pipeline).part}"
        return f"""from peft import PeftModel

pipeline = {{load}}({{base}})
{part} = PeftModel.from_pretrained({part}, "{{adapter}}")"""
    return """pipeline = {load}({base})
pipeline.load_lora_weights("{adapter}")"""


def save_lora(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """Save the adapter with its alpha, without which it would reload at the wrong scale: as plain
    diffusers loads it, or else as plain peft does."""
    family = find_family(pipeline)
    if not loads_lora(pipeline):
        save_adapter(family.denoiser, output_dir)
        return
    write_lora(pipeline, family.part, output_dir)


def write_lora(pipeline: DiffusionPipeline, part: str, output_dir: Path) -> None:
    """Save the LoRA of one part of a pipeline as plain diffusers loads it, alpha included."""
    adapted = getattr(pipeline, part)
    for config in adapted.peft_config.values():  # transformers writes where it lies on this disk
        config.base_model_name_or_path = None
    pipeline.save_lora_weights(
        output_dir,
        **{f"{part}_lora_layers": get_peft_model_state_dict(adapted)},
        **_collate_lora_metadata({part: adapted}),
    )
