"""Loading a public Stable Diffusion pipeline (1, 2 or XL), frozen; its parts and its resolution."""

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from torch import nn

from utils.errors import UsageError
from utils.gradients.fast_linear import use_fast_linear
from utils.models.processes import read_process

PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
NO_SAFETY_CHECKER = {"safety_checker": None, "requires_safety_checker": False}


def load_pipeline(name_or_path: str, revision: str | None = None) -> DiffusionPipeline:
    """Load a pipeline in fp32 with every weight frozen and every dropout off.

    Raises:
        UsageError: there is no such folder or Hub id, it is not a Stable Diffusion pipeline, or it
            was not trained as one (`read_process`).
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
    try:
        read_process(pipeline.scheduler)
    except UsageError as error:
        raise UsageError(f"'{name_or_path}': {error}") from error
    for part in list_parts(pipeline):
        freeze(part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def freeze(part: nn.Module) -> nn.Module:
    """Turn off gradients and dropout; choose the fastest memory layout and matrix products."""
    use_fast_linear(part)
    return part.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def is_xl(pipeline: DiffusionPipeline) -> bool:
    return isinstance(pipeline, StableDiffusionXLPipeline)


def get_device(pipeline: DiffusionPipeline) -> torch.device:
    """The device, without the walk through every module that `pipeline.device` takes."""
    return next(pipeline.unet.parameters()).device


def list_parts(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The U-Net, the text encoder or encoders, and the autoencoder."""
    encoders = [pipeline.text_encoder] + ([pipeline.text_encoder_2] if is_xl(pipeline) else [])
    return [pipeline.unet, *encoders, pipeline.vae]


def trains_text(pipeline: DiffusionPipeline) -> bool:
    """Whether any weight of the text encoder is trained."""
    return any(parameter.requires_grad for parameter in pipeline.text_encoder.parameters())


def collect_trained_modules(pipeline: DiffusionPipeline) -> nn.Module:
    """The parts of a pipeline whose trainable weights the engine must cover, as one module."""
    if trains_text(pipeline):
        return nn.ModuleDict({"unet": pipeline.unet, "text_encoder": pipeline.text_encoder})
    return pipeline.unet


def choose_resolution(pipeline: DiffusionPipeline, resolution: int | None) -> int:
    """`resolution`, or that of the model, in pixels.

    Raises:
        UsageError: the autoencoder, then the U-Net, cannot halve it evenly.
    """
    factor = pipeline.vae_scale_factor
    if resolution is None:
        resolution = pipeline.unet.config.sample_size * factor
    unet_factor = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % factor or (resolution // factor) % unet_factor:
        raise UsageError(
            f"--resolution {resolution} must be a multiple of {factor * unet_factor} for this model"
        )
    return resolution
