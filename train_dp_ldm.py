"""DP-LDM and DP-Diffusion: fine-tune a diffusion model's own weights by DP-SGD.

    accelerate launch train_dp_ldm.py --config examples/digits/dp_ldm.yaml

    # only the attention of the second down block and of the middle
    accelerate launch train_dp_ldm.py --config examples/digits/dp_ldm.yaml \\
        --trainable_blocks down_blocks.1 mid_block

    # DP-Diffusion: every weight of the U-Net
    accelerate launch train_dp_ldm.py --config examples/digits/dp_ldm.yaml --trainable all

Attention modules only (Liu et al. 2023, "Differentially private latent diffusion models"), or all
(Ghalebikesabi et al. 2023). Writes the whole U-Net to unet/, which
`UNet2DConditionModel.from_pretrained` loads, the privacy statement, a model card and samples.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from utils.arguments import option, parse
from utils.errors import UsageError, run_script
from utils.fine_tuning import ARGUMENTS, Method, run_method
from utils.pipelines import is_xl, trains_text
from utils.selection import read_saliency

NAMES = {"attention": "dp-ldm", "all": "dp-diffusion"}
USAGE = """from diffusers import {pipeline}, UNet2DConditionModel

unet = UNet2DConditionModel.from_pretrained("{adapter}", subfolder="unet")
pipeline = {pipeline}.from_pretrained("{base}", unet=unet)"""
LORA_USAGE = """
pipeline.load_lora_weights("{adapter}")  # of the text encoder"""


@dataclass
class LdmArguments:
    """Which weights train."""

    trainable: str = option(
        "attention blocks (DP-LDM) or the whole U-Net (DP-Diffusion)",
        "attention",
        choices=["attention", "all"],
    )
    trainable_blocks: list[str] | None = option(
        "only within these parts, such as down_blocks.1 or mid_block; default: everywhere", None
    )
    train_text_encoder: bool = option(
        "train the conditioning too: a LoRA on the text encoder, under the same clip", False
    )
    text_encoder_rank: int = option("rank of that LoRA", 4)


def unfreeze(
    pipeline: StableDiffusionPipeline, args: LdmArguments, selected: list[str] | None = None
) -> None:
    """Make the chosen weights of the U-Net trainable: of `selected` layers only, if given.

    Raises:
        UsageError: a block that is not there, or that holds no attention.
    """
    unet, blocks = pipeline.unet, args.trainable_blocks or [""]
    if selected is not None:
        modules = dict(unet.named_modules())
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
            for name, parameter in unet.named_parameters()
            if (not block or name.startswith(block + "."))
            and (args.trainable == "all" or ".attentions." in name)
        ]
        if not chosen:
            there = [n for n, _ in unet.named_modules() if n.count(".") == 1 and "_blocks" in n]
            raise UsageError(
                f"--trainable_blocks {block} holds no {args.trainable} weights; there are: "
                f"{', '.join([*there, 'mid_block'])}"
            )
        for parameter in chosen:
            parameter.requires_grad_(True)
    if args.train_text_encoder:
        if is_xl(pipeline):
            raise UsageError("--train_text_encoder is not supported for Stable Diffusion XL")
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


def save_unet(pipeline: StableDiffusionPipeline, output_dir: Path) -> None:
    """Save the whole U-Net, which plain diffusers loads, and the text encoder's LoRA if any."""
    pipeline.unet.save_pretrained(output_dir / "unet")
    config = output_dir / "unet" / "config.json"
    values = json.loads(config.read_text())
    values.pop("_name_or_path", None)  # where the base model lies on this machine
    config.write_text(json.dumps(values, indent=2) + "\n")
    if trains_text(pipeline):
        StableDiffusionPipeline.save_lora_weights(
            output_dir,
            text_encoder_lora_layers=get_peft_model_state_dict(pipeline.text_encoder),
            **_collate_lora_metadata({"text_encoder": pipeline.text_encoder}),
        )


def main():
    model, data, privacy, training, hub, args = parse(*ARGUMENTS, LdmArguments, description=__doc__)
    selected = None
    if privacy.saliency_file is not None:
        selected = read_saliency(privacy.saliency_file).selected
    usage = USAGE + (LORA_USAGE if args.train_text_encoder else "")
    method = Method(
        NAMES[args.trainable],
        lambda pipeline: unfreeze(pipeline, args, selected),
        save_unet,
        usage,
        args,
    )
    run_method(method, model, data, privacy, training, hub)


if __name__ == "__main__":
    run_script(main)
