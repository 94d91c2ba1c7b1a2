"""Clause 3, where rounding could break it: what fp32 loses never counts for more than C."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.conftest import build_tiny_pipeline
from tests.gradients.test_products import alternating
from tests.worlds import build_plan
from utils.arguments.methods import LdmArguments, LoDAArguments, LoraArguments
from utils.arguments.training import CLIPPING_MODES
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods.public_passes import leave_out_unused
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.loda.adapter import add_loda
from utils.models.lora import add_lora
from utils.models.own_weights import unfreeze
from utils.models.pipelines import prepare_pipeline
from utils.models.processes import read_process
from utils.models.text import embed_captions
from utils.privacy.precision import highest_precision
from utils.privacy.training import clipped_gradient_sum

TIMES = ["time_emb_proj", "to_q", "conv1"]  # of which some see a row for each image only


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


def on_the_edge(size: int) -> torch.Tensor:
    """Gradients [size, 2] that count for one each, under automatic clipping. The first half lift
    the first column to just below a power of two; of the others each takes less than half of an
    fp32's last place away, and the last one steps above the power again."""
    rows, half = torch.zeros(size, 2), size // 2
    rows[: half - 1, 0] = 1e6
    rows[half - 1, 0], rows[half - 1, 1] = 0.5, 0.75**0.5
    rows[half:, 0], rows[half:, 1] = -0.9 * half * 2.0**-24, 1.0
    rows[half::2, 1] = -1.0
    rows[-1, 0], rows[-1, 1] = 1e6, 0.0
    return rows


@pytest.mark.parametrize("micro_batch", [128, 1024])
def test_one_more_unit_in_front_rounds_no_other_one_anew(accelerator, micro_batch):
    """It moves every other unit by one place, and what is added up before each of them."""
    layer = nn.Linear(1, 2)
    layer.weight.requires_grad_(False)  # of a bias there are rows, no factors
    engine = PerUnitGradients(nn.Sequential(layer))
    rows = on_the_edge(micro_batch).repeat(2**14 // micro_batch, 1)
    first = torch.tensor([[1e6, 0.0]])
    rows, plan = torch.cat([first, rows]), build_plan(max_grad_norm=1.0, clipping="automatic")
    losses = lambda units: (layer(torch.ones(len(units), 1)) * rows[units]).sum(1)  # noqa: E731
    everyone = torch.arange(len(rows))
    whole, rest = (
        clipped_gradient_sum(accelerator, engine, losses, units, plan, micro_batch)
        for units in (everyone, everyone[1:])
    )
    assert (whole - rest).norm() <= 1 + 1e-5


@pytest.mark.parametrize(
    "positions, widths",
    [(3, (1281, 10)), (3, (33, 5, 33)), (3, (64, 6, 64)), (3, (36, 7, 20))]
    + [(13, (33, 1)), (64, (5, 3)), (16, (1, 33))],
)
def test_one_more_unit_in_front_changes_no_other_gradient(accelerator, positions, widths):
    """A processor may add up a row by where it lies in memory, which is one place further on."""
    torch.manual_seed(0)
    layers = [nn.Linear(before, after) for before, after in pairwise(widths)]
    engine = PerUnitGradients(model := nn.Sequential(*layers))
    x, y = (torch.randn(65, positions, width) for width in (widths[0], widths[-1]))
    losses = lambda units: (model(x[units]) * y[units]).square().sum((1, 2))  # noqa: E731
    plan, everyone = build_plan(max_grad_norm=1.0, clipping="automatic"), torch.arange(65)
    whole, rest, alone = (
        clipped_gradient_sum(accelerator, engine, losses, units, plan, 64)
        for units in (everyone, everyone[1:], everyone[:1])
    )
    assert (whole - rest - alone).norm() < 1e-10


@pytest.mark.parametrize("side, precision", [(10, "fp32"), (46, "fp32"), (32, "bf16")])
@pytest.mark.parametrize(
    "channels, adapt",
    [
        ((8, 16), lambda p: unfreeze(p, LdmArguments(trainable="all"))),
        ((32, 64), lambda p: add_loda(p, LoDAArguments(rank=2))),
        ((32, 64), lambda p: add_lora(p, LoraArguments(rank=6, target_modules=TIMES))),
    ],
)
def test_one_more_unit_in_front_changes_no_other_gradient_of_a_model(
    threads, channels, adapt, side, precision
):
    """Of odd sides and ranks, or so large that a norm is shared out (from 1,024 pixels on, and its
    backward pass from 2,048), by threads whose shares end anywhere."""
    pipeline = prepare_pipeline(build_tiny_pipeline(channels=channels), "a tiny model")
    adapt(pipeline)
    leave_out_unused(pipeline, 2 * side, silently=True)
    family, process = find_family(pipeline), read_process(pipeline.scheduler)
    for parameter in family.denoiser.parameters():
        if parameter.requires_grad:
            parameter.data += 0.02 * torch.randn_like(parameter)
    engine, (latents, noise) = PerUnitGradients(family.denoiser), torch.randn(2, 6, 4, side, side)
    text = {n: t.float() for n, t in embed_captions(pipeline, ["3"] * 6, 2 * side).items()}
    for size in (2, 3, 5):
        found = []
        for start in (0, 1):
            part = slice(start, start + size)
            words = {name: values[part] for name, values in text.items()}
            inputs = (latents[part], words, noise[part], torch.linspace(0, 1, 7)[part])
            with highest_precision(), engine.recording(size) as record:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    losses = denoising_loss(family.predictor, process, *inputs)
                losses.sum().backward()
            found.append(record.digest_units())
        assert found[0][1:] == found[1][:-1]


def test_one_more_unit_in_front_changes_no_other_latent(threads):
    """Of images that an autoencoder's norms are shared out for."""
    family = find_family(prepare_pipeline(build_tiny_pipeline(channels=(32, 64)), "a tiny model"))
    images = torch.rand(6, 3, 40, 40) * 2 - 1
    for size in (2, 3, 5):
        with highest_precision(), torch.no_grad():
            found = [family.encode_images(images[s : s + size]) for s in (0, 1)]
        assert torch.equal(found[0][1:], found[1][:-1])


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
