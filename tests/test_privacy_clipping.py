"""Clauses 3 and 5: one unit, one clip; bad values cost their owner only.

By replay: the clipped sum over D and over D plus one unit, with every unit's draws frozen.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from torch import nn

import utils.training
from tests.conftest import build_tiny_pipeline
from utils.accounting import PrivacyPlan
from utils.per_unit_gradients import PerUnitGradients
from utils.pipelines import denoising_loss
from utils.training import clipped_gradient_sum

HOSTILE = ["ordinary", "huge", "overflowing", "nan", "inf", "zero"]


def plan_of(bound: float, draws: int, units: int = 8) -> PrivacyPlan:
    return PrivacyPlan(units, 4, 1, 1.0, bound, draws, 1e-3)


class LinearWorld:
    """Units are rows of features; unit u's loss is the mean over K fixed, unit-owned draws."""

    def __init__(self, kinds: list[str], draws: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))
        self.data = torch.randn(len(kinds), draws, 5, generator=generator)
        for unit, kind in enumerate(kinds):
            scale = {"huge": 1e6, "overflowing": 1e25, "nan": float("nan"), "inf": float("inf")}
            self.data[unit] *= scale.get(kind, 1.0) if kind != "zero" else 0.0
        self.draws, self.engine = draws, PerUnitGradients(self.model)

    def losses(self, indices: torch.Tensor) -> torch.Tensor:
        x = self.data[indices].flatten(0, 1)
        # The product makes gradients as large as the data, past what tanh would let through.
        losses = (self.model(x) * x[:, :2]).square().mean(1)
        return losses.view(len(indices), self.draws).mean(1)

    def total(self, accelerator, indices, bound: float, micro: int) -> torch.Tensor:
        plan = plan_of(bound, self.draws)
        indices = torch.as_tensor(indices)
        return clipped_gradient_sum(accelerator, self.engine, self.losses, indices, plan, micro)


@settings(max_examples=80, deadline=None)
@given(
    kinds=st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=7),
    draws=st.integers(1, 4),
    micro=st.integers(1, 8),
    bound=st.sampled_from([1e-3, 0.15, 1.0, 50.0]),
    seed=st.integers(0, 100),
)
def test_one_unit_moves_the_sum_by_at_most_C(accelerator, kinds, draws, micro, bound, seed):
    world = LinearWorld(kinds, draws, seed)
    everyone = list(range(len(kinds)))
    whole = world.total(accelerator, everyone, bound, micro)
    assert whole.isfinite().all()
    for unit in everyone:
        without = world.total(accelerator, [u for u in everyone if u != unit], bound, micro)
        assert (whole - without).norm() <= bound * (1 + 1e-5) * (1 + 1e-6 * len(kinds))


def largest_move(accelerator, world, bound) -> float:
    everyone = list(range(len(world.data)))
    whole = world.total(accelerator, everyone, bound, 4)
    rest = [[u for u in everyone if u != unit] for unit in everyone]
    return max((whole - world.total(accelerator, r, bound, 4)).norm().item() for r in rest)


def _not_clipped(rows, plan):
    return rows.sum(0)


def _clipped_at_k_times_c(rows, plan):
    norms = rows.norm(dim=1)
    return (plan.max_grad_norm * plan.noise_multiplicity / norms).clamp(max=1) @ rows


def _nan_spreads(rows, plan):
    return (plan.max_grad_norm / rows.norm(dim=1)).clamp(max=1) @ rows


@pytest.mark.parametrize("mutant", [_not_clipped, _clipped_at_k_times_c, _nan_spreads])
def test_the_replay_catches_broken_clipping(accelerator, monkeypatch, mutant):
    kinds = ["huge", "huge", "nan" if mutant is _nan_spreads else "ordinary"]
    world = LinearWorld(kinds, draws=4, seed=0)
    assert largest_move(accelerator, world, 0.15) <= 0.15 * (1 + 1e-5)
    monkeypatch.setattr(utils.training, "clipped_sum", mutant)
    assert not largest_move(accelerator, world, 0.15) <= 0.15 * (1 + 1e-5)


def test_a_bad_unit_leaves_the_others_unchanged(accelerator):
    """The sum with a NaN, an inf and an overflowing unit is exactly the sum without them."""
    world = LinearWorld(
        ["ordinary", "nan", "ordinary", "inf", "overflowing", "ordinary"], 2, seed=1
    )
    clean = world.total(accelerator, [0, 2, 5], 1.0, 8)
    torch.testing.assert_close(
        world.total(accelerator, range(6), 1.0, 8), clean, rtol=1e-5, atol=1e-7
    )
    assert clean.norm() > 0


HUGE_UNIT = 6


@pytest.fixture(scope="module")
def unet_world():
    """The real loss on a tiny U-Net with LoRA; each unit owns its latents, noise and timesteps."""
    pipeline = build_tiny_pipeline()
    unet, draws, units = pipeline.unet.requires_grad_(False), 3, 7
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "conv1"]
    unet.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(units, draws, 4, 8, 8, generator=generator)
    latents[HUGE_UNIT] *= 1e4
    noise = torch.randn(units, draws, 4, 8, 8, generator=generator)
    embeddings = torch.randn(units, draws, 8, 16, generator=generator)
    timesteps = torch.randint(1000, (units, draws), generator=generator)
    tensors = [latents, embeddings, noise, timesteps]

    def losses(indices):
        parts = [tensor[indices].flatten(0, 1) for tensor in tensors]
        values = denoising_loss(unet, pipeline.scheduler, *parts)
        return values.view(len(indices), draws).mean(1)

    return PerUnitGradients(unet), losses, plan_of(0.05, draws, units)


def test_one_unit_moves_the_sum_of_a_unet_by_at_most_C(accelerator, unet_world):
    engine, losses, plan = unet_world
    everyone = torch.arange(7)
    whole = clipped_gradient_sum(accelerator, engine, losses, everyone, plan, 7)
    for unit in range(7):
        rest = everyone[everyone != unit]
        without = clipped_gradient_sum(accelerator, engine, losses, rest, plan, 7)
        assert (whole - without).norm() <= plan.sensitivity * (1 + 1e-5)


@pytest.mark.parametrize("micro", [1, 2, 3, 100])
def test_the_micro_batch_changes_nothing(accelerator, micro):
    world = LinearWorld(["ordinary", "huge", "zero", "nan", "ordinary", "huge", "ordinary"], 3, 5)
    at_once = world.total(accelerator, range(7), 0.15, 7)
    in_parts = world.total(accelerator, range(7), 0.15, micro)
    torch.testing.assert_close(in_parts, at_once, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("micro", [1, 2, 3, 100])
def test_the_micro_batch_changes_nothing_but_rounding_in_a_unet(accelerator, unet_world, micro):
    engine, losses, plan = unet_world
    ordinary = torch.arange(HUGE_UNIT)  # the huge unit's own gradient is mostly rounding
    at_once = clipped_gradient_sum(accelerator, engine, losses, ordinary, plan, 7)
    in_parts = clipped_gradient_sum(accelerator, engine, losses, ordinary, plan, micro)
    assert (in_parts - at_once).norm() < 2e-3 * at_once.norm()
