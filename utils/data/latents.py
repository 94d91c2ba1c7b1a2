"""Units -> the losses of their draws, from latents that were encoded once.

Text is encoded once too, unless it would fill the disk or the text encoder trains.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DiffusionPipeline

from utils.arguments.training import TrainingArguments
from utils.data.latent_files import choose_latents_folder, encode_rows
from utils.data.private_set import PrivateSet
from utils.errors import UsageError
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.pipelines import trains_text
from utils.models.processes import read_process
from utils.models.text import embed_captions
from utils.privacy.randomness import SecretRandomness

# Options of a flow's weighting scheme, each of one of them.
OF_SCHEMES = {"logit_mean": "logit_normal", "logit_std": "logit_normal", "mode_scale": "mode"}


@dataclass(frozen=True)
class Objective:
    """How a unit's loss is sampled.

    Attributes:
        num_draws: K, noise multiplicity.
        timestep_sampling: `uniform`; `logit_normal` and `mode`, which favour the middle (Esser et
            al. 2024, section 3.1); or `high_noise`, proportional to the timestep (large noise
            decides an image's layout).
        logit_mean, logit_std, mode_scale: of these; as in the diffusers examples, a positive mean
            is less noise.
        snr_gamma, weighting: of the loss; see `Ddpm` and `Flow`.
    """

    num_draws: int = 1
    timestep_sampling: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29
    snr_gamma: float | None = None
    weighting: str = "none"

    def quantiles(self, units: int, randomness: SecretRandomness) -> torch.Tensor:
        """K noise levels for each unit, stratified: [units, K], quantiles in [0, 1].

        The distribution's quantiles are cut in K equal parts, and each draw has one of them, so
        that a unit's average varies less; which draw gets which part is random.
        """
        turn = (randomness.uniform((units, 1)) * self.num_draws).long()
        part = (torch.arange(self.num_draws) + turn) % self.num_draws
        return self.spread((part + randomness.uniform(part.shape)) / self.num_draws)

    def spread(self, quantile: torch.Tensor) -> torch.Tensor:
        """Numbers that are uniform in [0, 1], as quantiles of the noise levels that are trained."""
        if self.timestep_sampling == "logit_normal":
            normal = torch.special.ndtri(quantile)
            quantile = (normal * self.logit_std - self.logit_mean).sigmoid()
        elif self.timestep_sampling == "mode":
            bend = torch.cos(torch.pi / 2 * quantile).square() - 1 + quantile
            quantile = quantile + self.mode_scale * bend
        elif self.timestep_sampling == "high_noise":
            quantile = quantile.sqrt()
        return quantile


def choose_objective(
    pipeline: DiffusionPipeline, training: TrainingArguments, num_draws: int
) -> Objective:
    """As asked for, or as models of the pipeline's family are usually trained.

    Raises:
        UsageError: an option is for models that are trained otherwise.
    """
    family = find_family(pipeline)
    is_flow = family.process == "Flow"
    chosen = {name: getattr(training, name) for name in OF_SCHEMES}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    for name in ("timestep_sampling", "snr_gamma") if is_flow else ("weighting_scheme", *chosen):
        if getattr(training, name) is not None:
            other = "DDPM" if is_flow else "flow-matching"
            raise UsageError(f"--{name} is for {other} models, and {family.title} is none")
    if not is_flow:
        sampling = training.timestep_sampling or "uniform"
        return Objective(num_draws, sampling, snr_gamma=training.snr_gamma)
    scheme = training.weighting_scheme or family.weighting_scheme
    for name in chosen:
        if OF_SCHEMES[name] != scheme:
            raise UsageError(f"--{name} is for --weighting_scheme {OF_SCHEMES[name]}, not {scheme}")
    return Objective(
        num_draws,
        scheme if scheme in OF_SCHEMES.values() else "uniform",
        weighting=scheme if scheme in ("sigma_sqrt", "cosmap") else "none",
        **chosen,
    )


@dataclass(frozen=True)
class EncodedUnits:
    """The private set, encoded. `latents` and `text` are files: only sampled rows are read.

    Attributes:
        resolution: of the images, in pixels.
        latents: [rows, F, channels, r, r], scaled; F is 2 with flips (as is, mirrored), else 1.
        captions: [rows].
        text: the conditioning of each distinct caption (`embed_captions`), and `caption_rows`
            [rows], which of them each row has; None if it would take too much disk, or the text
            encoder trains.
        order, first, count: unit u owns the rows order[first[u] : first[u] + count[u]]. One that
            has none adds nothing: its losses are zero.
    """

    resolution: int
    latents: torch.Tensor
    captions: Sequence[str]
    text: dict[str, torch.Tensor] | None
    caption_rows: torch.Tensor | None
    order: torch.Tensor
    first: torch.Tensor
    count: torch.Tensor

    def sample_rows(
        self, units: torch.Tensor, num_draws: int, randomness: SecretRandomness
    ) -> torch.Tensor:
        """K rows of each unit, every row equally likely, distinct if it has K of them: [U, K]. Of
        one that has none, any row.

        Systematic sampling: K evenly spaced places with one random start a unit.
        """
        start = randomness.uniform((len(units), 1))
        places = (torch.arange(num_draws) + start) / num_draws * self.count[units, None]
        places = places.long().minimum(self.count[units, None] - 1).clamp_min(0)
        return self.order[self.first[units, None] + places]

    def row_bytes(self) -> tuple[int, int]:
        """What an image takes on disk, and a caption unlike all others; 0 if none are kept."""
        text = {} if self.text is None else self.text
        return self.latents[0].nbytes, sum(values[0].nbytes for values in text.values())

    def read_captions(self, rows: torch.Tensor) -> list[str]:
        return [self.captions[row] for row in rows.tolist()]

    def encode_captions(
        self, pipeline: DiffusionPipeline, rows: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The conditioning by the captions of `rows` [n], by name (`embed_captions`)."""
        if self.text is not None:
            return {name: values[self.caption_rows[rows]] for name, values in self.text.items()}
        captions = self.read_captions(rows)
        if trains_text(pipeline):
            return find_family(pipeline).encode_text(captions, self.resolution)
        number = {caption: i for i, caption in enumerate(dict.fromkeys(captions))}  # draws share
        text = embed_captions(pipeline, list(number), self.resolution)
        which = torch.tensor([number[caption] for caption in captions])
        return {name: values[which.to(values.device)] for name, values in text.items()}


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
    units = group_rows_by_unit(private_set.unit_of_row, private_set.num_units)
    encoded = EncodedUnits(
        resolution, files.latents, private_set.captions, files.text, files.caption_rows, *units
    )
    return encoded, files.folder


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
    objective = choose_objective(pipeline, training, num_draws)
    return PrivateLosses(pipeline, units, objective, randomness), encoded_dir


def group_rows_by_unit(
    unit_of_row: torch.Tensor, num_units: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`order` [rows], `first` [N] and `count` [N] of `EncodedUnits`, from the unit of each row; N
    is `num_units`, if that is more than have one."""
    count = unit_of_row.bincount(minlength=num_units)
    first = (count.cumsum(0) - count).clamp_max(len(unit_of_row) - 1)
    return unit_of_row.argsort(stable=True), first, count


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
    family = find_family(pipeline)
    process = read_process(pipeline.scheduler, objective.snr_gamma, objective.weighting)
    rows = units.sample_rows(indices, objective.num_draws, randomness).flatten()
    flips = (randomness.uniform(rows.shape) * units.latents.shape[1]).long()
    quantiles = objective.quantiles(len(indices), randomness).flatten()
    latents = units.latents[rows, flips]
    noise = randomness.normal(latents.shape)
    text = units.encode_captions(pipeline, rows)
    latents, noise, quantiles = (t.to(family.device) for t in (latents, noise, quantiles))
    text = {name: values.to(family.device) for name, values in text.items()}
    losses = denoising_loss(family.predictor, process, latents, text, noise, quantiles)
    has_rows = (units.count[indices] > 0).to(losses.device)
    return losses.view(len(indices), objective.num_draws).mean(1).where(has_rows, 0.0)
