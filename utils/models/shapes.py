"""A pipeline to plan with: its layers as they are, its weights random where they would have to be
downloaded. Hours and memory depend on the layers alone."""

import inspect
import sys
from functools import partial
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.models.model_loading_utils import _fetch_remapped_cls_from_config
from diffusers.models.modeling_utils import LegacyModelMixin
from huggingface_hub import snapshot_download
from transformers import PreTrainedModel

from utils.models.families import FAMILIES, Family
from utils.models.pipelines import UNREADABLE, load_pipeline, prepare_pipeline
from utils.models.public_models import build_random_model, build_stable_diffusion

CONFIGS = ["*.json", "*.txt", "*.model", "*.jinja"]  # of a pipeline, without its weights
# Where nothing can be downloaded: the layers of these are known.
KNOWN = {"stable-diffusion-v1": "1.5", "stable-diffusion-2": "2.1"}


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
        pipeline = build_stable_diffusion(version, Family.public_captions, torch.float32)
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
    whole = index["_class_name"]
    if whole not in FAMILIES:
        raise ValueError(f"it is a {whole}, none of {', '.join(FAMILIES)}")
    unused, parameters = FAMILIES[whole].unused, inspect.signature(getattr(diffusers, whole))
    more = {k: v for k, v in index.items() if k in parameters.parameters and k not in unused}
    more = {k: v for k, v in more.items() if not isinstance(v, list)}
    parts, build = {}, partial(build_random_model, torch.float32)
    for name, entry in index.items():
        if not isinstance(entry, list) or entry[1] is None or name in unused:
            continue
        part = folder / name
        kind = getattr(transformers if entry[0] == "transformers" else diffusers, entry[1])
        if issubclass(kind, ModelMixin):
            config = kind.load_config(part)
            if issubclass(kind, LegacyModelMixin):  # an older name of several classes
                kind = _fetch_remapped_cls_from_config(config, kind)
            parts[name] = build(kind.from_config, config)
        elif issubclass(kind, PreTrainedModel):
            parts[name] = build(kind, kind.config_class.from_pretrained(part))
        else:
            parts[name] = kind.from_pretrained(part)
    return getattr(diffusers, whole)(**parts, **more, **unused)
