"""Tiny pipelines of the families of models, with random weights: their makers' config files, with
smaller numbers where those are sizes."""

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    AutoencoderKLFlux2,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizerFast,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from utils.models.public_models import build_tokenizer

WORDS = [f"the digit {d}" for d in range(10)]
SIDE = 32  # of an image, in pixels


LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
CHAT = (
    "{% for m in messages %}<|im_start|>{{m['role']}}\n{{m['content']}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DYNAMIC = {"shift": 3.0, "use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15}


def build_clip(tokenizer, width: int, kind=CLIPTextModelWithProjection):
    return kind(
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
    letters = [(letter, -3.0) for letter in LETTERS]
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


def build_qwen_tokenizer() -> Qwen2Tokenizer:
    vocabulary = {a: i for i, a in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocabulary["<|endoftext|>"] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHAT
    return tokenizer


def configure_qwen(tokenizer, layers: int, width: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
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
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4, "▁": 5}
    vocabulary |= {letter: len(vocabulary) + i for i, letter in enumerate(LETTERS)}
    vocabulary |= {f"<0x{i:02X}>": len(vocabulary) + i for i in range(256)}
    tokenizer = GemmaTokenizerFast(vocab=vocabulary, merges=[])
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


FAMILIES = {
    "sd3": build_sd3,
    "sd35": build_sd35,
    "sana": build_sana,
    "flux": build_flux,
    "klein": build_klein,
    "z_image": build_z_image,
}


def build_family(name: str) -> DiffusionPipeline:
    """The same weights each time, none of them zero: some start at zero, and would hide others."""
    torch.manual_seed(0)
    pipeline = FAMILIES[name]()
    for parameter in pipeline.transformer.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return pipeline
