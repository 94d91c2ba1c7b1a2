"""Units -> latents and text embeddings, computed once and kept in memory."""

from dataclasses import dataclass

import torch
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from utils.data import pixel_batches, to_unit_range
from utils.pipelines import denoising_loss, encode_captions


@dataclass(frozen=True)
class EncodedUnits:
    """The private set, encoded. It never leaves memory.

    Attributes:
        latents: [N, F, channels, r, r], scaled; F is 2 with flips (as is, mirrored), else 1.
        embeddings: [distinct captions, tokens, width].
        caption_rows: [N], the row of `embeddings` for each unit.
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    caption_rows: torch.Tensor


@torch.no_grad()
def encode_units(
    pipeline: StableDiffusionPipeline,
    rows: Dataset,
    image_column: str,
    captions: list[str],
    resolution: int,
    random_flip: bool,
    batch_size: int = 64,
    show_progress: bool = True,
) -> EncodedUnits:
    """Encode every image once (its latent mean; both ways with flips), every caption once."""
    vae, device = pipeline.vae, pipeline.device
    batches = pixel_batches(rows, image_column, resolution, batch_size)
    total = -(-len(rows) // batch_size)
    latents = []
    for pixels in tqdm(batches, "encoding images", total, leave=False, disable=not show_progress):
        images = to_unit_range(pixels.to(device))
        views = [images, images.flip(-1)] if random_flip else [images]
        encoded = [vae.encode(view).latent_dist.mode() for view in views]
        latents.append(torch.stack(encoded, 1).mul(vae.config.scaling_factor).cpu())
    distinct = sorted(set(captions))
    row_of = {caption: row for row, caption in enumerate(distinct)}
    ids = encode_captions(pipeline.tokenizer, distinct).to(device)
    embeddings = [pipeline.text_encoder(part).last_hidden_state.cpu() for part in ids.split(64)]
    caption_rows = torch.tensor([row_of[caption] for caption in captions])
    return EncodedUnits(torch.cat(latents), torch.cat(embeddings), caption_rows)


def unit_losses(
    unet, scheduler, units: EncodedUnits, indices: torch.Tensor, draws: int, randomness, device
) -> torch.Tensor:
    """The denoising loss of each unit, averaged over its K draws of (noise, timestep, flip): [U].

    A unit's draws are contiguous in the batch, as the per-unit gradients require.
    """
    shape = (len(indices) * draws, *units.latents.shape[2:])
    flips = randomness.integers(units.latents.shape[1], shape[:1])
    timesteps = randomness.integers(scheduler.config.num_train_timesteps, shape[:1])
    noise = randomness.normal(shape)
    repeated = indices.repeat_interleave(draws)
    latents = units.latents[repeated, flips].to(device)
    embeddings = units.embeddings[units.caption_rows[repeated]].to(device)
    losses = denoising_loss(
        unet, scheduler, latents, embeddings, noise.to(device), timesteps.to(device)
    )
    return losses.view(len(indices), draws).mean(1)
