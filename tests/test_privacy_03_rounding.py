"""Clause 3, where rounding could break it: what fp32 loses never counts for more than C."""

import pytest
import torch
from torch import nn

from tests.gradients.test_products import alternating
from tests.worlds import build_plan
from utils.arguments.training import CLIPPING_MODES
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.privacy.training import clipped_gradient_sum


def test_an_estimate_in_fp32_does_not_let_a_unit_count_for_more_than_C(accelerator):
    """Positions that all but cancel: an fp32 Gram matrix gives 0.71 of the true norm."""
    x, grads = alternating()
    layer = nn.Linear(1280, 1280, bias=False)
    engine = PerUnitGradients(nn.Sequential(layer))
    losses = lambda units: (layer(x) * grads).sum((1, 2))  # noqa: E731
    plan = build_plan(max_grad_norm=0.7)
    total = clipped_gradient_sum(accelerator, engine, losses, torch.tensor([0]), plan, 1)
    assert 0.99 * 0.7 < total.norm() <= 0.7 * (1 + 1e-5)


def cancelling(layer: nn.Linear, positions: int, loud: int, share: float):
    """The losses of 32 units, of which one has two positions ten million times as large as the
    others, which cancel: its gradient is all but zero."""
    inputs, outputs = layer.in_features**-0.5, layer.out_features**-0.5
    x = torch.full((32, positions, layer.in_features), inputs)
    grads = torch.full((32, positions, layer.out_features), share / positions * outputs)
    x[loud], grads[loud] = 0.0, 0.0
    x[loud, 0], x[loud, -1] = 1e7 * inputs, -1e7 * inputs
    grads[loud, [0, 1, -1]] = outputs
    return lambda units: (layer(x[units]) * grads[units]).sum((1, 2))


@pytest.mark.parametrize(
    "clipping, positions, loud, share", [("automatic", 39, 9, 1.0), ("flat", 26, 14, 0.1)]
)
def test_positions_that_cancel_do_not_swallow_other_units(
    accelerator, clipping, positions, loud, share
):
    """Were the sum over all positions one in fp32, what is added between the two would be lost."""
    layer = nn.Linear(320, 320, bias=False)
    engine = PerUnitGradients(nn.Sequential(layer))
    losses, plan = (
        cancelling(layer, positions, loud, share),
        build_plan(max_grad_norm=1.0, clipping=clipping),
    )
    everyone = torch.arange(32)
    whole, rest = (
        clipped_gradient_sum(accelerator, engine, losses, units, plan, 32)
        for units in (everyone, everyone[everyone != loud])
    )
    assert (whole - rest).norm() <= 1 + 1e-5


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
@pytest.mark.parametrize("clipping", CLIPPING_MODES)
def test_the_bound_holds_at_every_scale(accelerator, scale, clipping):
    layer = nn.Linear(40, 40)  # few positions: its gradients stay in factors
    engine = PerUnitGradients(nn.Sequential(layer))
    x = torch.randn(3, 2, 40, generator=torch.Generator().manual_seed(0))
    for inputs, weight in ((scale * x, 1 / scale), (x / scale, scale), (scale * x, 1.0)):
        losses = lambda units: (weight * layer(inputs[units])).sum((1, 2))  # noqa: E731, B023
        plan = build_plan(max_grad_norm=0.1, clipping=clipping)
        total = clipped_gradient_sum(accelerator, engine, losses, torch.tensor([1]), plan, 1)
        assert total.norm() <= 0.1 * (1 + 1e-5)
