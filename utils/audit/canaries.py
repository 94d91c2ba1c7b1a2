"""Canaries for the audit: units whose presence an attacker tries to guess.

Both kinds have the same interface: `included`, `num_units`, `trained` (the modules that train),
`losses` (what the private loop calls), `watch` (what the attacker sees at each step) and `scores`.

Unit u < n is an ordinary one; unit n + j is the j-th canary that is in.
"""

from pathlib import Path

import numpy as np
import torch
from datasets import Dataset, concatenate_datasets
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import nn

from utils.audit.auditing import log_likelihood_ratio, spread
from utils.data.images import ImageRows, find_readable_rows
from utils.data.latents import Objective, encode_units, unit_losses
from utils.data.private_set import PrivateSet
from utils.memory import images_at_once
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.processes import read_process
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness


class GradientCanaries:
    """Canaries with orthogonal gradients: each changes one weight of an extra layer, and no other.

    Args:
        included: [m] booleans, which canaries are in.
        folder: where the encoded images go (`encode_units`).
        loudness: the norm of a canary's gradient before clipping.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        ordinary: PrivateSet,
        resolution: int,
        included: torch.Tensor,
        folder: Path,
        loudness: float,
    ):
        self.pipeline, self.included, self.loudness = pipeline, included, loudness
        self.units, _ = encode_units(pipeline, ordinary, resolution, folder)
        self.num_ordinary = len(self.units.count)
        self.present = included.nonzero().flatten()
        self.num_units = self.num_ordinary + len(self.present)
        self.bank = nn.Linear(len(included), 1, bias=False, device=pipeline.device)
        self.trained = nn.ModuleList([find_family(pipeline).denoiser, self.bank])
        self.seen: list[torch.Tensor] = []

    def losses(self, indices: torch.Tensor, objective: Objective, randomness: SecretRandomness):
        """The real loss of ordinary units; for a canary, a multiple of its own weight: [U]."""
        ordinary = indices < self.num_ordinary
        if ordinary.any():  # canaries among them borrow an image, and ignore its loss
            image = indices.where(ordinary, torch.zeros_like(indices))
            losses = unit_losses(self.pipeline, self.units, image, objective, randomness)
        else:
            losses = self._blank_losses(len(indices))
        chosen = torch.zeros(len(indices), self.bank.in_features, device=losses.device)
        rows = (~ordinary).nonzero().flatten()
        chosen[rows, self.present[indices[rows] - self.num_ordinary]] = 1.0
        loud = self.loudness * self.bank(chosen).squeeze(1)
        return torch.where(ordinary.to(losses.device), losses, 0.0 * losses) + loud

    def _blank_losses(self, count: int) -> torch.Tensor:
        """Losses on the smallest blank images that the model takes: only that it runs matters."""
        family, process = find_family(self.pipeline), read_process(self.pipeline.scheduler)
        side = family.smallest_side * family.pixels_per_side
        latents = torch.zeros(count, *family.latent_shape(side), device=family.device)
        quantiles = torch.zeros(count, device=family.device)
        text = family.encode_text([""] * count, side)
        return denoising_loss(family.predictor, process, latents, text, latents, quantiles)

    def watch(self, plan: PrivacyPlan) -> None:
        """What the attacker sees at a step: the noisy sum, along each canary's direction."""
        scale = plan.expected_batch_size / plan.max_grad_norm
        self.seen.append(self.bank.weight.grad.flatten().cpu().double() * scale)

    def scores(self, plan: PrivacyPlan) -> dict[str, np.ndarray]:
        seen, q, sigma = torch.stack(self.seen).numpy(), plan.sampling_rate, plan.noise_multiplier
        return {
            "likelihood ratio": log_likelihood_ratio(seen, q, sigma),
            "change between steps": spread(seen),
        }


class ImageCanaries:
    """Canaries that are images of noise; the attacker compares their losses before and after."""

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        ordinary: PrivateSet,
        resolution: int,
        included: torch.Tensor,
        folder: Path,
    ):
        self.pipeline, self.included = pipeline, included
        private_set = add_noise_images(ordinary, len(included), resolution)
        self.units, _ = encode_units(pipeline, private_set, resolution, folder)
        self.num_ordinary = len(self.units.count) - len(included)
        self.present = included.nonzero().flatten()
        self.num_units = self.num_ordinary + len(self.present)
        self.trained = find_family(pipeline).denoiser
        self.before = self._canary_losses()

    def losses(self, indices: torch.Tensor, objective: Objective, randomness: SecretRandomness):
        """The real loss of ordinary images and canaries alike: [U]."""
        units = torch.cat([torch.arange(self.num_ordinary), self.num_ordinary + self.present])
        return unit_losses(self.pipeline, self.units, units[indices], objective, randomness)

    @torch.no_grad()
    def _canary_losses(self) -> torch.Tensor:
        """Each canary's loss over the same 16 draws, whenever it is asked for: [m]."""
        randomness = SecretRandomness(debug_seed=0)  # the attacker chooses it
        canaries = self.num_ordinary + torch.arange(len(self.included))
        parts = [
            unit_losses(self.pipeline, self.units, part, Objective(16), randomness).cpu()
            for part in canaries.split(images_at_once(self.units.resolution))
        ]
        return torch.cat(parts)

    def watch(self, plan: PrivacyPlan) -> None:
        """This attacker sees only the trained model."""

    def scores(self, plan: PrivacyPlan) -> dict[str, np.ndarray]:
        return {"fall in loss": (self.before - self._canary_losses()).numpy()}


def add_noise_images(ordinary: PrivateSet, count: int, resolution: int) -> PrivateSet:
    """The ordinary units, then every canary: uniform noise, without a caption."""
    shape, column = (count, resolution, resolution, 3), ordinary.image_column
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    noise = Dataset.from_dict({column: [Image.fromarray(p) for p in pixels]})
    rows = concatenate_datasets([ordinary.rows.select_columns([column]), noise])
    captions = [*ordinary.captions, *[""] * count]  # one of the others would tell of its owner
    units = torch.cat([ordinary.unit_of_row, ordinary.num_units + torch.arange(count)])
    digests = find_readable_rows(ImageRows(rows, column)).digests
    return PrivateSet(rows, column, captions, units, {}, digests)
