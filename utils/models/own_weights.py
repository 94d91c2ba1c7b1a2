"""The model's own weights: what DP-LDM and DP-Diffusion train, and a LoRA on the text encoder."""

import json
from pathlib import Path

from diffusers import StableDiffusionPipeline
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from utils.arguments.methods import LdmArguments
from utils.errors import UsageError
from utils.models.pipelines import is_xl, trains_text


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
            known = [n for n, _ in unet.named_modules() if n.count(".") == 1 and "_blocks" in n]
            raise UsageError(
                f"--trainable_blocks {block} holds no {args.trainable} weights; there are: "
                f"{', '.join([*known, 'mid_block'])}"
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
