"""Units -> latents and text embeddings, computed once and kept in memory."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import PartialState
from diffusers import StableDiffusionPipeline
from tqdm import tqdm

from utils.arguments import TrainingArguments
from utils.data import PrivateSet, pixel_batches, to_unit_range
from utils.entropy import SecretRandomness
from utils.pipelines import denoising_loss, encode_captions, snr_weights, trains_text


@dataclass(frozen=True)
class Objective:
    """How a unit's loss is drawn.

    Attributes:
        draws: K, noise multiplicity.
        timestep_sampling: `uniform`; `logit_normal`, which favours the middle (Esser et al. 2024,
            section 3.1); or `high_noise`, proportional to the timestep (large noise decides an
            image's layout).
        snr_gamma: of min-SNR weighting; None for none.
    """

    draws: int = 1
    timestep_sampling: str = "uniform"
    snr_gamma: float | None = None

    def timesteps(self, units: int, total: int, randomness: SecretRandomness) -> torch.Tensor:
        """K timesteps for each unit, stratified: [units, K], integers below `total`.

        The distribution's quantiles are cut in K equal parts, and each draw has one of them, so
        that a unit's average varies less; which draw gets which part is random.
        """
        turn = (randomness.uniform((units, 1)) * self.draws).long()
        part = (torch.arange(self.draws) + turn) % self.draws
        quantile = (part + randomness.uniform(part.shape)) / self.draws
        if self.timestep_sampling == "logit_normal":
            quantile = torch.special.ndtri(quantile).sigmoid()
        elif self.timestep_sampling == "high_noise":
            quantile = quantile.sqrt()
        return (quantile * total).long().clamp_max(total - 1)


@dataclass(frozen=True)
class EncodedUnits:
    """The private set, encoded. It never leaves memory.

    Attributes:
        latents: [rows, F, channels, r, r], scaled; F is 2 with flips (as is, mirrored), else 1.
        embeddings: [distinct captions, tokens, width]. token_ids: [distinct captions, tokens].
        caption_rows: [rows], the row of `embeddings` for each row of `latents`.
        order, first, count: unit u owns the rows order[first[u] : first[u] + count[u]].
    """

    latents: torch.Tensor
    embeddings: torch.Tensor
    token_ids: torch.Tensor
    caption_rows: torch.Tensor
    order: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor

    def draw_rows(
        self, units: torch.Tensor, draws: int, randomness: SecretRandomness
    ) -> torch.Tensor:
        """K rows of each unit, every row equally likely, distinct if it has K of them: [U, K].

        Systematic sampling: K evenly spaced places with one random start a unit.
        """
        start = randomness.uniform((len(units), 1))
        places = (torch.arange(draws) + start) / draws * self.count[units, None]
        places = places.long().minimum(self.count[units, None] - 1)
        return self.order[self.first[units, None] + places]


@torch.no_grad()
def encode_units(
    pipeline: StableDiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    random_flip: bool = False,
    show_progress: bool = True,
) -> EncodedUnits:
    """Encode every image once (its latent mean; both ways with flips), every caption once."""
    rows, batch_size = private_set.rows, 64
    vae, device = pipeline.vae, pipeline.device
    batches = pixel_batches(rows, private_set.image_column, resolution, batch_size)
    total = -(-len(rows) // batch_size)
    latents = []
    for pixels in tqdm(batches, "encoding images", total, leave=False, disable=not show_progress):
        images = to_unit_range(pixels.to(device))
        views = [images, images.flip(-1)] if random_flip else [images]
        encoded = [vae.encode(view).latent_dist.mode() for view in views]
        latents.append(torch.stack(encoded, 1).mul(vae.config.scaling_factor).cpu())
    distinct = sorted(set(private_set.captions))
    row_of = {caption: row for row, caption in enumerate(distinct)}
    ids = encode_captions(pipeline.tokenizer, distinct).to(device)
    embeddings = [pipeline.text_encoder(part).last_hidden_state.cpu() for part in ids.split(64)]
    caption_rows = torch.tensor([row_of[caption] for caption in private_set.captions])
    return EncodedUnits(
        torch.cat(latents),
        torch.cat(embeddings),
        ids.cpu(),
        caption_rows,
        *rows_by_unit(private_set.unit_of_row),
    )


def private_losses(
    pipeline: StableDiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    training: TrainingArguments,
    draws: int,
    randomness: SecretRandomness,
) -> Callable[[torch.Tensor], torch.Tensor]:
    """Encode the private set; returns what gives units, by index [U], their losses [U]."""
    shown = PartialState().is_main_process
    units = encode_units(pipeline, private_set, resolution, training.random_flip, shown)
    objective = Objective(draws, training.timestep_sampling, training.snr_gamma)

    def losses_of(indices: torch.Tensor) -> torch.Tensor:
        return unit_losses(pipeline, units, indices, objective, randomness)

    return losses_of


def rows_by_unit(unit_of_row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`order` [rows], `first` [N] and `count` [N] of `EncodedUnits`, from the unit of each row."""
    count = unit_of_row.bincount()
    return unit_of_row.argsort(stable=True), count.cumsum(0) - count, count


def unit_losses(
    pipeline: StableDiffusionPipeline,
    units: EncodedUnits,
    indices: torch.Tensor,
    objective: Objective,
    randomness: SecretRandomness,
) -> torch.Tensor:
    """The denoising loss of each unit, averaged over its K draws: [U].

    A draw is one of the unit's images, noise, a timestep and a flip. A unit's draws are contiguous
    in the batch, as the engine requires.
    """
    scheduler = pipeline.scheduler
    rows = units.draw_rows(indices, objective.draws, randomness).flatten()
    flips = (randomness.uniform(rows.shape) * units.latents.shape[1]).long()
    total = scheduler.config.num_train_timesteps
    timesteps = objective.timesteps(len(indices), total, randomness).flatten()
    latents = units.latents[rows, flips]
    noise = randomness.normal(latents.shape)
    captions = units.caption_rows[rows]
    if trains_text(pipeline):
        embeddings = pipeline.text_encoder(units.token_ids[captions].to(pipeline.device))[0]
    else:
        embeddings = units.embeddings[captions]
    inputs = [tensor.to(pipeline.device) for tensor in (latents, embeddings, noise, timesteps)]
    losses = denoising_loss(pipeline.unet, scheduler, *inputs)
    if objective.snr_gamma is not None:
        losses = losses * snr_weights(scheduler, inputs[-1], objective.snr_gamma)
    return losses.view(len(indices), objective.draws).mean(1)
