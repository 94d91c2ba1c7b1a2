"""How a base was trained to see noise: the process that its scheduler's config describes.

A base ships the scheduler that its makers sample with. Its `add_noise` is that sampler's own:
Euler's gives noise of standard deviation 15 at the last timestep, those of DPM-Solver++ and UniPC
expect their own order of timesteps. What they share with training is the betas and the prediction
type.
"""

import re
from functools import lru_cache

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, SchedulerMixin
from diffusers.training_utils import compute_snr

from utils.errors import UsageError

# Schedulers that sample from a model trained by DDPM, whatever way each takes.
SAMPLERS = """
DDIMInverseScheduler DDIMParallelScheduler DDIMScheduler DDPMParallelScheduler DDPMScheduler
DEISMultistepScheduler DPMSolverMultistepInverseScheduler DPMSolverMultistepScheduler
DPMSolverSDEScheduler DPMSolverSinglestepScheduler EulerAncestralDiscreteScheduler
EulerDiscreteScheduler HeunDiscreteScheduler KDPM2AncestralDiscreteScheduler KDPM2DiscreteScheduler
LMSDiscreteScheduler PNDMScheduler SASolverScheduler UniPCMultistepScheduler
""".split()
DISTILLED = ("LCMScheduler", "TCDScheduler")
DISTILLED_NAMES = ("turbo", "lightning", "lcm", "tcd", "hyper", "dmd", "dmd2", "schnell")
KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
KEYS += ("prediction_type", "rescale_betas_zero_snr")
PREDICTION_TYPES = ("epsilon", "v_prediction")


class Ddpm:
    """Ho et al. 2020: noisy = sqrt(a_t) image + sqrt(1 - a_t) noise, for integers t below T.

    Attributes:
        num_timesteps: T.
        predicts: what the model was trained to predict: `epsilon`, the noise, or `v_prediction`
            (Salimans and Ho 2022, appendix D).
    """

    def __init__(self, scheduler: DDPMScheduler):
        self._scheduler = scheduler  # of its methods, only the arithmetic of training
        self.num_timesteps = scheduler.config.num_train_timesteps
        self.predicts = scheduler.config.prediction_type

    def corrupt(self, latents, noise, timesteps) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy latents, and what the model must predict from them: each like `latents`."""
        noisy = self._scheduler.add_noise(latents, noise, timesteps)
        if self.predicts == "epsilon":
            return noisy, noise
        return noisy, self._scheduler.get_velocity(latents, noise, timesteps)

    def snr_weights(self, timesteps: torch.Tensor, gamma: float) -> torch.Tensor:
        """Min-SNR weights of the loss: [batch]. Hang et al. 2023, section 3.4."""
        snr = compute_snr(self._scheduler, timesteps)
        if self.predicts == "epsilon":
            return (gamma / snr).clamp(max=1)
        return snr.clamp(max=gamma) / (snr + 1)


def read_process(scheduler: SchedulerMixin) -> Ddpm:
    """The training process of the base that ships this scheduler.

    Raises:
        UsageError: the base was not trained as a DDPM.
    """
    name, config = type(scheduler).__name__, scheduler.config
    flow = config.get("use_flow_sigmas") or config.get("timestep_type") == "continuous"
    if name not in (*SAMPLERS, *DISTILLED) or flow:
        raise UsageError(
            f"the base is sampled by {name}, so it was not trained as a DDPM with timesteps "
            "(Stable Diffusion 1, 2 and XL are); other processes are not supported yet"
        )
    if config.prediction_type not in PREDICTION_TYPES:
        raise UsageError(
            f"the base predicts '{config.prediction_type}'; supported: "
            f"{', '.join(PREDICTION_TYPES)}"
        )
    values = {key: config[key] for key in KEYS if key in config}
    return _build(tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in values.items()))


def find_distillation(pipeline: DiffusionPipeline, name: str) -> str | None:
    """What says that a model was distilled to a few steps, or None.

    Turbo models are sampled by Euler with trailing timesteps; so are models whose schedule was
    rescaled to end in pure noise (Lin et al. 2024), which are not distilled.
    """
    scheduler, config = type(pipeline.scheduler).__name__, pipeline.scheduler.config
    if scheduler in DISTILLED:
        return f"it is sampled by {scheduler}"
    if pipeline.unet.config.time_cond_proj_dim is not None:
        return "its U-Net reads the guidance scale"
    rescaled = config.get("rescale_betas_zero_snr", False)
    trailing = config.get("timestep_spacing") == "trailing" and not rescaled
    if scheduler.startswith("Euler") and trailing and config.prediction_type == "epsilon":
        return f"it is sampled by {scheduler} with trailing timesteps"
    words = re.split(r"[^a-z0-9]+", name.rstrip("/").rsplit("/", 1)[-1].lower())
    found = [word for word in words if word in DISTILLED_NAMES]
    return f"its name says {found[0]}" if found else None


@lru_cache
def _build(values: tuple) -> Ddpm:
    values = {k: list(v) if isinstance(v, tuple) else v for k, v in values}
    return Ddpm(DDPMScheduler(**values))
