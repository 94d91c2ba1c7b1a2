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

from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from utils.arguments import option, parse
from utils.errors import UsageError, run_script
from utils.fine_tuning import ARGUMENTS, Method, run_method
from utils.pipelines import DEFAULT_TARGETS, resolve_targets


@dataclass
class LoraArguments:
    """The adapter."""

    rank: int = option("rank of the adapter", 8)
    lora_alpha: int | None = option("scale of the adapter times its rank; default: the rank", None)
    target_modules: list[str] = option("layers to adapt, by suffix of their name", DEFAULT_TARGETS)
    freeze_lora_a: bool = option(
        "train B only, and leave A at its random start: fewer weights, so less noise in all "
        "(FFA-LoRA, Sun et al. 2024)",
        False,
    )


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
    if args.freeze_lora_a:
        for name, parameter in pipeline.unet.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)


def save_lora(pipeline: StableDiffusionPipeline, output_dir: Path) -> None:
    """Save the adapter with its alpha, without which it would reload at the wrong scale."""
    StableDiffusionPipeline.save_lora_weights(
        output_dir,
        unet_lora_layers=get_peft_model_state_dict(pipeline.unet),
        **_collate_lora_metadata({"unet": pipeline.unet}),
    )


USAGE = """from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained("{base}")
pipeline.load_lora_weights("this/adapter")"""


def main():
    *arguments, lora = parse(*ARGUMENTS, LoraArguments, description=__doc__)
    method = Method("dp-lora", lambda pipeline: add_lora(pipeline, lora), save_lora, USAGE)
    run_method(method, *arguments)


if __name__ == "__main__":
    run_script(main)
