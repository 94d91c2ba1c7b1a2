"""Variations of synthetic images, by image-to-image with the model that drew them."""

import math

import torch
from diffusers import AutoPipelineForImage2Image, DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.errors import UsageError
from utils.memory import images_at_once
from utils.models.drawing import DrawingSettings
from utils.models.families.family import list_call_arguments


def read_drawing(settings: dict, argument: str) -> tuple[ModelArguments, SamplingArguments]:
    """What drew a set of sample.py, from its sampling.json.

    Raises:
        UsageError: a set of another script, which no model drew.
    """
    try:
        return tuple(
            kind(**{name: settings[name] for name in kind.__dataclass_fields__ if name in settings})
            for kind in (ModelArguments, SamplingArguments)
        )
    except TypeError as error:
        raise UsageError(
            f"{argument} was not drawn by sample.py, so there is no model to vary its images with: "
            "leave --rounds at 1"
        ) from error


def make_varying(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline for image-to-image, of the same parts.

    Raises:
        UsageError: diffusers has none for such a model, or one that leaves the strength open.
    """
    try:
        varying = AutoPipelineForImage2Image.from_pipe(pipeline)
    except ValueError as error:
        raise UsageError(_explain(pipeline)) from error
    if "strength" not in list_call_arguments(type(varying)):
        raise UsageError(_explain(pipeline))
    varying.set_progress_bar_config(disable=True)
    return varying


def _explain(pipeline: DiffusionPipeline) -> str:
    kind = type(pipeline).__name__
    return f"diffusers cannot vary images with a {kind}: leave --rounds at 1"


@torch.no_grad()
def vary(
    varying: DiffusionPipeline,
    images: list[Image.Image],
    prompts: list[str],
    strength: float,
    settings: DrawingSettings,
    seed: int,
) -> list[Image.Image]:
    """One variation an image: noised to `strength` of the way, and denoised from there. Image i
    takes noise of `seed` and i, whatever its batch.

    Args:
        varying: of `make_varying`.
    """
    call = {
        "strength": strength,
        "num_inference_steps": max(settings.num_inference_steps, math.floor(1 / strength) + 1),
        "guidance_scale": settings.guidance_scale,
    }
    if settings.max_sequence_length is not None:
        call["max_sequence_length"] = settings.max_sequence_length
    if "height" in list_call_arguments(type(varying)):
        call |= {"height": settings.resolution, "width": settings.resolution}
    varied, at_once = [], images_at_once(settings.resolution)
    for start in tqdm(range(0, len(images), at_once), "variations"):
        part = slice(start, start + at_once)
        count = len(images[part])
        noise = [torch.Generator().manual_seed(seed * 10_000_019 + start + i) for i in range(count)]
        if settings.negative_prompt is not None:
            call["negative_prompt"] = [settings.negative_prompt] * count
        varied += varying(prompt=prompts[part], image=images[part], generator=noise, **call).images
    return varied
