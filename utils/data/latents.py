"""Units -> the losses of their draws, from latents that were encoded once.

Text is encoded once too, unless there are many distinct captions or the text encoder trains.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline

from utils.arguments.training import TrainingArguments
from utils.data.latent_files import choose_latents_folder, encode_rows
from utils.data.private_set import PrivateSet
from utils.models.denoising import denoising_loss, encode_text
from utils.models.pipelines import get_device, trains_text
from utils.models.processes import read_process
from utils.privacy.randomness import SecretRandomness

FEW_CAPTIONS = 1000  # distinct ones; so many are embedded once, more are embedded when sampled


@dataclass(frozen=True)
class Objective:
    """How a unit's loss is sampled.

    Attributes:
        num_draws: K, noise multiplicity.
        timestep_sampling: `uniform`; `logit_normal`, which favours the middle (Esser et al. 2024,
            section 3.1); or `high_noise`, proportional to the timestep (large noise decides an
            image's layout).
        snr_gamma: of min-SNR weighting; None for none.
    """

    num_draws: int = 1
    timestep_sampling: str = "uniform"
    snr_gamma: float | None = None

    def timesteps(self, units: int, total: int, randomness: SecretRandomness) -> torch.Tensor:
        """K timesteps for each unit, stratified: [units, K], integers below `total`.

        The distribution's quantiles are cut in K equal parts, and each draw has one of them, so
        that a unit's average varies less; which draw gets which part is random.
        """
        turn = (randomness.uniform((units, 1)) * self.num_draws).long()
        part = (torch.arange(self.num_draws) + turn) % self.num_draws
        quantile = (part + randomness.uniform(part.shape)) / self.num_draws
        if self.timestep_sampling == "logit_normal":
            quantile = torch.special.ndtri(quantile).sigmoid()
        elif self.timestep_sampling == "high_noise":
            quantile = quantile.sqrt()
        return (quantile * total).long().clamp_max(total - 1)


@dataclass(frozen=True)
class EncodedUnits:
    """The private set, encoded. `latents` and `tokens` are files: only sampled rows are read.

    Attributes:
        resolution: of the images, in pixels.
        latents: [rows, F, channels, r, r], scaled; F is 2 with flips (as is, mirrored), else 1.
        tokens: [rows, E, T], the token ids of each row's caption for each of E text encoders.
        text: the conditioning of each distinct caption (`encode_text`), and `caption_rows` [rows],
            which of them each row has; None if there are more than `FEW_CAPTIONS`, or the
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

    def sample_rows(
        self, units: torch.Tensor, num_draws: int, randomness: SecretRandomness
    ) -> torch.Tensor:
        """K rows of each unit, every row equally likely, distinct if it has K of them: [U, K].

        Systematic sampling: K evenly spaced places with one random start a unit.
        """
        start = randomness.uniform((len(units), 1))
        places = (torch.arange(num_draws) + start) / num_draws * self.count[units, None]
        places = places.long().minimum(self.count[units, None] - 1)
        return self.order[self.first[units, None] + places]

    def encode_captions(
        self, pipeline: DiffusionPipeline, rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The conditioning by the captions of `rows` [n], by name (`encode_text`).

        A frozen encoder works in fp32 also under autocast, as it does where captions are embedded
        once: else one more distinct caption would change everyone's loss by its rounding.
        """
        if self.text is not None:
            return {name: values[self.caption_rows[rows]] for name, values in self.text.items()}
        ids = self.tokens[rows].long()
        if trains_text(pipeline):
            return encode_text(pipeline, ids, self.resolution)
        with torch.autocast(get_device(pipeline).type, enabled=False):
            return encode_text(pipeline, ids, self.resolution)


@torch.no_grad()
def encode_units(
    pipeline: DiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    folder: Path,
    random_flip: bool = False,
) -> tuple[EncodedUnits, Path]:
    """Encode every image once (its latent mean; both ways with flips), and every caption; also
    returns the folder of the files (`latent_files.encode_rows`).

    Raises:
        UsageError: see `latent_files.encode_rows`.
    """
    files = encode_rows(pipeline, private_set, resolution, folder, random_flip)
    latents, tokens, encoded_dir = files
    text, caption_rows = None, None
    if not trains_text(pipeline):
        text, caption_rows = _encode_if_few(pipeline, tokens, resolution)
    units = group_rows_by_unit(private_set.unit_of_row)
    return EncodedUnits(resolution, latents, tokens, text, caption_rows, *units), encoded_dir


def _encode_if_few(
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


@dataclass(frozen=True)
class PrivateLosses:
    """A function from the indices of units [U] to their losses [U]."""

    pipeline: DiffusionPipeline
    units: EncodedUnits
    objective: Objective
    randomness: SecretRandomness

    def __call__(self, indices: torch.Tensor) -> torch.Tensor:
        return unit_losses(self.pipeline, self.units, indices, self.objective, self.randomness)


def prepare_losses(
    pipeline: DiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    training: TrainingArguments,
    num_draws: int,
    randomness: SecretRandomness,
) -> tuple[PrivateLosses, Path]:
    """Encode the private set; also returns the folder of the encoded images.

    Raises:
        UsageError: see `encode_units`.
    """
    folder = choose_latents_folder(training)
    units, encoded_dir = encode_units(
        pipeline, private_set, resolution, folder, training.random_flip
    )
    objective = Objective(num_draws, training.timestep_sampling, training.snr_gamma)
    return PrivateLosses(pipeline, units, objective, randomness), encoded_dir


def group_rows_by_unit(
    unit_of_row: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
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
    process = read_process(pipeline.scheduler)
    rows = units.sample_rows(indices, objective.num_draws, randomness).flatten()
    flips = (randomness.uniform(rows.shape) * units.latents.shape[1]).long()
    timesteps = objective.timesteps(len(indices), process.num_timesteps, randomness).flatten()
    latents = units.latents[rows, flips]
    noise = randomness.normal(latents.shape)
    text = units.encode_captions(pipeline, rows)
    device = get_device(pipeline)
    latents, noise, timesteps = (t.to(device) for t in (latents, noise, timesteps))
    text = {name: values.to(device) for name, values in text.items()}
    losses = denoising_loss(pipeline.unet, process, latents, text, noise, timesteps)
    if objective.snr_gamma is not None:
        losses = losses * process.snr_weights(timesteps, objective.snr_gamma)
    return losses.view(len(indices), objective.num_draws).mean(1)
