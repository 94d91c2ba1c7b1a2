"""LoDA on a pipeline's U-Net: what DP-LoDA trains, and what it publishes."""

import shutil
from pathlib import Path

from diffusers import StableDiffusionPipeline

from utils.arguments.methods import LoDAArguments
from utils.errors import UsageError
from utils.models.loda import loda
from utils.models.pipelines import is_xl
from utils.models.targets import resolve_targets


def add_loda(pipeline: StableDiffusionPipeline, args: LoDAArguments) -> None:
    """Put a trainable LoDA beside the target modules; B starts at zero: nothing changes yet.

    Raises:
        UsageError: an unknown target, a rank below 1, or Stable Diffusion XL.
    """
    if is_xl(pipeline):
        raise UsageError("DP-LoDA of Stable Diffusion XL is not supported: use train_dp_lora.py")
    targets = resolve_targets(pipeline.unet, args.target_modules)
    try:
        config = loda.LoDAConfig(
            r=args.rank,
            target_modules=targets,
            activation=args.activation,
            negative_slope=args.negative_slope,
        )
    except ValueError as error:
        raise UsageError(f"--rank {args.rank}: {error}") from error
    pipeline.unet.add_adapter(config)


def save_loda(pipeline: StableDiffusionPipeline, output_dir: Path) -> None:
    """Save the adapter, and the two files that load it elsewhere."""
    loda.save_loda(pipeline.unet, output_dir)
    for name in ("loda.py", "pipeline.py"):
        shutil.copy(Path(__file__).with_name(name), output_dir / name)
