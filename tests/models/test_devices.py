"""Is every tensor made on the right device? Without a GPU, on a pretended one: with fake tensors
PyTorch follows shapes, types and devices, and refuses what would mix two devices."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from tests.conftest import build_tiny_pipeline
from tests.families import FAMILIES, SIDE, build_family
from tests.worlds import build_plan
from utils.arguments.methods import LdmArguments, LoDAArguments, LoraArguments
from utils.arguments.training import TrainingArguments
from utils.data import latents
from utils.data.latents import EncodedUnits, Objective, PrivateLosses, group_rows_by_unit
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.methods import warm_start
from utils.methods.public_passes import compute_public_losses
from utils.methods.trial import adapt
from utils.models import processes
from utils.models.pipelines import (
    collect_trained_modules,
    freeze,
    list_parts,
    prepare_pipeline,
)
from utils.models.text import embed_captions
from utils.privacy.dp_sgd import clip_scales
from utils.privacy.optimizers import build_optimizer
from utils.privacy.randomness import SecretRandomness

GPU = "meta"  # no CPU, which is what matters; "cuda" needs a build of PyTorch that knows it
CAPTIONS = [f"the digit {i}" for i in range(6)]
METHODS = {
    "lora": LoraArguments(rank=2),
    "lora, convolutions": LoraArguments(rank=2, target_modules=["conv1", "to_q"]),
    "frozen A": LoraArguments(rank=2, freeze_lora_a=True),
    "loda": LoDAArguments(rank=2),
    "attention": LdmArguments(),
    "all": LdmArguments(trainable="all"),
}


def build_adapted(settings):
    """The tiny pipeline, adapted, on the CPU."""
    pipeline = build_tiny_pipeline()
    for part in list_parts(pipeline):
        freeze(part)
    adapt(pipeline, settings)
    return pipeline


def move_to_gpu(pipeline):
    """All its weights and buffers on a pretended GPU; without values."""
    for part in list_parts(pipeline):
        for module in part.modules():
            for name, p in module._parameters.items():
                if p is not None:
                    fake = torch.empty(p.shape, dtype=p.dtype, device=GPU)
                    module._parameters[name] = nn.Parameter(fake, p.requires_grad)
            for name, buffer in module._buffers.items():
                fake = torch.empty(buffer.shape, dtype=buffer.dtype, device=GPU)
                module._buffers[name] = fake
    return pipeline


def encode_on_cpu(pipeline, cached: bool) -> EncodedUnits:
    """As `encode_units` leaves them: on the CPU, whatever the device of the model."""
    text = embed_captions(pipeline, CAPTIONS, 16) if cached else None
    order = group_rows_by_unit(torch.arange(6))
    rows = torch.zeros(6, 2, 4, 8, 8)
    return EncodedUnits(16, rows, CAPTIONS, text, torch.arange(6, dtype=torch.int32), *order)


def take_a_step(pipeline, units: EncodedUnits) -> torch.Tensor:
    """What one private step computes on its device; what looks at values is left out."""
    randomness, plan = SecretRandomness(0), build_plan(num_units=6, noise_multiplicity=2)
    engine = PerUnitGradients(collect_trained_modules(pipeline), plan.noise_multiplicity)
    objective = Objective(plan.noise_multiplicity, snr_gamma=5.0)
    losses = PrivateLosses(pipeline, units, objective, randomness)
    with engine.recording(3) as record:
        each = losses(torch.tensor([0, 2, 4]))
        each.sum().backward()
    record.drop(torch.zeros(3, dtype=torch.bool, device=each.device))
    total = record.weighted_sum(clip_scales(record.squared_norms(), plan))
    noise = randomness.noise(total.shape).to(total.device)
    engine.assign((total + noise).float() / plan.expected_batch_size)
    build_optimizer(TrainingArguments(output_dir="x", learning_rate=0.1), engine.parameters, plan)
    return total


def step_on_gpu(settings, cached: bool = True) -> torch.Tensor:
    pipeline = build_adapted(settings)
    units = encode_on_cpu(pipeline, cached)
    processes._build.cache_clear()  # of the betas: real ones must not come in, nor pretended out
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            return take_a_step(move_to_gpu(pipeline), units)
    finally:
        processes._build.cache_clear()


@pytest.mark.parametrize("cached", [True, False], ids=["text cached", "text encoded when drawn"])
@pytest.mark.parametrize("method", METHODS)
def test_a_private_step_stays_on_its_device(monkeypatch, method, cached):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # not for this device
    # Which rows were drawn cannot be read from a pretended tensor.
    monkeypatch.setattr(EncodedUnits, "read_captions", lambda _, rows: CAPTIONS[:1] * len(rows))
    total = step_on_gpu(METHODS[method], cached)
    assert total.device.type == GPU and total.dtype == torch.float64


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_any_family_stays_on_its_device(monkeypatch, family):
    """What its encoders make of a caption, and its loss. Z-Image looks at values: not followed."""
    if family == "z_image":
        pytest.skip("it cuts captions at the end of their tokens")
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    pipeline = prepare_pipeline(build_family(family), family)
    processes._build.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            losses = compute_public_losses(move_to_gpu(pipeline), SIDE, [""])
    finally:
        processes._build.cache_clear()
    assert losses.device.type == GPU


@pytest.mark.parametrize("trains_text", [False, True])
def test_a_warm_start_stays_on_its_device(monkeypatch, trains_text):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    monkeypatch.setattr(warm_start, "_read_set", lambda *_: (torch.zeros(6, 4, 8, 8), CAPTIONS))
    pipeline = build_adapted(LdmArguments(train_text_encoder=trains_text))
    rows, noise, quantiles = torch.arange(3), torch.zeros(3, 4, 8, 8), torch.rand(3)
    accelerator = SimpleNamespace(device=torch.device(GPU), autocast=nullcontext)
    stage = SimpleNamespace(pipeline=pipeline, resolution=16, accelerator=accelerator)
    training = TrainingArguments(output_dir="run")
    processes._build.cache_clear()
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            move_to_gpu(pipeline)
            losses = warm_start.Examples(stage, ["set"], training).losses(rows, noise, quantiles)
            losses.sum().backward()
    finally:
        processes._build.cache_clear()
    trained = [p for p in collect_trained_modules(pipeline).parameters() if p.requires_grad]
    assert losses.device.type == GPU and any(p.grad is not None for p in trained)


def test_the_test_finds_a_tensor_on_the_wrong_device(monkeypatch):
    """The latents left where they were read."""
    whole = latents.denoising_loss

    def elsewhere(predict, process, x, *rest):
        return whole(predict, process, x.cpu(), *rest)

    monkeypatch.setattr(latents, "denoising_loss", elsewhere)
    with pytest.raises(RuntimeError, match="device"):
        step_on_gpu(METHODS["lora"])
