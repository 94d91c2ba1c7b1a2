"""The denoising loss of a latent diffusion model."""

from collections.abc import Callable

import torch

from utils.models.processes import Process

# (noisy, time, text) -> what the process trains for: `Family.predict` of a denoiser.
Predict = Callable[[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]], torch.Tensor]


def denoising_loss(
    predict: Predict,
    process: Process,
    latents: torch.Tensor,
    text: dict[str, torch.Tensor],
    noise: torch.Tensor,
    quantile: torch.Tensor,
) -> torch.Tensor:
    """The mean squared error of each row, weighted: [batch], not yet averaged over the batch.

    Args:
        latents: [batch, channels, r, r], as `Family.encode_images` returns them.
        text: what `Family.encode_text` returns.
        noise: like `latents`. quantile: [batch], of the noise levels, in [0, 1).

    Source: Ho et al. 2020, eq. 14; for v-prediction, Salimans and Ho 2022, appendix D; for flows,
    Esser et al. 2024, section 2.
    """
    shown = process.corrupt(latents, noise, quantile)
    text = {name: values.to(latents.dtype) for name, values in text.items()}
    predicted = predict(shown.noisy, shown.time, text)
    losses = (predicted.float() - shown.target.float()).square().flatten(1).mean(1)
    return losses if shown.weight is None else losses * shown.weight
