"""Stable Diffusion as its makers ship it: the folders, the names of files and the config keys of
SD 1.5, 2.1, 2.1-base, SDXL base, SDXL Turbo and LCM, with tiny random weights.

Only what makes a model small was changed (widths, depths, head counts, resolutions).
"""

import json
import shutil
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from utils.models.public_models import build_tokenizer

SIDE = 32  # pixels of a tiny model's images
BETAS = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
EULER = {
    **BETAS,
    "interpolation_type": "linear",
    "prediction_type": "epsilon",
    "sample_max_value": 1.0,
    "timestep_spacing": "leading",
    "use_karras_sigmas": False,
}
UNET = {
    "act_fn": "silu",
    "center_input_sample": False,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 1,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 4,
    "out_channels": 4,
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "block_out_channels": [8, 16],
    "sample_size": SIDE // 2,
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
}
UNET_2 = {
    **UNET,
    "attention_head_dim": [2, 4],
    "dual_cross_attention": False,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "use_linear_projection": True,
}
UNET_XL = {
    **UNET_2,
    "addition_embed_type": "text_time",
    "addition_embed_type_num_heads": 64,
    "addition_time_embed_dim": 8,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_dim": 48,
    "cross_attention_norm": None,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "mid_block_only_cross_attention": None,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "projection_class_embeddings_input_dim": 24 + 6 * 8,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": [1, 2],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "upcast_attention": None,
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "out_channels": 3,
    "sample_size": SIDE,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
VAE_XL = {**VAE, "force_upcast": True, "scaling_factor": 0.13025}
TEXT = {  # the keys of CLIP's and OpenCLIP's configs
    "attention_dropout": 0.0,
    "bos_token_id": 0,  # 0 and 2 are what they say, and not what the tokenizer gives
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 16,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 32,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "projection_dim": 16,
    "torch_dtype": "float32",
    "transformers_version": "4.22.0.dev0",
}
TEXT_2 = {**TEXT, "hidden_act": "gelu", "projection_dim": 24}
TEXT_XL_2 = {**TEXT_2, "hidden_size": 32, "torch_dtype": "float16", "intermediate_size": 64}
PIPELINE = {
    "feature_extractor": ["transformers", "CLIPImageProcessor"],
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
CHECKED = {
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    # of which transformers kept only the newer name
    "feature_extractor": ["transformers", "CLIPFeatureExtractor"],
}
XL = {
    "_class_name": "StableDiffusionXLPipeline",
    "_diffusers_version": "0.19.0.dev0",
    "force_zeros_for_empty_prompt": True,
    "add_watermarker": None,
    "scheduler": ["diffusers", "EulerDiscreteScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SD = {"_class_name": "StableDiffusionPipeline", "_diffusers_version": "0.6.0", **PIPELINE}
V_PREDICTION = {"prediction_type": "v_prediction"}
# model_index.json, scheduler, U-Net, text encoders, autoencoder
LAYOUTS = {
    "sd15": (SD | CHECKED, {"_class_name": "PNDMScheduler", **BETAS}, UNET, [TEXT], VAE),
    "sd21_base": (
        SD | {"_diffusers_version": "0.10.0.dev0", **CHECKED, "safety_checker": [None, None]},
        {"_class_name": "PNDMScheduler", "prediction_type": "epsilon", **BETAS},
        UNET_2,
        [TEXT_2],
        VAE,
    ),
    "sd21": (
        SD | {"scheduler": ["diffusers", "DDIMScheduler"], "requires_safety_checker": False},
        {"_class_name": "DDIMScheduler", **V_PREDICTION, **BETAS},
        {**UNET_2, "upcast_attention": True},
        [TEXT_2],
        VAE,
    ),
    "sdxl": (
        XL,
        {"_class_name": "EulerDiscreteScheduler", **EULER},
        UNET_XL,
        [TEXT, TEXT_XL_2],
        VAE_XL,
    ),
    "sdxl_turbo": (
        XL | {"scheduler": ["diffusers", "EulerAncestralDiscreteScheduler"]},
        {
            "_class_name": "EulerAncestralDiscreteScheduler",
            **EULER,
            "timestep_spacing": "trailing",
            "rescale_betas_zero_snr": False,
            "sigma_max": None,
            "sigma_min": None,
            "timestep_type": "discrete",
        },
        UNET_XL,
        [TEXT, TEXT_XL_2],
        VAE_XL,
    ),
    "lcm": (
        SD | {"_class_name": "LatentConsistencyModelPipeline", **CHECKED}
        | {"scheduler": ["diffusers", "LCMScheduler"]},
        {
            "_class_name": "LCMScheduler",
            **BETAS,
            "original_inference_steps": 50,
            "prediction_type": "epsilon",
            "rescale_betas_zero_snr": False,
            "timestep_spacing": "leading",
        },
        {**UNET, "time_cond_proj_dim": 32},
        [TEXT],
        VAE,
    ),
}  # fmt: skip


def build_layout(name: str, folder: Path, suffix: str = ".safetensors", variant: str = "") -> Path:
    """Write the folder of `name`, its weights as `.safetensors` or `.bin`, perhaps as a variant."""
    index, scheduler, unet, texts, vae = LAYOUTS[name]
    torch.manual_seed(0)
    _write(folder / "model_index.json", index)
    _write(folder / "scheduler" / "scheduler_config.json", scheduler)
    tail = (f".{variant}" if variant else "") + suffix
    for part, kind, config in (("unet", UNet2DConditionModel, unet), ("vae", AutoencoderKL, vae)):
        model = kind.from_config({"_class_name": kind.__name__, **config})
        _write(folder / part / "config.json", {"_class_name": kind.__name__, **config})
        _save(model, folder / part / f"diffusion_pytorch_model{tail}", bool(variant))
    tokenizer = build_tokenizer([f"the digit {d}" for d in range(10)], 600, 77)
    for number, config in enumerate(texts, 1):
        part = "text_encoder" if number == 1 else "text_encoder_2"
        kind = CLIPTextModel if number == 1 else CLIPTextModelWithProjection
        config = {"architectures": [kind.__name__], **config, "vocab_size": len(tokenizer)}
        model = kind(CLIPTextConfig(**{**config, "eos_token_id": 2}))
        _write(folder / part / "config.json", config)
        _save(model, folder / part / f"model{tail}", bool(variant))
        pad = "<|endoftext|>" if name in ("sd15", "lcm") or number == 1 and len(texts) > 1 else "!"
        _save_tokenizer(tokenizer, folder / part.replace("text_encoder", "tokenizer"), pad)
    if index.get("safety_checker", [None])[0] is not None:
        _write(folder / "safety_checker" / "config.json", {"model_type": "clip"})
    return folder


def _write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2))


def _save(model, path: Path, halve: bool) -> None:
    from safetensors.torch import save_file

    weights = {k: (v.half() if halve else v).contiguous() for k, v in model.state_dict().items()}
    if path.suffix == ".bin":
        torch.save(weights, path.with_name(path.name.replace("model", "pytorch_model", 1))
                   if path.name.startswith("model") else path)  # fmt: skip
    else:
        save_file(weights, path, metadata={"format": "pt"})


def _save_tokenizer(tokenizer, folder: Path, pad: str) -> None:
    """vocab.json, merges.txt and the two configs, as the makers have them: no tokenizer.json."""
    folder.mkdir(parents=True)
    rules = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [m if isinstance(m, str) else " ".join(m) for m in rules["merges"]]
    (folder / "vocab.json").write_text(json.dumps(rules["vocab"], ensure_ascii=False))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")

    def token(content: str, normalized: bool = True) -> dict:
        return {"content": content, "lstrip": False, "normalized": normalized, "rstrip": False,
                "single_word": False}  # fmt: skip

    start, end = token("<|startoftext|>"), token("<|endoftext|>")
    special = {"bos_token": start, "eos_token": end, "pad_token": pad, "unk_token": end}
    _write(folder / "special_tokens_map.json", special)
    typed = {k: {"__type": "AddedToken", **v} if isinstance(v, dict) else v
             for k, v in special.items()}  # fmt: skip
    _write(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            **typed,
            "do_lower_case": True,
            "errors": "replace",
            "model_max_length": 77,
            "name_or_path": "openai/clip-vit-large-patch14",
            "special_tokens_map_file": "./special_tokens_map.json",
            "tokenizer_class": "CLIPTokenizer",
        },
    )


def remove_parts(folder: Path, *names: str) -> None:
    for name in names:
        shutil.rmtree(folder / name)
