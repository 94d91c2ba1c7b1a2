"""Load and freeze a Stable Diffusion pipeline, name its target modules, compute its loss."""

import difflib
import re

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from utils.errors import UsageError

# peft matches by suffix: "to_out.0" is the Linear inside the ModuleList `to_out`.
ATTENTION_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PROJECTION_TARGETS = ["proj_in", "proj_out"]
DEFAULT_TARGETS = ATTENTION_TARGETS + PROJECTION_TARGETS


def load_pipeline(name_or_path: str, revision: str | None = None) -> StableDiffusionPipeline:
    """Load a pipeline in fp32 with every weight frozen and every dropout off.

    Raises:
        UsageError: there is no such folder or Hub id, or it is not a Stable Diffusion pipeline.
    """
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            name_or_path,
            revision=revision,
            dtype=torch.float32,
            safety_checker=None,
            requires_safety_checker=False,
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(f"cannot load a pipeline from '{name_or_path}': {error}") from error
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_adapter(pipeline: StableDiffusionPipeline, adapter: str) -> None:
    """Load a LoRA adapter into the pipeline, from a folder or the Hub.

    Raises:
        UsageError: it is not there, or it does not fit this model.
    """
    try:
        pipeline.load_lora_weights(adapter)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise UsageError(f"cannot load the adapter '{adapter}' into this model: {error}") from error


def check_resolution(pipeline: StableDiffusionPipeline, resolution: int) -> None:
    """Raises: UsageError if the autoencoder, then the U-Net, cannot halve `resolution` evenly."""
    factor = pipeline.vae_scale_factor
    unet_factor = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % factor or (resolution // factor) % unet_factor:
        raise UsageError(
            f"--resolution {resolution} must be a multiple of {factor * unet_factor} for this model"
        )


def resolve_targets(model: nn.Module, patterns: list[str]) -> list[str]:
    """Full names of the Linear and Conv2d modules that each pattern names by suffix (as peft does).

    Raises:
        UsageError: a pattern matches nothing; near misses are named.
    """
    leaves = [n for n, m in model.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    chosen = set()
    for pattern in patterns:
        matched = [n for n in leaves if n == pattern or n.endswith("." + pattern)]
        if not matched:
            raise UsageError(_no_such_module(pattern, leaves))
        chosen.update(matched)
    return [name for name in leaves if name in chosen]


def _no_such_module(pattern: str, leaves: list[str]) -> str:
    suffixes = sorted({re.sub(r"^.*?\.(?=[a-z_]+(\.\d+)?$)", "", name) for name in leaves})
    near = [s for s in suffixes if s.startswith(pattern.split(".")[0])]
    near += difflib.get_close_matches(pattern, suffixes, n=3, cutoff=0.5)
    near = list(dict.fromkeys(near)) or suffixes
    return (
        f"target module '{pattern}' matches no Linear or Conv2d layer; "
        f"did you mean {', '.join(near)}?"
    )


def encode_captions(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids [len(captions), max_length], padded and cut as the pipeline does."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def denoising_loss(unet, scheduler, latents, embeddings, noise, timesteps) -> torch.Tensor:
    """The mean squared error of each row: [batch], not yet averaged over the batch.

    Args:
        latents: [batch, channels, r, r], already multiplied by the autoencoder's scaling factor.
        embeddings: [batch, tokens, width].
        noise: like `latents`. timesteps: [batch], integers.

    Source: Ho et al. 2020, eq. 14; for v-prediction, Salimans and Ho 2022, appendix D.
    """
    noisy = scheduler.add_noise(latents, noise, timesteps)
    if scheduler.config.prediction_type == "epsilon":
        target = noise
    elif scheduler.config.prediction_type == "v_prediction":
        target = scheduler.get_velocity(latents, noise, timesteps)
    else:
        raise UsageError(f"prediction type '{scheduler.config.prediction_type}' is not supported")
    predicted = unet(noisy, timesteps, embeddings).sample
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
