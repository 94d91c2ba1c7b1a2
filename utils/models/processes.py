"""How a base was trained to see noise: the process that its scheduler's config describes.

A base ships the scheduler that its makers sample with. Its `add_noise` is that sampler's own:
Euler's gives noise of standard deviation 15 at the last timestep, those of DPM-Solver++ and UniPC
expect their own order of timesteps. What they share with training is the betas and the prediction
type.
"""

import re
from functools import lru_cache
from typing import NamedTuple

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.training_utils import compute_snr

from utils.errors import UsageError
from utils.models.families import find_family

# Schedulers that sample from a model trained by DDPM, whatever way each takes.
SAMPLERS = """
DDIMInverseScheduler DDIMParallelScheduler DDIMScheduler DDPMParallelScheduler DDPMScheduler
DEISMultistepScheduler DPMSolverMultistepInverseScheduler DPMSolverMultistepScheduler
DPMSolverSDEScheduler DPMSolverSinglestepScheduler EulerAncestralDiscreteScheduler
EulerDiscreteScheduler HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler
LMSDiscreteScheduler PNDMScheduler SASolverScheduler UniPCMultistepScheduler
""".split()
# Those that sample from a flow, if their config says that it is one.
FLOW_SAMPLERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
DISTILLED = ("LCMScheduler", "TCDScheduler", "FlowMatchLCMScheduler")
DISTILLED_NAMES = ("turbo", "lightning", "lcm", "tcd", "hyper", "dmd", "schnell")
KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
KEYS += ("prediction_type", "rescale_betas_zero_snr")
PREDICTION_TYPES = ("epsilon", "v_prediction")


class Corrupted(NamedTuple):
    """What a model is shown of images, and what it must make of it.

    Attributes:
        noisy: the noisy latents. time: [batch], how noisy they are, as the denoiser takes it.
        target: what it must predict: like `noisy`.
        weight: of the loss of each row [batch]; None where all weigh the same.
    """

    noisy: torch.Tensor
    time: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor | None = None


class Ddpm:
    """Ho et al. 2020: noisy = sqrt(a_t) image + sqrt(1 - a_t) noise, for integers t below T.

    Attributes:
        num_timesteps: T. snr_gamma: of min-SNR weights (Hang et al. 2023); None for none.
        predicts: what the model was trained to predict: `epsilon`, the noise, or `v_prediction`
            (Salimans and Ho 2022, appendix D).
    """

    def __init__(self, scheduler: DDPMScheduler, snr_gamma: float | None = None):
        self.snr_gamma = snr_gamma
        self._scheduler = scheduler  # of its methods, only the arithmetic of training
        self.num_timesteps = scheduler.config.num_train_timesteps
        self.predicts = scheduler.config.prediction_type

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, quantile: torch.Tensor
    ) -> Corrupted:
        """Latents under noise like them; `quantile` [batch] of T timesteps, in [0, 1)."""
        timesteps = (quantile * self.num_timesteps).long().clamp_max(self.num_timesteps - 1)
        target, noisy = noise, self._scheduler.add_noise(latents, noise, timesteps)
        if self.predicts == "v_prediction":
            target = self._scheduler.get_velocity(latents, noise, timesteps)
        return Corrupted(noisy, timesteps, target, self._weigh(timesteps))

    def _weigh(self, timesteps: torch.Tensor) -> torch.Tensor | None:
        """Min-SNR weights: Hang et al. 2023, section 3.4."""
        if self.snr_gamma is None:
            return None
        snr = compute_snr(self._scheduler, timesteps)
        if self.predicts == "epsilon":
            return (self.snr_gamma / snr).clamp(max=1)
        return snr.clamp(max=self.snr_gamma) / (snr + 1)


class Flow:
    """Flow matching along straight lines: noisy = (1 - s) image + s noise, for s in (0, 1].

    Esser et al. 2024, sections 2 and 3. Quantiles stand for levels of `num_timesteps` equal steps,
    each moved towards noise by the shift that the base's makers chose (their section 5.3.2).

    Attributes:
        shift: 1 where every pipeline call computes its own from the resolution.
        weighting: of the loss, as the diffusers examples name it: `none`, `sigma_sqrt` or `cosmap`.
    """

    def __init__(self, shift: float, num_timesteps: int = 1000, weighting: str = "none"):
        self.shift, self.num_timesteps, self.weighting = shift, num_timesteps, weighting

    def corrupt(
        self, latents: torch.Tensor, noise: torch.Tensor, quantile: torch.Tensor
    ) -> Corrupted:
        """Latents under noise like them; `quantile` [batch] of the levels, in [0, 1)."""
        level = (quantile * self.num_timesteps).long().clamp_max(self.num_timesteps - 1) + 1
        sigma = (level / self.num_timesteps).to(latents)
        sigma = self.shift * sigma / (1 + (self.shift - 1) * sigma)
        share = sigma.view(-1, *[1] * (latents.ndim - 1))
        noisy = (1 - share) * latents + share * noise
        time = sigma * self.num_timesteps
        return Corrupted(noisy, time, noise - latents, self._weigh(sigma))

    def _weigh(self, sigma: torch.Tensor) -> torch.Tensor | None:
        if self.weighting == "sigma_sqrt":
            return sigma**-2
        if self.weighting == "cosmap":
            return 2 / (torch.pi * (1 - 2 * sigma + 2 * sigma**2))
        return None


Process = Ddpm | Flow


def read_process(
    scheduler: SchedulerMixin, snr_gamma: float | None = None, weighting: str = "none"
) -> Process:
    """The training process of the base that ships this scheduler.

    Args:
        snr_gamma: see `Ddpm`; a flow has none. weighting: see `Flow`; a DDPM has none.

    Raises:
        UsageError: the base was trained neither as a DDPM nor as a flow.
    """
    name, config = type(scheduler).__name__, scheduler.config
    shift = _read_shift(name, config)
    if shift is not None:
        return Flow(shift, config.num_train_timesteps, weighting)
    flow = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if name not in (*SAMPLERS, *DISTILLED) or flow:
        raise UsageError(
            f"the base is sampled by {name} with this configuration, so it was trained neither as "
            "a DDPM with timesteps nor as a flow along straight lines; other processes are not "
            "supported"
        )
    if config.prediction_type not in PREDICTION_TYPES:
        raise UsageError(
            f"the base predicts '{config.prediction_type}'; supported: "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    values = {key: config[key] for key in KEYS if key in config}
    frozen = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items())
    return _build(frozen, snr_gamma)


def _read_shift(name: str, config: dict) -> float | None:
    """Of a flow; None if this is the config of something else."""
    if name in (*FLOW_SAMPLERS, "FlowMatchLCMScheduler"):
        return 1.0 if config.get("use_dynamic_shifting") else float(config.get("shift", 1.0))
    if config.get("use_flow_sigmas") and config.get("prediction_type") == "flow_prediction":
        return float(config.get("flow_shift", 1.0))
    return None


def find_distillation(pipeline: DiffusionPipeline, name: str) -> str | None:
    """What says that a model was distilled to a few steps, or None.

    Turbo models are sampled by Euler with trailing timesteps; so are models whose schedule was
    rescaled to end in pure noise (Lin et al. 2024), which are not distilled.
    """
    scheduler, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    if scheduler in DISTILLED:
        return f"it is sampled by {scheduler}"
    says = find_family(pipeline).find_distillation()
    if says is not None:
        return says
    rescaled = config.get("rescale_betas_zero_snr", False)
    trailing = config.get("timestep_spacing") == "trailing" and not rescaled
    if scheduler.startswith("Euler") and trailing and config.prediction_type == "epsilon":
        return f"it is sampled by {scheduler} with trailing timesteps"
    parts = name.rstrip("/").split("/")
    last = [part for part in parts if part.startswith("models--")] + parts[-1:]  # in a Hub's cache
    found = [word for word in DISTILLED_NAMES if any(_says(part, word) for part in last)]
    return f"its name says {found[0]}" if found else None


def _says(name: str, word: str) -> bool:
    """Whether a word is in a name as one, in any of the usual spellings: v2TurboDPM, xl-lcmv2."""
    after = r"(?![a-zA-Z])|(?=-?_?(?:SD|FLUX))" if word == "hyper" else "(?![a-z])"  # no realism
    return any(
        re.search(f"{before}{spelling}(?:{behind})", name)
        for before, spelling, behind in [
            ("(?<![A-Za-z])", word, after),
            ("", word.title(), after),
            ("(?<![A-Z])", word.upper(), "(?![A-Z])"),
        ]
    )


@lru_cache
def _build(values: tuple, snr_gamma: float | None) -> Ddpm:
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values}
    return Ddpm(DDPMScheduler(**values), snr_gamma)
