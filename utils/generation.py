"""Batched text-to-image generation."""

import math

import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image


def use_dpm_solver(pipeline: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """Switch to DPM-Solver++ (Lu et al. 2022), keeping the pipeline's noise schedule."""
    config = pipeline.scheduler.config
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(
        config, algorithm_type="dpmsolver++", final_sigmas_type="zero"
    )
    return pipeline


@torch.no_grad()
def generate(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    indices: list[int],
    seed: int,
    num_steps: int = 20,
    guidance_scale: float = 2.0,
    resolution: int | None = None,
) -> list[Image.Image]:
    """One image a prompt, in one batch; the image of index i starts from noise of `seed` and i.

    The same image comes out whatever the batch it is drawn in (up to floating-point rounding).
    """
    size = pipeline.unet.config.sample_size
    if resolution is not None:
        size = resolution // pipeline.vae_scale_factor
    shape = (pipeline.unet.config.in_channels, size, size)
    noise = [
        torch.randn(shape, generator=torch.Generator().manual_seed(seed * 10_000_019 + index))
        for index in indices
    ]
    return pipeline(
        prompts,
        num_inference_steps=num_steps,
        guidance_scale=guidance_scale,
        latents=torch.stack(noise).to(pipeline.device, pipeline.unet.dtype),
        height=size * pipeline.vae_scale_factor,
        width=size * pipeline.vae_scale_factor,
    ).images


def image_grid(images: list[Image.Image], columns: int) -> Image.Image:
    """Tile images of one size, row by row."""
    width, height = images[0].size
    grid = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height))
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * width, index // columns * height))
    return grid
