"""Load and freeze a Stable Diffusion pipeline (1, 2 or XL), name its target modules, compute its
loss."""

import difflib
import re
from pathlib import Path

import httpx2
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.training_utils import compute_snr
from huggingface_hub import snapshot_download
from torch import nn

from utils.errors import UsageError
from utils.fast_linear import use_fast_linear
from utils.loda import load_loda
from utils.verification import PUBLISHED

# peft matches by suffix: "to_out.0" is the Linear inside the ModuleList `to_out`.
ATTENTION_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
PROJECTION_TARGETS = ["proj_in", "proj_out"]
DEFAULT_TARGETS = ATTENTION_TARGETS + PROJECTION_TARGETS
ALL_TARGETS = [*DEFAULT_TARGETS, "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]
PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
NO_SAFETY_CHECKER = {"safety_checker": None, "requires_safety_checker": False}
ADAPTER_PARTS = ["unet", "adapter_config.json", "pytorch_lora_weights.safetensors"]


def load_pipeline(name_or_path: str, revision: str | None = None) -> DiffusionPipeline:
    """Load a pipeline in fp32 with every weight frozen and every dropout off.

    Raises:
        UsageError: there is no such folder or Hub id, or it is not a Stable Diffusion pipeline.
    """
    try:
        config = DiffusionPipeline.load_config(name_or_path, revision=revision)
        kind = config["_class_name"]
        if kind not in PIPELINES:
            raise ValueError(f"it is a {kind}, none of {', '.join(PIPELINES)}")
        checker = {} if kind == "StableDiffusionXLPipeline" else NO_SAFETY_CHECKER
        pipeline = PIPELINES[kind].from_pretrained(
            name_or_path, revision=revision, dtype=torch.float32, **checker
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"cannot load a pipeline from '{name_or_path}': {reason}") from error
    for part in parts_of(pipeline):
        _freeze(part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _freeze(part: nn.Module) -> nn.Module:
    """No gradients and no dropout; and laid out as convolutions and products go fastest."""
    use_fast_linear(part)
    return part.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def is_xl(pipeline: DiffusionPipeline) -> bool:
    return isinstance(pipeline, StableDiffusionXLPipeline)


def device_of(pipeline: DiffusionPipeline) -> torch.device:
    """The device, without the walk through every module that `pipeline.device` takes."""
    return next(pipeline.unet.parameters()).device


def parts_of(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The U-Net, the text encoder or encoders, and the autoencoder."""
    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if is_xl(pipeline) else [])
    return [pipeline.unet, *encoders, pipeline.vae]


def adapter_folder(adapter: str, revision: str | None = None) -> Path:
    """The folder of what a training script published; what is on the Hub is downloaded, all of one
    commit.

    Raises:
        UsageError: there is no such folder or Hub id.
    """
    if Path(adapter).is_dir():
        return Path(adapter)
    try:
        return Path(snapshot_download(adapter, revision=revision, allow_patterns=PUBLISHED))
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise UsageError(f"--adapter '{adapter}' is no folder or Hub id: {error}") from error


def load_adapter(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Load what a training script published, to draw with it, whichever kind it is: LoRA, which is
    added to the weights; LoDA; or a whole fine-tuned U-Net.

    Raises:
        UsageError: it is none of these, or it does not fit this model.
    """
    try:
        parts = [name for name in ADAPTER_PARTS if (folder / name).exists()]
        if not parts:
            raise ValueError("it holds no LoRA, no LoDA and no unet/")
        for name in parts:
            _load_part(pipeline, name, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(f"cannot load the adapter '{folder}' into this model: {error}") from error


def _load_part(pipeline: DiffusionPipeline, name: str, folder: str) -> None:
    if name == "unet":
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet")
        if unet.config.cross_attention_dim != pipeline.unet.config.cross_attention_dim:
            raise ValueError("its U-Net takes text of another width")
        pipeline.unet = _freeze(unet)
    elif name == "adapter_config.json":
        load_loda(pipeline.unet, folder)
    else:
        pipeline.load_lora_weights(folder)
        pipeline.fuse_lora()  # so that drawing with it costs no more than without
        pipeline.unload_lora_weights()


def trains_text(pipeline: DiffusionPipeline) -> bool:
    """Whether any weight of the text encoder is trained."""
    return any(parameter.requires_grad for parameter in pipeline.text_encoder.parameters())


def trained_modules(pipeline: DiffusionPipeline) -> nn.Module:
    """The parts of a pipeline whose trainable weights the engine must cover, as one module."""
    if trains_text(pipeline):
        return nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    return pipeline.unet


def image_side(pipeline: DiffusionPipeline, resolution: int | None) -> int:
    """`resolution`, or what the model makes, in pixels."""
    native = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    return native if resolution is None else resolution


def check_resolution(pipeline: DiffusionPipeline, resolution: int) -> None:
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


def tokenize(pipeline: DiffusionPipeline, captions: list[str]) -> torch.Tensor:
    """Token ids for each of the pipeline's E text encoders: [len(captions), E, max_length]."""
    ids = [encode_captions(tokenizer, captions) for tokenizer in tokenizers_of(pipeline)]
    return torch.stack(ids, 1)


def tokenizers_of(pipeline: DiffusionPipeline) -> list:
    """One for each text encoder."""
    return [pipeline.tokenizer] + ([pipeline.tokenizer_2] if is_xl(pipeline) else [])


def encode_text(
    pipeline: DiffusionPipeline, ids: torch.Tensor, resolution: int
) -> dict[str, torch.Tensor]:
    """What the U-Net is told of captions [n, E, T] (`tokenize`), by name.

    That is `encoder_hidden_states` [n, T, W]; for Stable Diffusion XL, whose W is both encoders'
    widths together, also the pooled `text_embeds` [n, P] and the sizes `time_ids` [n, 6]: every
    image is called uncropped and of the training resolution, so they depend on no private image.

    Source: Podell et al. 2023, sections 2.1 and 2.2.
    """
    ids = ids.to(device_of(pipeline))
    if not is_xl(pipeline):
        return {"encoder_hidden_states": pipeline.text_encoder(ids[:, 0])[0]}
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    outputs = [e(ids[:, i], output_hidden_states=True) for i, e in enumerate(encoders)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution])
    return {
        "encoder_hidden_states": hidden,
        "text_embeds": outputs[1][0],
        "time_ids": sizes.to(hidden).expand(len(ids), 6),
    }


def snr_weights(scheduler, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
    """Min-SNR weights of the loss: [batch]. Hang et al. 2023, section 3.4."""
    snr = compute_snr(scheduler, timesteps)
    bound = snr.clamp(max=gamma)
    return bound / (snr + 1 if scheduler.config.prediction_type == "v_prediction" else snr)


def denoising_loss(unet, scheduler, latents, text, noise, timesteps) -> torch.Tensor:
    """The mean squared error of each row: [batch], not yet averaged over the batch.

    Args:
        latents: [batch, channels, r, r], already multiplied by the autoencoder's scaling factor.
        text: what `encode_text` returns, or its `encoder_hidden_states` alone.
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
    told = dict(text) if isinstance(text, dict) else {"encoder_hidden_states": text}
    words = told.pop("encoder_hidden_states")
    predicted = unet(noisy, timesteps, words, added_cond_kwargs=told or None).sample
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
