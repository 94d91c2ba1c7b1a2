"""Images from prompts: a batch, or as many batches as it takes."""

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from utils.memory import images_at_once
from utils.models.drawing import DrawingSettings
from utils.models.families import find_family


@torch.no_grad()
def generate(
    pipeline: DiffusionPipeline,
    prompts: list[str],
    indices: list[int],
    seed: int,
    settings: DrawingSettings,
) -> list[Image.Image]:
    """One image a prompt, in one batch; the image of index i starts from noise of `seed` and i. The
    pipeline has the scheduler of `settings` already.

    The same image comes out whatever the batch it is in (up to floating-point rounding).
    """
    family = find_family(pipeline)
    noise = [torch.Generator().manual_seed(seed * 10_000_019 + index) for index in indices]
    call = settings.describe_call(type(pipeline).__name__)
    if settings.negative_prompt is not None:
        call["negative_prompt"] = [settings.negative_prompt] * len(prompts)
    return pipeline(**family.begin(prompts, noise, settings.resolution), **call).images


def generate_all(
    pipeline: DiffusionPipeline, prompts: list[str], seed: int, settings: DrawingSettings
) -> list[Image.Image]:
    """One image a prompt, image i as in `generate`; no more at once than `images_at_once`."""
    numbers, at_once, images = range(len(prompts)), images_at_once(settings.resolution), []
    for start in numbers[::at_once]:
        part = list(numbers[start : start + at_once])
        images += generate(pipeline, [prompts[i] for i in part], part, seed, settings)
    return images
