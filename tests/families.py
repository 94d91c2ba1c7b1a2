"""Tiny pipelines of the families of models, with random weights: their makers' config files, with
smaller numbers where those are sizes."""

import json
import re
from pathlib import Path

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from transformers import (
    CLIPTextModel,
    Gemma2Config,
    Gemma2Model,
    Qwen3ForCausalLM,
    Qwen3Model,
)

from tests.family_parts import (
    WORDS,
    build_clip,
    build_gemma_tokenizer,
    build_qwen_tokenizer,
    build_sd_vae,
    build_t5,
    configure_qwen,
)
from utils.models.public_models import build_autoencoder, build_tokenizer

SIDE = 32  # of an image, in pixels
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


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


def build_flux() -> FluxPipeline:
    """FLUX.1 [dev]."""
    clip, (t5, t5_tokenizer) = build_tokenizer(WORDS, 600, 77), build_t5()
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=build_sd_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=build_clip(clip, 16, CLIPTextModel),
        tokenizer=clip,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=FluxTransformer2DModel(
            patch_size=1,
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 4, 8),
        ),
    )


def build_klein() -> Flux2KleinPipeline:
    """FLUX.2 [klein] base: text from three layers of Qwen3."""
    tokenizer = build_qwen_tokenizer()
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        latent_channels=32,
        norm_num_groups=4,
    )
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    return Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=vae,
        text_encoder=Qwen3ForCausalLM(configure_qwen(tokenizer, 28, 16)),
        tokenizer=tokenizer,
        transformer=Flux2Transformer2DModel(
            patch_size=1,
            in_channels=128,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=48,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        ),
    )


def build_z_image() -> ZImagePipeline:
    tokenizer = build_qwen_tokenizer()
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=build_sd_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=Qwen3Model(configure_qwen(tokenizer, 2, 32)),
        tokenizer=tokenizer,
        transformer=ZImageTransformer2DModel(
            in_channels=16,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=[4, 6, 6],
            axes_lens=[1024, 32, 32],
        ),
    )


def build_sana() -> SanaPipeline:
    """Its sampler is DPM-Solver++ on a flow, and its text encoder Gemma 2."""
    tokenizer = build_gemma_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
    )
    vae = AutoencoderDC(
        in_channels=3,
        latent_channels=32,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 32),
        decoder_block_out_channels=(8, 32),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=Gemma2Model(config),
        vae=vae,
        transformer=SanaTransformer2DModel(
            in_channels=32,
            out_channels=32,
            num_attention_heads=4,
            attention_head_dim=8,
            num_layers=2,
            num_cross_attention_heads=4,
            cross_attention_head_dim=8,
            cross_attention_dim=32,
            caption_channels=32,
            sample_size=8,
        ),
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def build_pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma at 1024 pixels, and its sampler."""
    t5, tokenizer = build_t5()
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=t5,
        vae=build_autoencoder((8, 16)),
        transformer=PixArtTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=32,
            sample_size=16,
            interpolation_scale=2,
            caption_channels=32,
            use_additional_conditions=False,
        ),
        scheduler=DPMSolverMultistepScheduler(beta_start=0.0001, beta_end=0.02),
    )


ANIMALS = {i: f"animal {i}, creature {i}" for i in range(1000)}


def build_dit() -> DiTPipeline:
    """DiT XL/2 at 256 pixels: a thousand classes, some of which have several names."""
    return DiTPipeline(
        transformer=DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            sample_size=16,
        ),
        vae=build_autoencoder((8, 16)),
        scheduler=DDIMScheduler(beta_start=0.0001, beta_end=0.02, clip_sample=False),
        id2label=ANIMALS,
    )


FAMILIES = {
    "sd3": build_sd3,
    "sd35": build_sd35,
    "sana": build_sana,
    "flux": build_flux,
    "klein": build_klein,
    "z_image": build_z_image,
    "pixart": build_pixart,
    "dit": build_dit,
}


def build_family(name: str) -> DiffusionPipeline:
    """The same weights each time, none of them zero: some start at zero, and would hide others."""
    torch.manual_seed(0)
    pipeline = FAMILIES[name]()
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return pipeline


def save_family(name: str, folder: Path, dtype: torch.dtype = torch.float32) -> None:
    """As its makers ship it, most in half precision: two under the name that their transformers'
    class had before, and DiT with the names of its classes, which diffusers does not save."""
    build_family(name).to(dtype).save_pretrained(folder)
    if name in ("pixart", "dit"):
        for path in (folder / "model_index.json", folder / "transformer" / "config.json"):
            content = re.sub(r"(PixArt|DiT)(Transformer2DModel)", r"\2", path.read_text())
            path.write_text(content)
    if name == "dit":
        index = folder / "model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": ANIMALS}))
