"""LoDA on a pipeline's denoiser: what DP-LoDA trains, and what it publishes."""

import shutil
from pathlib import Path

from diffusers import DiffusionPipeline

from utils.arguments.methods import LoDAArguments
from utils.errors import UsageError
from utils.models.families import find_family
from utils.models.loda import loda
from utils.models.targets import choose_targets, inject_adapter, resolve_targets


def add_loda(pipeline: DiffusionPipeline, args: LoDAArguments) -> None:
    """Put a trainable LoDA beside the target modules; B starts at zero: nothing changes yet.

    Raises:
        UsageError: an unknown target, a rank below 1, or Stable Diffusion XL.
    """
    family = find_family(pipeline)
    if not family.can_loda:
        raise UsageError(f"DP-LoDA of {family.title} is not supported: use train_dp_lora.py")
    targets = resolve_targets(family.denoiser, choose_targets(args, pipeline).target_modules)
    try:
        config = loda.LoDAConfig(
            r=args.rank,
            target_modules=targets,
            activation=args.activation,
            negative_slope=args.negative_slope,
        )
    except ValueError as error:
        raise UsageError(f"--rank {args.rank}: {error}") from error
    inject_adapter(family.denoiser, config)


def describe_loda(pipeline: DiffusionPipeline) -> str:
    """Python that loads it: see `Facts.usage`. Stable Diffusion has a pipeline for it."""
    family = find_family(pipeline)
    if family.has_loda_pipeline:
        return """pipeline = DiffusionPipeline.from_pretrained(
    {base}, custom_pipeline="{adapter}", trust_remote_code=True
)
pipeline.load_loda("{adapter}")"""
    return f"""from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module

load_loda = get_class_from_dynamic_module(
    "{{adapter}}", "loda.py", class_name="load_loda", trust_remote_code=True
)
pipeline = {{load}}({{base}})
load_loda(pipeline.{family.part}, "{{adapter}}")"""


def save_loda(pipeline: DiffusionPipeline, output_dir: Path) -> None:
    """Save the adapter, and the files that load it elsewhere."""
    family = find_family(pipeline)
    loda.save_adapter(family.denoiser, output_dir)
    for name in ["loda.py", *(["pipeline.py"] if family.has_loda_pipeline else [])]:
        shutil.copy(Path(__file__).with_name(name), output_dir / name)
