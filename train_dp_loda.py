"""DP-LoDA: low-dimensional adapters beside a frozen diffusion model, trained by DP-SGD.

    accelerate launch train_dp_loda.py --config examples/digits/dp_loda.yaml

    # what would it cost? prints the plan and stops
    accelerate launch train_dp_loda.py --config examples/digits/dp_loda.yaml --dry_run

Beside every frozen convolution and linear layer runs B(LeakyReLU(A(x))) with r channels between
(Liu et al., "Efficient differentially private fine-tuning of diffusion models", section II). Writes
adapter_config.json and adapter_model.safetensors, with loda.py and pipeline.py beside them so that
people without this repository can load it, the privacy statement, a model card and samples.
"""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from diffusers import StableDiffusionPipeline

from utils import loda
from utils.arguments import option, parse
from utils.errors import UsageError, run_script
from utils.fine_tuning import ARGUMENTS, Method, run_method
from utils.pipelines import ALL_TARGETS, is_xl, resolve_targets
from utils.selection import read_saliency

USAGE = """from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained(
    "{base}", custom_pipeline="{adapter}", trust_remote_code=True
)
pipeline.load_loda("{adapter}")"""


@dataclass
class LoDAArguments:
    """The adapter."""

    rank: int = option("r, the channels between A and B", 4)
    target_modules: list[str] = option("layers to adapt, by suffix of their name", ALL_TARGETS)
    activation: str = option(
        "between A and B; identity makes it a LoRA", "leaky_relu", choices=list(loda.ACTIVATIONS)
    )
    negative_slope: float = option("slope of the leaky_relu below zero", 0.1)


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
    utils = Path(loda.__file__).parent
    shutil.copy(utils / "loda.py", output_dir / "loda.py")
    shutil.copy(utils / "loda_pipeline.py", output_dir / "pipeline.py")


def main():
    model, data, privacy, training, hub, args = parse(
        *ARGUMENTS, LoDAArguments, description=__doc__
    )
    if privacy.saliency_file is not None:
        args = replace(args, target_modules=read_saliency(privacy.saliency_file).selected)
    method = Method("dp-loda", lambda pipeline: add_loda(pipeline, args), save_loda, USAGE, args)
    run_method(method, model, data, privacy, training, hub)


if __name__ == "__main__":
    run_script(main)
