"""The denoising loss of a Stable Diffusion model, and the text that conditions it."""

import torch
from diffusers import DiffusionPipeline

from utils.models.pipelines import get_device, is_xl
from utils.models.processes import Ddpm


def tokenize_captions(tokenizer, captions: list[str]) -> torch.Tensor:
    """Token ids [len(captions), max_length], padded and cut as the pipeline does."""
    return tokenizer(
        captions,
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def tokenize(pipeline: DiffusionPipeline, captions: list[str]) -> torch.Tensor:
    """Token ids for each of the pipeline's E text encoders: [len(captions), E, max_length]."""
    ids = [tokenize_captions(tokenizer, captions) for tokenizer in list_tokenizers(pipeline)]
    return torch.stack(ids, 1)


def list_tokenizers(pipeline: DiffusionPipeline) -> list:
    """One for each text encoder."""
    return [pipeline.tokenizer] + ([pipeline.tokenizer_2] if is_xl(pipeline) else [])


def encode_text(
    pipeline: DiffusionPipeline, ids: torch.Tensor, resolution: int
) -> dict[str, torch.Tensor]:
    """The conditioning of the U-Net by captions [n, E, T] (`tokenize`), by name.

    That is `encoder_hidden_states` [n, T, W]; for Stable Diffusion XL, whose W is both encoders'
    widths together, also the pooled `text_embeds` [n, P] and the sizes `time_ids` [n, 6]: every
    image counts as uncropped and of the training resolution, so they depend on no private image.

    Source: Podell et al. 2023, sections 2.1 and 2.2.
    """
    ids = ids.to(get_device(pipeline))
    if not is_xl(pipeline):
        return {"encoder_hidden_states": pipeline.text_encoder(ids[:, 0])[0]}
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    outputs = [e(ids[:, i], output_hidden_states=True) for i, e in enumerate(encoders)]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
    sizes = torch.tensor([resolution, resolution, 0, 0, resolution, resolution])
    return {
        "encoder_hidden_states": hidden,
        "text_embeds": outputs[1][0],
        "time_ids": sizes.to(hidden).expand(len(ids), 6),
    }


def denoising_loss(unet, process: Ddpm, latents, text, noise, timesteps) -> torch.Tensor:
    """The mean squared error of each row: [batch], not yet averaged over the batch.

    Args:
        latents: [batch, channels, r, r], already multiplied by the autoencoder's scaling factor.
        text: what `encode_text` returns, or its `encoder_hidden_states` alone.
        noise: like `latents`. timesteps: [batch], integers.

    Source: Ho et al. 2020, eq. 14; for v-prediction, Salimans and Ho 2022, appendix D.
    """
    noisy, target = process.corrupt(latents, noise, timesteps)
    added = dict(text) if isinstance(text, dict) else {"encoder_hidden_states": text}
    hidden = added.pop("encoder_hidden_states")
    predicted = unet(noisy, timesteps, hidden, added_cond_kwargs=added or None).sample
    return (predicted.float() - target.float()).square().flatten(1).mean(1)
