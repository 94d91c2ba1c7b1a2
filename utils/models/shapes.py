"""A pipeline to plan with: its layers as they are, its weights random where they would have to be
downloaded. Hours and memory depend on the layers alone."""

import sys
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, DiffusionPipeline, UNet2DConditionModel
from huggingface_hub import snapshot_download

from utils.models.pipelines import PIPELINES, UNREADABLE, UNUSED, load_pipeline, prepare_pipeline
from utils.models.public_models import build_random_model, build_stable_diffusion

CONFIGS = ["*.json", "*.txt", "*.model"]  # of a pipeline, without its weights
# Where nothing can be downloaded: the layers of these are known.
KNOWN = {"stable-diffusion-v1": "1.5", "stable-diffusion-2": "2.1"}
CAPTIONS = ["a photo of a house by the sea"]


def load_shape(
    name_or_path: str,
    revision: str | None = None,
    variant: str | None = None,
    allow_distilled: bool = False,
) -> DiffusionPipeline:
    """A pipeline with the layers of `name_or_path`: itself if it is a folder or a file; of a Hub id
    only the configuration is downloaded. Arguments as `load_pipeline` takes them.

    Raises:
        UsageError: see `load_pipeline`.
    """
    asked = (name_or_path, revision, variant, allow_distilled)
    if Path(name_or_path).exists():
        return load_pipeline(*asked)
    try:
        folder = snapshot_download(name_or_path, revision=revision, allow_patterns=CONFIGS)
        pipeline = build_from_configs(Path(folder))
    except UNREADABLE:
        version = next((known for part, known in KNOWN.items() if part in name_or_path), None)
        if version is None:
            return load_pipeline(*asked)  # which says what is wrong
        pipeline = build_stable_diffusion(version, CAPTIONS, torch.float32)
        print(
            f"'{name_or_path}' cannot be reached: planned with random weights in the layers of "
            f"Stable Diffusion {version}",
            file=sys.stderr,
        )
    return prepare_pipeline(pipeline, name_or_path, allow_distilled)


def build_from_configs(folder: Path) -> DiffusionPipeline:
    """The pipeline that the configuration files in `folder` describe, with random weights.

    Raises:
        ValueError, OSError: it is no Stable Diffusion pipeline, or a file is missing.
    """
    index = DiffusionPipeline.load_config(str(folder))
    kind = PIPELINES.get(index["_class_name"])
    if kind is None:
        raise ValueError(f"it is a {index['_class_name']}, none of {', '.join(PIPELINES)}")
    parts, build = {}, partial(build_random_model, torch.float32)
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[1] is None or name in UNUSED:
            continue
        part = folder / name
        if name in ("unet", "vae"):
            model = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
            parts[name] = build(model.from_config, model.load_config(part))
        elif name.startswith("text_encoder"):
            model = getattr(transformers, entry[1])
            parts[name] = build(model, model.config_class.from_pretrained(part))
        else:
            library = transformers if entry[0] == "transformers" else diffusers
            parts[name] = getattr(library, entry[1]).from_pretrained(part)
    return kind(**parts, **({} if "tokenizer_2" in parts else UNUSED))
