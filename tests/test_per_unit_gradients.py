"""Row u of the buffer is the gradient of unit u: against batch-size-1 autograd, and Opacus."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus import GradSampleModule
from peft import LoraConfig
from torch import nn

from tests.conftest import build_tiny_pipeline
from utils.errors import UsageError
from utils.per_unit_gradients import PerUnitGradients
from utils.pipelines import denoising_loss


def reference_rows(model, x, units):
    """Gradients of the mean loss of each unit's rows, one ordinary backward pass a unit."""
    rows = []
    parameters = [p for p in model.parameters() if p.requires_grad]
    for part in x.chunk(units):
        loss = model(part).square().flatten(1).mean(1).mean()
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


def engine_rows(model, x, units):
    engine = PerUnitGradients(model)
    with engine.recording(units) as rows:
        losses = model(x).square().flatten(1).mean(1)
        losses.view(units, -1).mean(1).sum().backward()
    return rows.clone()


@settings(max_examples=60, deadline=None)
@given(
    units=st.integers(1, 4),
    draws=st.integers(1, 3),
    positions=st.integers(0, 5),
    bias=st.booleans(),
    frozen_input=st.booleans(),
)
def test_linear_rows_equal_one_unit_autograd(units, draws, positions, bias, frozen_input):
    torch.manual_seed(1)
    first = nn.Linear(5, 4, bias=bias).requires_grad_(not frozen_input)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3, bias=bias))
    shape = (units * draws, positions, 5) if positions else (units * draws, 5)
    x = torch.randn(shape)
    torch.testing.assert_close(
        engine_rows(model, x, units), reference_rows(model, x, units), rtol=1e-4, atol=1e-6
    )


@settings(max_examples=120, deadline=None)
@given(
    units=st.integers(1, 3),
    draws=st.integers(1, 3),
    channels=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 4), st.integers(0, 4)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    bias=st.booleans(),
)
def test_conv2d_rows_equal_one_unit_autograd(
    units, draws, channels, kernel, stride, padding, dilation, bias
):
    torch.manual_seed(2)
    conv = nn.Conv2d(*channels, kernel, stride, padding, dilation, bias=bias)
    model = nn.Sequential(nn.Conv2d(2, channels[0], 1), nn.Tanh(), conv)
    x = torch.randn(units * draws, 2, 9, 8)
    torch.testing.assert_close(
        engine_rows(model, x, units), reference_rows(model, x, units), rtol=1e-4, atol=1e-6
    )


def test_a_reused_layer_adds_up_both_uses():
    torch.manual_seed(3)
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(6, 4)
    torch.testing.assert_close(engine_rows(model, x, 3), reference_rows(model, x, 3))


def lora_unet(conv: bool, checkpointing: bool = False):
    pipeline = build_tiny_pipeline()
    unet = pipeline.unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
    targets += ["conv1", "conv2", "conv_shortcut", "conv"] if conv else []
    torch.manual_seed(4)
    unet.add_adapter(LoraConfig(r=3, init_lora_weights=False, target_modules=targets))
    if checkpointing:
        unet.enable_gradient_checkpointing()
    return unet, pipeline.scheduler


def unet_inputs(rows: int):
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    noise = torch.randn(rows, 4, 8, 8, generator=generator)
    embeddings = torch.randn(rows, 8, 16, generator=generator)
    timesteps = torch.randint(1000, (rows,), generator=generator)
    return latents, embeddings, noise, timesteps


def unet_engine_rows(unet, scheduler, units, draws, autocast=False):
    engine = PerUnitGradients(unet)
    inputs = unet_inputs(units * draws)
    with engine.recording(units) as rows:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = denoising_loss(unet, scheduler, *inputs)
        losses.view(units, draws).mean(1).sum().backward()
    return rows.clone()


def unet_reference_rows(unet, scheduler, units, draws):
    parameters = [p for p in unet.parameters() if p.requires_grad]
    inputs = unet_inputs(units * draws)
    rows = []
    for unit in range(units):
        part = [tensor[unit * draws : (unit + 1) * draws] for tensor in inputs]
        loss = denoising_loss(unet, scheduler, *part).mean()
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("draws", [1, 3])
def test_lora_on_a_unet_equals_one_unit_autograd(conv, draws):
    unet, scheduler = lora_unet(conv)
    torch.testing.assert_close(
        unet_engine_rows(unet, scheduler, 3, draws),
        unet_reference_rows(unet, scheduler, 3, draws),
        rtol=1e-3,
        atol=1e-6,
    )


def test_gradient_checkpointing_changes_nothing():
    plain = unet_engine_rows(*lora_unet(conv=True), 2, 2)
    checkpointed = unet_engine_rows(*lora_unet(conv=True, checkpointing=True), 2, 2)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-7)


def test_bf16_autocast_rounds_no_worse_than_autograd_and_the_buffer_is_fp32():
    unet, scheduler = lora_unet(conv=True)
    exact = unet_reference_rows(unet, scheduler, 2, 2)
    ours = unet_engine_rows(unet, scheduler, 2, 2, autocast=True)
    with torch.autocast("cpu", torch.bfloat16):
        ordinary = unet_reference_rows(unet, scheduler, 2, 2)
    assert ours.dtype == torch.float32
    assert (ours - exact).norm() < 1.25 * (ordinary - exact).norm()


def test_lora_on_a_unet_equals_opacus():
    """The second oracle. Opacus has no notion of K draws, so one draw a unit."""
    unet, scheduler = lora_unet(conv=True)
    ours = unet_engine_rows(unet, scheduler, 3, 1)
    wrapped = GradSampleModule(unet, loss_reduction="sum", strict=False)
    denoising_loss(wrapped, scheduler, *unet_inputs(3)).sum().backward()
    samples = [p.grad_sample.flatten(1) for p in unet.parameters() if p.requires_grad]
    torch.testing.assert_close(ours, torch.cat(samples, 1), rtol=1e-3, atol=1e-6)


def test_the_model_is_as_before_after_recording():
    model = nn.Sequential(nn.Linear(3, 2))
    engine_rows(model, torch.randn(2, 3), 2)
    assert "forward" not in vars(model[0])
    assert model[0].weight.grad is None


@pytest.mark.parametrize(
    "model, word",
    [
        (nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), "BatchNorm"),
        (nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)), "LayerNorm"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), "grouped"),
        (nn.Linear(2, 2).requires_grad_(False), "no parameter"),
        (nn.Linear(2, 2).half(), "fp32"),
    ],
)
def test_uncovered_parameters_are_refused(model, word):
    with pytest.raises(UsageError, match=word):
        PerUnitGradients(model)


def test_a_layer_that_recorded_nothing_is_an_error():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    engine = PerUnitGradients(model)
    with pytest.raises(RuntimeError, match="no gradient reached"):
        with engine.recording(1):
            model[0](torch.ones(1, 2)).sum().backward()
