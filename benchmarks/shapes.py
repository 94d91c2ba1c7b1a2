"""The denoisers that steps are timed on: how each is made, and inputs for it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDPMScheduler, SD3Transformer2DModel, UNet2DConditionModel
from torch import nn

from utils.gradients.fast_linear import use_fast_linear
from utils.gradients.short_attention import use_fast_attention
from utils.models.families import Family, StableDiffusion, StableDiffusion3, StableDiffusionXL
from utils.models.processes import Flow, Process, read_process

ROOT = Path(__file__).resolve().parent.parent
XL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2048,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
# Stable Diffusion 3.5 medium, but for 4 of its 24 blocks.
SD35 = {
    "num_layers": 4,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "caption_projection_dim": 1536,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 384,
    "dual_attention_layers": (0, 1),
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True)
class Shape:
    """A denoiser, and what a step on it is.

    Attributes:
        build: makes it. family: whose it is. process: how it is trained.
        units, draws: of a micro-batch. side: of its latents. text: what conditions it, by name:
            [rows, ...] of these sizes.
    """

    build: Callable[[], nn.Module]
    family: type[Family]
    process: Process
    units: int
    draws: int
    side: int
    text: dict[str, tuple[int, ...]]

    def build_for_steps(self) -> nn.Module:
        """Laid out as `load_pipeline` does it, for every kind of step; in training mode, since
        Opacus ignores layers in eval mode."""
        denoiser = self.build()
        use_fast_linear(denoiser)
        use_fast_attention()
        for module in denoiser.modules():
            if type(module) is nn.GroupNorm:
                module.register_forward_pre_hook(require_input_gradient)
        return denoiser.to(memory_format=torch.channels_last).float().train()


def require_input_gradient(norm: nn.GroupNorm, inputs: tuple[torch.Tensor]):
    """PyTorch 2.13 crashes in the backward pass of a norm whose input needs no gradient (CPU,
    channels last): such an input gets one."""
    (x,) = inputs
    if norm.weight.requires_grad and not x.requires_grad:
        return (x.detach().requires_grad_(),)


def load_digits() -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(ROOT / "examples" / "digits" / "base" / "unet")


DDPM = read_process(DDPMScheduler())
SHAPES = {
    "tiny": Shape(
        load_digits, StableDiffusion, DDPM, 32, 4, 8, {"encoder_hidden_states": (8, 128)}
    ),
    "sd15": Shape(
        lambda: UNet2DConditionModel(cross_attention_dim=768),  # the defaults: Stable Diffusion 1's
        *(StableDiffusion, DDPM, 4, 1, 32),
        {"encoder_hidden_states": (77, 768)},
    ),
    "sdxl": Shape(
        lambda: UNet2DConditionModel(**XL),
        *(StableDiffusionXL, DDPM, 4, 1, 128),
        {"encoder_hidden_states": (77, 2048), "text_embeds": (1280,), "time_ids": (6,)},
    ),
    "sd3": Shape(
        lambda: SD3Transformer2DModel(sample_size=128, **SD35),
        *(StableDiffusion3, Flow(3.0), 4, 1, 32),
        {"encoder_hidden_states": (77 + 256, 4096), "pooled_projections": (2048,)},
    ),
}
