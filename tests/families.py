"""Tiny pipelines of the families of models, with random weights: their makers' config files, with
smaller numbers where those are sizes."""

import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from utils.models.public_models import build_tokenizer

WORDS = [f"the digit {d}" for d in range(10)]
SIDE = 16  # of an image, in pixels


def build_clip(tokenizer, width: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tokenizer.model_max_length,
            projection_dim=width,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_t5() -> tuple[T5EncoderModel, T5TokenizerFast]:
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return T5EncoderModel(config), T5TokenizerFast(vocab=pieces, extra_ids=0)


def build_sd_vae(**config) -> AutoencoderKL:
    """The autoencoder of Stable Diffusion 3 and FLUX.1, which halves the resolution once here."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **config,
    )


def build_sd3(**newer) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 medium; `newer`: of its transformer's config."""
    clip, (t5, t5_tokenizer) = build_tokenizer(WORDS, 600, 77), build_t5()
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=32,
        caption_projection_dim=32,
        pooled_projection_dim=32,
        pos_embed_max_size=12,
        **newer,
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
        vae=build_sd_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=build_clip(clip, 16),
        tokenizer=clip,
        text_encoder_2=build_clip(clip, 16),
        tokenizer_2=clip,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    )


def build_sd35() -> StableDiffusion3Pipeline:
    """Stable Diffusion 3.5 medium: a second attention in some blocks, and RMS norms."""
    return build_sd3(dual_attention_layers=(0,), qk_norm="rms_norm")


FAMILIES = {"sd3": build_sd3, "sd35": build_sd35}


def build_family(name: str) -> DiffusionPipeline:
    """The same weights each time, none of them zero: some start at zero, and would hide others."""
    torch.manual_seed(0)
    pipeline = FAMILIES[name]()
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return pipeline
