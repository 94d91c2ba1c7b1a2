"""Per-unit gradients of a whole U-Net, against autograd one unit at a time, and Opacus."""

import pytest
import torch
from opacus import GradSampleModule
from peft import LoraConfig
from torch import nn

from tests.conftest import build_tiny_pipeline
from tests.gradients.test_leaves import (
    consistent_rows,
    engine_rows,
)
from tests.worlds import unet_losses
from utils.gradients.fast_linear import use_fast_linear
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.pipelines import load_pipeline


def build_unet_and_engine(
    trainable: str, checkpointing: bool = False, channels=(8, 16), pipeline=None
):
    pipeline = pipeline or build_tiny_pipeline(channels=channels)
    unet = pipeline.unet.requires_grad_(trainable == "all")
    if checkpointing:
        unet.enable_gradient_checkpointing()
    if trainable == "attention":
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_("attentions" in name)
    if not trainable.startswith("lora"):
        return unet, pipeline.scheduler
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out"]
    targets += ["conv1", "conv2", "conv_shortcut", "conv"] if trainable == "lora_conv" else []
    torch.manual_seed(4)
    unet.add_adapter(LoraConfig(r=3, init_lora_weights=False, target_modules=targets))
    return unet, pipeline.scheduler


def unet_inputs(rows: int, seed: int = 5):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(rows, 4, 8, 8, generator=generator)
    noise = torch.randn(rows, 4, 8, 8, generator=generator)
    embeddings = torch.randn(rows, 8, 16, generator=generator)
    timesteps = torch.randint(1000, (rows,), generator=generator)
    return latents, embeddings, noise, timesteps


def unet_engine_rows(unet, scheduler, units, draws, autocast=False, seed=5):
    engine = PerUnitGradients(unet, draws)
    inputs = unet_inputs(units * draws, seed)
    with engine.recording(units) as record:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = unet_losses(unet, scheduler, *inputs)
        losses.view(units, draws).mean(1).sum().backward()
    return consistent_rows(record)


def unet_reference_rows(unet, scheduler, units, draws, seed=5):
    parameters = [p for p in unet.parameters() if p.requires_grad]
    inputs = unet_inputs(units * draws, seed)
    rows = []
    for unit in range(units):
        part = [tensor[unit * draws : (unit + 1) * draws] for tensor in inputs]
        loss = unet_losses(unet, scheduler, *part).mean()
        grads = torch.autograd.grad(loss, parameters)
        rows.append(torch.cat([g.flatten() for g in grads]))
    return torch.stack(rows)


TRAINABLE = ["lora", "lora_conv", "attention", "all"]


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("draws", [1, 3])
def test_a_unet_equals_one_unit_autograd(trainable, draws):
    unet, scheduler = build_unet_and_engine(trainable)
    torch.testing.assert_close(
        unet_engine_rows(unet, scheduler, 3, draws),
        unet_reference_rows(unet, scheduler, 3, draws),
        rtol=1e-3,
        atol=1e-5,
    )


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory):
    """Wide enough for the products of its frozen layers to go through oneDNN."""
    folder = tmp_path_factory.mktemp("wide")
    build_tiny_pipeline(channels=(16, 32)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("trainable", TRAINABLE)
@pytest.mark.parametrize("autocast", [False, True])
def test_what_is_loaded_and_checkpointed_is_as_exact(wide_base, trainable, autocast):
    """As the scripts run it: frozen layers through oneDNN, channels last, recomputed."""
    exact = unet_reference_rows(*build_unet_and_engine(trainable, channels=(16, 32)), 3, 2)
    loaded = build_unet_and_engine(trainable, True, pipeline=load_pipeline(str(wide_base)))
    weight = loaded[0].conv_in.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and "forward" in vars(
        loaded[0].time_embedding.linear_1
    )
    ours = unet_engine_rows(*loaded, 3, 2, autocast=autocast)
    if not autocast:
        return torch.testing.assert_close(ours, exact, rtol=1e-3, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        ordinary = unet_reference_rows(*build_unet_and_engine(trainable, channels=(16, 32)), 3, 2)
    assert (ours - exact).norm() < 1.25 * (ordinary - exact).norm()


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_gradient_checkpointing_changes_nothing(trainable):
    plain = unet_engine_rows(*build_unet_and_engine(trainable), 2, 2)
    checkpointed = unet_engine_rows(*build_unet_and_engine(trainable, checkpointing=True), 2, 2)
    torch.testing.assert_close(checkpointed, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("trainable", ["lora_conv", "all"])
def test_bf16_autocast_rounds_no_worse_than_autograd_and_rows_are_fp32(trainable):
    """On the average: a single input's rounding may differ by a third either way."""
    unet, scheduler = build_unet_and_engine(trainable)
    errors = []
    for seed in range(8):
        exact = unet_reference_rows(unet, scheduler, 2, 2, seed)
        ours = unet_engine_rows(unet, scheduler, 2, 2, autocast=True, seed=seed)
        with torch.autocast("cpu", torch.bfloat16):
            ordinary = unet_reference_rows(unet, scheduler, 2, 2, seed)
        assert ours.dtype == torch.float32
        errors.append(torch.stack([(ours - exact).norm(), (ordinary - exact).norm()]))
    ours, ordinary = torch.stack(errors).mean(0)
    assert ours < 1.25 * ordinary


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_a_unet_equals_opacus(trainable):
    """The second oracle. Opacus has no notion of K draws, so one draw a unit."""
    unet, scheduler = build_unet_and_engine(trainable)
    ours = unet_engine_rows(unet, scheduler, 3, 1)
    wrapped = GradSampleModule(unet, loss_reduction="sum", strict=False)
    unet_losses(wrapped, scheduler, *unet_inputs(3)).sum().backward()
    samples = [p.grad_sample.flatten(1) for p in unet.parameters() if p.requires_grad]
    torch.testing.assert_close(ours, torch.cat(samples, 1), rtol=1e-3, atol=1e-5)


def test_memory_is_what_the_recording_says_and_factors_keep_it_small():
    model = nn.Sequential(nn.Linear(200, 200, bias=False), nn.Linear(200, 200, bias=False))
    engine = PerUnitGradients(model, num_draws=2)
    with engine.recording(4) as record:
        model(torch.randn(8, 3, 200)).square().sum().backward()
    factors = 2 * (8 * 3 * 200 * 2) * 4  # two layers; input and output gradient; fp32
    assert record.nbytes() == factors < 4 * 2 * 200 * 200 * 4
    record.squared_norms()  # their factors are views of what is held already
    assert record.nbytes() == factors


def test_memory_counts_the_spread_input_of_a_convolution_while_it_is_held():
    model = nn.Conv2d(8, 64, 3, padding=1, bias=False)
    with PerUnitGradients(model).recording(2) as record:
        model(torch.randn(2, 8, 4, 4)).square().sum().backward()
    before = record.nbytes()
    record.squared_norms()
    assert record.nbytes() == before + 4 * 2 * 4 * 4 * 8 * 9
    record.drop(torch.tensor([True, False]))
    assert record.nbytes() == before


def test_the_model_is_as_before_after_recording():
    model = nn.Sequential(nn.Linear(3, 2))
    engine_rows(model, torch.randn(2, 3), 2)
    assert "forward" not in vars(model[0])
    use_fast_linear(model)
    before = model[0].forward
    engine_rows(model, torch.randn(2, 3), 2)
    assert model[0].forward is before
    assert model[0].weight.grad is None
