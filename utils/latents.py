"""Units -> the losses of their draws, from latents and text that were computed once."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from utils.arguments import TrainingArguments
from utils.data import PrivateSet
from utils.entropy import SecretRandomness
from utils.latent_files import encode_rows, latents_folder
from utils.pipelines import denoising_loss, device_of, encode_text, snr_weights, trains_text

FEW_CAPTIONS = 1000  # distinct ones; so many are embedded once, more are embedded when drawn


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
    """The private set, encoded. Its tensors are files, of which only what is drawn is read.

    Attributes:
        resolution: of the images, in pixels.
        latents: [rows, F, channels, r, r], scaled; F is 2 with flips (as is, mirrored), else 1.
        tokens: [rows, E, T], the token ids of each row's caption for each of E text encoders.
        text: what the U-Net is told of each distinct caption (`encode_text`), and `caption_rows`
            [rows], which of them each row has; None if there are more than `FEW_CAPTIONS`, or the
            text encoder trains.
        order, first, count: unit u owns the rows order[first[u] : first[u] + count[u]].
    """

    resolution: int
    latents: torch.Tensor
    tokens: torch.Tensor
    text: dict[str, torch.Tensor] | None
    caption_rows: torch.Tensor | None
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

    def text_of(self, pipeline: DiffusionPipeline, rows: torch.Tensor) -> dict[str, torch.Tensor]:
        """What the U-Net is told of the captions of `rows` [n], by name (`encode_text`).

        A frozen encoder works in fp32 also under autocast, as it does where captions are embedded
        once: else one more distinct caption would change everyone's loss by its rounding.
        """
        if self.text is not None:
            return {name: told[self.caption_rows[rows]] for name, told in self.text.items()}
        ids = self.tokens[rows].long()
        if trains_text(pipeline):
            return encode_text(pipeline, ids, self.resolution)
        with torch.autocast(device_of(pipeline).type, enabled=False):
            return encode_text(pipeline, ids, self.resolution)


@torch.no_grad()
def encode_units(
    pipeline: DiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    folder: Path,
    random_flip: bool = False,
) -> tuple[EncodedUnits, Path]:
    """Encode every image once (its latent mean; both ways with flips), and every caption; returns
    also the folder that was made (`latent_files.encode_rows`).

    Raises:
        UsageError: see `latent_files.encode_rows`.
    """
    latents, tokens, made = encode_rows(pipeline, private_set, resolution, folder, random_flip)
    text, caption_rows = None, None
    if not trains_text(pipeline):
        text, caption_rows = _few_captions(pipeline, tokens, resolution)
    units = rows_by_unit(private_set.unit_of_row)
    return EncodedUnits(resolution, latents, tokens, text, caption_rows, *units), made


def _few_captions(
    pipeline: DiffusionPipeline, tokens: torch.Tensor, resolution: int
) -> tuple[dict | None, torch.Tensor | None]:
    """`text` and `caption_rows` of `EncodedUnits`, if few captions are distinct."""
    number: dict[bytes, int] = {}
    caption_rows = torch.empty(len(tokens), dtype=torch.int32)
    for start in range(0, len(tokens), 10_000):
        part = tokens[start : start + 10_000].numpy()
        rows = [number.setdefault(row.tobytes(), len(number)) for row in part]
        caption_rows[start : start + len(rows)] = torch.tensor(rows)
        if len(number) > FEW_CAPTIONS:
            return None, None
    distinct = np.stack([np.frombuffer(row, np.int32) for row in number])
    ids = torch.from_numpy(distinct).long().view(-1, *tokens.shape[1:])
    parts = [encode_text(pipeline, part, resolution) for part in ids.split(64)]
    return {name: torch.cat([p[name].cpu() for p in parts]) for name in parts[0]}, caption_rows


def private_losses(
    pipeline: DiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    training: TrainingArguments,
    draws: int,
    randomness: SecretRandomness,
) -> tuple[Callable[[torch.Tensor], torch.Tensor], Path]:
    """Encode the private set; returns what gives units, by index [U], their losses [U]; and the
    folder of the encoded images.

    Raises:
        UsageError: see `encode_units`.
    """
    folder = latents_folder(training)
    units, made = encode_units(pipeline, private_set, resolution, folder, training.random_flip)
    objective = Objective(draws, training.timestep_sampling, training.snr_gamma)

    def losses_of(indices: torch.Tensor) -> torch.Tensor:
        return unit_losses(pipeline, units, indices, objective, randomness)

    return losses_of, made


def rows_by_unit(unit_of_row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`order` [rows], `first` [N] and `count` [N] of `EncodedUnits`, from the unit of each row."""
    count = unit_of_row.bincount()
    return unit_of_row.argsort(stable=True), count.cumsum(0) - count, count


def unit_losses(
    pipeline: DiffusionPipeline,
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
    text = units.text_of(pipeline, rows)
    device = device_of(pipeline)
    latents, noise, timesteps = (t.to(device) for t in (latents, noise, timesteps))
    text = {name: told.to(device) for name, told in text.items()}
    losses = denoising_loss(pipeline.unet, scheduler, latents, text, noise, timesteps)
    if objective.snr_gamma is not None:
        losses = losses * snr_weights(scheduler, timesteps, objective.snr_gamma)
    return losses.view(len(indices), objective.draws).mean(1)
