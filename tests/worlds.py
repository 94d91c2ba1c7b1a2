"""Small worlds of privacy units, some hostile, for the tests of the privacy contract."""

from functools import partial

import torch
from peft import LoraConfig
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.conftest import build_tiny_pipeline
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.denoising import denoising_loss
from utils.models.families.stable_diffusion import StableDiffusion
from utils.models.processes import read_process
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState, clipped_gradient_sum, private_steps

TAIL = 6.5  # standard deviations: a normal tail of 8e-11, below 1e-6 over thousands of comparisons
HOSTILE = ["ordinary", "huge", "overflowing", "nan", "inf", "zero", "small", "vanishing"]


def build_plan(**changes) -> PrivacyPlan:
    plan = {
        "num_units": 200,
        "expected_batch_size": 60.0,
        "steps": 1,
        "noise_multiplier": 1.0,
        "max_grad_norm": 1.0,
        "noise_multiplicity": 1,
        "delta": 1e-4,
    }
    return PrivacyPlan(**(plan | changes))


class LinearWorld:
    """Units are rows of features; unit u's loss is the mean over K fixed, unit-owned draws."""

    def __init__(self, kinds: list[str], draws: int = 1, seed: int = 0, wide: bool = False):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        inside = 40 if wide else 4  # wide enough for gradients to stay in factors
        self.model = nn.Sequential(
            nn.Linear(5, inside), nn.Tanh(), nn.LayerNorm(inside), nn.Linear(inside, inside)
        )
        self.data = torch.randn(len(kinds), draws, 5, generator=generator)
        for unit, kind in enumerate(kinds):
            scale = {"huge": 1e6, "overflowing": 1e25, "nan": float("nan"), "inf": float("inf")}
            scale |= {"small": 0.02, "vanishing": 1e-20}
            self.data[unit] *= scale.get(kind, 1.0) if kind != "zero" else 0.0
        self.draws, self.engine = draws, PerUnitGradients(self.model, draws)

    def losses(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.data[indices].flatten(0, 1)
        # The product makes gradients as large as the data, past what tanh would let through.
        losses = (self.model(x) * x[:, :1]).square().mean(1)
        return losses.view(len(indices), self.draws).mean(1)

    def total(self, accelerator, units, micro: int = 8, **plan) -> torch.Tensor:
        plan = build_plan(noise_multiplicity=self.draws, **plan)
        units = torch.as_tensor(list(units), dtype=torch.long)
        return clipped_gradient_sum(accelerator, self.engine, self.losses, units, plan, micro)

    def largest_move(self, accelerator, micro: int = 4, **plan) -> float:
        """How far leaving out one unit moves the clipped sum: the empirical sensitivity."""
        everyone = range(len(self.data))
        whole = self.total(accelerator, everyone, micro, **plan)
        if not whole.isfinite().all():
            return float("inf")
        rest = [[u for u in everyone if u != unit] for unit in everyone]
        return max((whole - self.total(accelerator, r, micro, **plan)).norm().item() for r in rest)


def unet_losses(unet, scheduler, latents, words, noise, timesteps) -> torch.Tensor:
    """The denoising loss of each row of a bare U-Net, at whole timesteps of a thousand."""
    predict, text = partial(StableDiffusion.predict, unet), {"encoder_hidden_states": words}
    quantiles = (timesteps + 0.5) / 1000
    return denoising_loss(predict, read_process(scheduler), latents, text, noise, quantiles)


class UNetWorld:
    """The real loss on a tiny U-Net; each unit owns its latents, noise and timesteps.

    `trainable` is "lora" (on attention, projections and convolutions) or "all" (every parameter).
    """

    units, draws, huge_unit = 7, 3, 6

    def __init__(self, trainable: str):
        pipeline = self.pipeline = build_tiny_pipeline()
        unet = self.unet = pipeline.unet.requires_grad_(trainable == "all")
        if trainable == "lora":
            targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1"]
            torch.manual_seed(0)
            unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        generator = torch.Generator().manual_seed(0)
        latents = torch.randn(self.units, self.draws, 4, 8, 8, generator=generator)
        latents[self.huge_unit] *= 1e4
        noise = torch.randn(self.units, self.draws, 4, 8, 8, generator=generator)
        embeddings = torch.randn(self.units, self.draws, 8, 16, generator=generator)
        timesteps = torch.randint(1000, (self.units, self.draws), generator=generator)
        self.tensors = [latents, embeddings, noise, timesteps]
        self.scheduler, self.engine = pipeline.scheduler, PerUnitGradients(unet, self.draws)

    def losses(self, indices):
        parts = [tensor[indices].flatten(0, 1) for tensor in self.tensors]
        values = unet_losses(self.unet, self.scheduler, *parts)
        return values.view(len(indices), self.draws).mean(1)

    def total(self, accelerator, units, micro: int, **plan):
        plan = build_plan(noise_multiplicity=self.draws, max_grad_norm=0.05, **plan)
        return clipped_gradient_sum(accelerator, self.engine, self.losses, units, plan, micro)


def train(*arguments) -> None:
    """All the private steps."""
    for _ in private_steps(*arguments):
        pass


def measure_update(accelerator, plan, randomness=None, losses=None):
    """The parameters' move over `plan.steps` steps of plain SGD at rate 1, times B."""
    model = nn.Linear(1000, 100, bias=False)
    nn.init.zeros_(model.weight)
    engine = PerUnitGradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    losses = losses or (lambda units: 0 * model(torch.ones(len(units), 1000)).sum(1))
    randomness = randomness or SecretRandomness()
    train(accelerator, TrainingState(engine, optimizer, constant), losses, plan, randomness, 16)
    return -model.weight.detach().flatten() * plan.expected_batch_size


def assert_normal(noise: torch.Tensor, std: float) -> None:
    """The first four moments are those of N(0, std^2). The mean of fourth powers has a longer tail
    than `TAIL` says: of 1,900 numbers, 1e-7."""
    count, z = noise.numel(), noise.double() / std
    assert count >= 1900
    assert abs(z.mean()) < TAIL / count**0.5
    assert abs(z.square().mean() - 1) < TAIL * (2 / count) ** 0.5
    assert abs(z.pow(3).mean()) < TAIL * (15 / count) ** 0.5
    assert abs(z.pow(4).mean() - 3) < TAIL * (96 / count) ** 0.5


class Rounding(TorchFunctionMode):
    """A library that rounds what it multiplies to so many bits, where PyTorch cannot see it."""

    def __init__(self, names: str, bits: int):
        super().__init__()
        self.names, self.bits = names.split(), bits

    def round(self, value):
        if not isinstance(value, torch.Tensor):
            return value
        fraction, exponent = value.frexp()
        return (fraction * 2 ** (self.bits + 1)).round().ldexp(exponent - self.bits - 1)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", str(function)) in self.names:
            args = [self.round(value) for value in args]
        return function(*args, **(kwargs or {}))
