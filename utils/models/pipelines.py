"""Loading a public Stable Diffusion pipeline (1, 2 or XL), frozen; its parts and its resolution."""

from pathlib import Path

import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from safetensors import SafetensorError, safe_open
from torch import nn

from utils.errors import CannotLoad, UsageError
from utils.gradients.fast_linear import use_fast_linear
from utils.models.processes import find_distillation, read_process

PIPELINES = {kind.__name__: kind for kind in (StableDiffusionPipeline, StableDiffusionXLPipeline)}
# Of Stable Diffusion 1 and 2; all of it looks at finished images only.
UNUSED = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
AUTOENCODERS = (AutoencoderKL, AsymmetricAutoencoderKL)
UNREADABLE = (OSError, ValueError, TypeError, AttributeError, KeyError, RuntimeError)
UNREADABLE += (SafetensorError, ImportError)


def load_pipeline(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    allow_distilled: bool = False,
) -> DiffusionPipeline:
    """Load a pipeline in fp32 with every weight frozen and every dropout off.

    Args:
        name_or_path: a folder or Hub id; or a single file, such as other programs use, whose
            configuration is looked up on the Hub.
        variant: of the weights' files, such as fp16.
        allow_distilled: accept a model that was distilled to a few steps.

    Raises:
        CannotLoad: there is no such folder or Hub id, or it cannot be read.
        UsageError: it is not a Stable Diffusion pipeline, was
            not trained as one (`read_process`), or has parts that cannot be trained with.
    """
    try:
        if Path(name_or_path).is_file():
            pipeline = _load_file(name_or_path)
        else:
            pipeline = _load_folder(name_or_path, revision, variant)
    except UNREADABLE as error:
        reason = _explain(error, name_or_path, variant)
        raise CannotLoad(f"cannot load a pipeline from '{name_or_path}': {reason}") from error
    return prepare_pipeline(pipeline, name_or_path, allow_distilled)


def prepare_pipeline(
    pipeline: DiffusionPipeline, name_or_path: str, allow_distilled: bool = False
) -> DiffusionPipeline:
    """`pipeline` with every weight frozen and every dropout off.

    Raises:
        UsageError: see `load_pipeline`.
    """
    try:
        read_process(pipeline.scheduler)
        _check_parts(pipeline)
        signs = None if allow_distilled else find_distillation(pipeline, name_or_path)
        if signs is not None:
            raise UsageError(
                f"it seems to be distilled to a few steps ({signs}), which training would undo: "
                "train on the model that it was distilled from; or, if you mean it, give "
                "--allow_distilled"
            )
    except UsageError as error:
        raise UsageError(f"'{name_or_path}': {error}") from error
    for part in list_parts(pipeline):
        freeze(part)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _load_folder(name: str, revision: str | None, variant: str | None) -> DiffusionPipeline:
    kind = DiffusionPipeline.load_config(name, revision=revision)["_class_name"]
    if kind not in PIPELINES:
        raise ValueError(f"it is a {kind}, none of {', '.join(PIPELINES)}")
    return PIPELINES[kind].from_pretrained(
        name, revision=revision, variant=variant, dtype=torch.float32, **_leave_out(kind)
    )


def _load_file(path: str) -> DiffusionPipeline:
    if not path.endswith(".safetensors"):
        raise ValueError(f"of single files, only .safetensors are read. {_how_to_convert(path)}")
    with safe_open(path, "pt") as weights:
        names = list(weights.keys())
    if not any(name.startswith("first_stage_model.") for name in names):
        raise ValueError("it holds no autoencoder: it is no whole checkpoint")
    xl = any(name.startswith("conditioner.") for name in names)
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    return PIPELINES[kind].from_single_file(path, dtype=torch.float32, **_leave_out(kind))


def _leave_out(kind: str) -> dict:
    return {} if kind == "StableDiffusionXLPipeline" else UNUSED


def _how_to_convert(path: str) -> str:
    return (
        "Convert it, on a machine that reaches the Hub: python -c 'from diffusers import "
        f'StableDiffusionPipeline as P; P.from_single_file("{path}").save_pretrained("base")\'; '
        "for XL, StableDiffusionXLPipeline"
    )


def _explain(error: Exception, name: str, variant: str | None) -> str:
    """What went wrong, and what to do, in a sentence or two."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if Path(name).is_file() and name.endswith(".safetensors") and isinstance(error, OSError):
        return f"its configuration is not on this machine ({reason}). {_how_to_convert(name)}"
    files = [path.name.split(".") for path in Path(name).glob("unet/*") if Path(name).is_dir()]
    variants = {parts[1] for parts in files if len(parts) == 3 and parts[2] != "index"}
    plain = any(len(parts) == 2 and parts[1] in ("safetensors", "bin") for parts in files)
    if variants and not plain and variant not in variants:
        return f"its weights come in a variant only: give --variant {sorted(variants)[0]}"
    return reason


def _check_parts(pipeline: DiffusionPipeline) -> None:
    """Raises: UsageError if the pipeline has parts with which training cannot work."""
    vae, unet = pipeline.vae, pipeline.unet
    if not isinstance(vae, AUTOENCODERS):
        raise UsageError(
            f"its autoencoder is a {type(vae).__name__}, which gives no distribution of latents; "
            "put the model's own AutoencoderKL in its place"
        )
    if unet.config.in_channels != vae.config.latent_channels:
        raise UsageError(
            f"its U-Net reads {unet.config.in_channels} channels, and its autoencoder makes "
            f"{vae.config.latent_channels}: it was made for another task, such as inpainting"
        )
    if unet.config.class_embed_type is not None or unet.config.num_class_embeds is not None:
        raise UsageError("its U-Net wants class embeddings: it was made for another task")


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
        size = pipeline.unet.config.sample_size  # some makers write height and width
        sides = {size} if isinstance(size, int) else set(size or ())
        if len(sides) != 1:
            raise UsageError(f"give --resolution: the model's sample_size is {size}")
        resolution = sides.pop() * factor
    if resolution < 1:
        raise UsageError(f"--resolution {resolution} must be positive")
    unet_factor = 2 ** (len(pipeline.unet.config.block_out_channels) - 1)
    if resolution % factor or (resolution // factor) % unet_factor:
        raise UsageError(
            f"--resolution {resolution} must be a multiple of {factor * unet_factor} for this model"
        )
    return resolution
