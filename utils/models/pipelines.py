"""Loading a public pipeline, frozen; its parts and its resolution."""

from pathlib import Path

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import nn

from utils.errors import CannotLoad, UsageError, first_line
from utils.files import DENOISERS, GRID, STATEMENT
from utils.gradients.elementwise import use_alike_activations
from utils.gradients.fast_linear import use_fast_linear
from utils.gradients.short_attention import use_fast_attention
from utils.gradients.whole_groups import use_whole_groups
from utils.models.families import FAMILIES, find_family
from utils.models.processes import find_distillation, read_process

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
        UsageError: it is of no family that is known, was not trained as they are (`read_process`),
            or has parts that cannot be trained with.
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
        family, process = find_family(pipeline), read_process(pipeline.scheduler)
        if type(process).__name__ != family.process:
            raise UsageError(
                f"its scheduler, {type(pipeline.scheduler).__name__}, samples from a "
                f"{type(process).__name__}; {family.title} is trained as a {family.process}"
            )
        family.check_parts()
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
    if kind not in FAMILIES:
        raise ValueError(f"it is a {kind}, none of {', '.join(FAMILIES)}")
    asked = {"revision": revision, "variant": variant, "dtype": torch.float32}
    return getattr(diffusers, kind).from_pretrained(name, **asked, **FAMILIES[kind].unused)


def _load_file(path: str) -> DiffusionPipeline:
    if not path.endswith(".safetensors"):
        raise ValueError(f"of single files, only .safetensors are read. {_how_to_convert(path)}")
    with safe_open(path, "pt") as weights:
        names = list(weights.keys())
    if not any(name.startswith("first_stage_model.") for name in names):
        raise ValueError("it holds no autoencoder: it is no whole checkpoint")
    xl = any(name.startswith("conditioner.") for name in names)
    _check_prediction(path, names, "XL" if xl else "")
    kind = "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"
    unused = FAMILIES[kind].unused
    return getattr(diffusers, kind).from_single_file(path, dtype=torch.float32, **unused)


def _check_prediction(path: str, names: list[str], kind: str) -> None:
    """diffusers takes the noise process of a file from the base that it thinks it is, whatever the
    file says of it.

    Raises:
        ValueError: it says, or may be, another one.
    """
    if any(name.startswith("edm_") for name in names):
        raise ValueError("it is sampled by EDM, which is none of the processes that are known here")
    predicts = {"prediction_type": "v_prediction"}
    if "v_pred" in names:
        if "ztsnr" in names:
            predicts |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        raise ValueError(
            "it says that it predicts v, which would not be heeded if it were read as it is. "
            + _how_to_convert(path, kind, predicts)
        )
    if any(name.startswith("cond_stage_model.model.") for name in names):
        raise ValueError(
            "it is a Stable Diffusion 2, and a file does not say whether that predicts v, as those "
            f"for 768 pixels do, or noise. {_how_to_convert(path, kind, predicts)} (if it predicts "
            "noise, with epsilon in place of v_prediction)"
        )


def _how_to_convert(path: str, kind: str = "", scheduler: dict | None = None) -> str:
    """Args: scheduler: what its configuration must say."""
    code = f"from diffusers import StableDiffusion{kind}Pipeline as P; "
    code += f'p = P.from_single_file("{path}"); '
    if scheduler is not None:
        words = "".join(f", {name}={value!r}" for name, value in scheduler.items())
        words = words.replace("'", '"')  # it stands within single ones
        code = code.replace("import ", "import DDIMScheduler as S, ")  # which heeds all of them
        code += f"p.scheduler = S.from_config(p.scheduler.config{words}); "
    code += 'p.save_pretrained("base")'
    hint = "" if kind or scheduler else "; for XL, StableDiffusionXLPipeline"
    return f"Convert it, on a machine that reaches the Hub: python -c '{code}'{hint}"


def _explain(error: Exception, name: str, variant: str | None) -> str:
    """What went wrong, and what to do, in a sentence or two."""
    reason = first_line(error)
    if Path(name).is_file() and name.endswith(".safetensors") and isinstance(error, OSError):
        return f"its configuration is not on this machine ({reason}). {_how_to_convert(name)}"
    if Path(name).is_dir() and not (Path(name) / "model_index.json").is_file():
        if (Path(name) / STATEMENT).is_file() and not (Path(name) / GRID).is_file():
            return "it is a training's result: give it as --adapter, and here its base model"
        return "it holds no model_index.json, as pipelines do"
    if "not a valid model identifier" in reason:
        return (
            "there is no such folder, and no such Hub id that you may read: if it is not mistyped, "
            "it is gated or private; ask for access on its page, then hf auth login"
        )
    paths = [path for part in DENOISERS for path in Path(name).glob(f"{part}/*")]
    files = [path.name.split(".") for path in paths]
    variants = {parts[1] for parts in files if len(parts) == 3 and parts[2] != "index"}
    plain = any(len(parts) == 2 and parts[1] in ("safetensors", "bin") for parts in files)
    if variants and not plain and variant not in variants:
        return f"its weights come in a variant only: give --variant {sorted(variants)[0]}"
    return reason


def freeze(part: nn.Module) -> nn.Module:
    """Turn off gradients and dropout; choose the fastest memory layout, products and attention,
    activations that look at each number alone, and norms that look at each image alone."""
    use_fast_linear(part)
    use_fast_attention()
    use_alike_activations()
    use_whole_groups()
    return part.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def list_parts(pipeline: DiffusionPipeline) -> list[nn.Module]:
    """The denoiser, the text encoder or encoders, and the autoencoder."""
    family = find_family(pipeline)
    return [family.denoiser, *family.encoders, pipeline.vae]


def trains_text(pipeline: DiffusionPipeline) -> bool:
    """Whether any weight of a text encoder is trained."""
    encoders = find_family(pipeline).encoders
    return any(p.requires_grad for encoder in encoders for p in encoder.parameters())


def collect_trained_modules(pipeline: DiffusionPipeline) -> nn.Module:
    """The parts of a pipeline whose trainable weights the engine must cover, as one module."""
    family = find_family(pipeline)
    if trains_text(pipeline):
        return nn.ModuleDict({family.part: family.denoiser, "text_encoder": pipeline.text_encoder})
    return family.denoiser


def choose_resolution(pipeline: DiffusionPipeline, resolution: int | None) -> int:
    """`resolution`, or that of the model, in pixels.

    Raises:
        UsageError: the autoencoder, then the denoiser, cannot divide it evenly.
    """
    family = find_family(pipeline)
    factor = family.pixels_per_side
    if resolution is None:
        resolution = family.native_resolution
    if resolution < 1:
        raise UsageError(f"--resolution {resolution} must be positive")
    if resolution // factor > family.largest_side:
        raise UsageError(
            f"--resolution {resolution} is more than this model has positions for: at most "
            f"{family.largest_side * factor:g}"
        )
    if resolution % factor or (resolution // factor) % family.smallest_side:
        raise UsageError(
            f"--resolution {resolution} must be a multiple of {factor * family.smallest_side} "
            "for this model"
        )
    return resolution
