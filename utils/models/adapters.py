"""Loading what a training script published, to generate images with it."""

import re
from pathlib import Path

import httpx2
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import snapshot_download
from peft import PeftConfig, PeftModel, PeftType
from torch import nn

from utils.errors import UsageError
from utils.files import LORA_WEIGHTS, PUBLISHED, STATEMENT
from utils.models.families import FAMILIES, find_family
from utils.models.loda.loda import load_loda
from utils.models.lora import loads_lora
from utils.models.pipelines import freeze, list_parts

PARTS = sorted({family.part for family in FAMILIES.values()})
ADAPTER_CONFIG = "adapter_config.json"  # of a LoDA; of a LoRA where diffusers loads none
ADAPTER_PARTS = [*PARTS, ADAPTER_CONFIG, LORA_WEIGHTS]
DOWN = re.compile(r"lora_A|lora[._]down")  # one weight a layer
WEIGHTS = (LORA_WEIGHTS, "adapter_model.safetensors")


def fetch_adapter(adapter: str, revision: str | None = None) -> Path:
    """The folder of what a training script published, or the file of another program's LoRA; what
    is on the Hub is downloaded, all of one commit.

    Raises:
        UsageError: there is no such folder, file or Hub id, or it holds several LoRA files.
    """
    if Path(adapter).exists():
        return _find_inside(Path(adapter))
    try:
        folder = Path(snapshot_download(adapter, revision=revision, allow_patterns=PUBLISHED))
    except (OSError, ValueError, httpx2.HTTPError) as error:
        raise UsageError(
            f"--adapter '{adapter}' is not a folder, file or Hub id: {error}"
        ) from error
    return _find_inside(folder)


def _find_inside(path: Path) -> Path:
    if path.is_file():
        is_ours = path.name in WEIGHTS or (path.parent / STATEMENT).is_file()
        return path.parent if is_ours else path
    files = sorted(path.glob("*.safetensors"))
    if any((path / name).exists() for name in (*ADAPTER_PARTS, STATEMENT)) or not files:
        return path
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise UsageError(f"--adapter {path} holds {names}: name one of them")
    return files[0]


def load_adapter(pipeline: DiffusionPipeline, folder: Path) -> None:
    """Load what a training script published: a LoRA, which is added to the weights; a LoDA; or a
    whole fine-tuned denoiser. Instead of a folder it may be a LoRA's file.

    Raises:
        UsageError: it is none of these, or it does not fit this model.
    """
    try:
        if folder.is_file():
            _add_lora(pipeline, str(folder.parent), folder.name)
            return
        parts = [name for name in ADAPTER_PARTS if (folder / name).exists()]
        if {ADAPTER_CONFIG, LORA_WEIGHTS} <= set(parts):
            raise ValueError(f"it holds both {ADAPTER_CONFIG} and {LORA_WEIGHTS}: remove one")
        if not parts:
            part = find_family(pipeline).part
            raise ValueError(f"it holds no LoRA, no LoDA and no {part}/")
        for name in parts:
            _load_part(pipeline, name, str(folder))
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        raise UsageError(f"cannot load the adapter '{folder}' into this model: {error}") from error


def _load_part(pipeline: DiffusionPipeline, name: str, folder: str) -> None:
    family = find_family(pipeline)
    if name in PARTS:
        if name != family.part:
            raise ValueError(f"it holds a {name}, and the model has a {family.part}")
        tuned = type(family.denoiser).from_pretrained(folder, subfolder=name, use_safetensors=True)
        if list_shapes(tuned) != list_shapes(family.denoiser):
            raise ValueError("its layers have other sizes than those of the model")
        setattr(pipeline, name, freeze(tuned))
    elif name != ADAPTER_CONFIG:
        _add_lora(pipeline, folder, LORA_WEIGHTS)
    elif PeftConfig.from_pretrained(folder).peft_type == PeftType.LORA:
        setattr(pipeline, family.part, _merge_lora(family.denoiser, folder))
    else:
        load_loda(family.denoiser, folder)


def list_shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _merge_lora(denoiser: nn.Module, folder: str) -> nn.Module:
    """`denoiser` with the LoRA of a folder of PEFT added to its weights."""
    wrapped = PeftModel(denoiser, PeftConfig.from_pretrained(folder))
    outcome = wrapped.load_adapter(folder, "default")
    missing = [key for key in outcome.missing_keys if "lora_" in key]
    if missing or outcome.unexpected_keys:
        raise ValueError(
            f"it was made for another model: {len(missing)} of its layers have no weights, and "
            f"{len(outcome.unexpected_keys)} of its weights no layer"
        )
    return wrapped.merge_and_unload()


def _add_lora(pipeline: DiffusionPipeline, folder: str, name: str) -> None:
    if not loads_lora(pipeline):
        raise ValueError(
            f"diffusers loads no LoRA into a {type(pipeline).__name__}: a folder with PEFT's "
            f"{ADAPTER_CONFIG} is needed"
        )
    pipeline.load_lora_weights(folder, weight_name=name)
    loaded = sum(
        ".lora_A." in key for part in list_parts(pipeline) for key, _ in part.named_parameters()
    )
    found = pipeline.lora_state_dict(folder, weight_name=name)
    names = found[0] if isinstance(found, tuple) else found
    expected = sum(bool(DOWN.search(key)) for key in names)
    if loaded != expected or not loaded:
        raise ValueError(
            f"it was made for another model: of its {expected} layers this one has {loaded}"
        )
    # So that sampling with it costs no more than without. Of every part that it is in: by itself
    # FLUX.1 would fuse one, and unload all.
    pipeline.fuse_lora(components=list(pipeline.get_list_adapters()))
    pipeline.unload_lora_weights()
