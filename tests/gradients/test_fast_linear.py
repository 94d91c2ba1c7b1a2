"""Frozen linear layers through oneDNN give what PyTorch's own give."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from utils.gradients import fast_linear
from utils.gradients.fast_linear import ONEDNN, linear, use_fast_linear

DEVICE = "cpu"


def inputs(kind: str) -> torch.Tensor:
    torch.manual_seed(0)
    return {
        "matrix": lambda: torch.randn(7, 32),
        "vector": lambda: torch.randn(32),
        "images": lambda: torch.randn(2, 32, 3, 4).permute(0, 2, 3, 1),
        "channels_last": lambda: torch.randn(2, 3, 4, 32).movedim(-1, 1).movedim(1, -1),
        "every_other": lambda: torch.randn(2, 5, 64)[..., ::2],
        "repeated": lambda: torch.randn(3, 1, 32).expand(3, 5, 32),
        "empty": lambda: torch.randn(0, 5, 32),
        "bf16": lambda: torch.randn(7, 32, dtype=torch.bfloat16),
    }[kind]()


KINDS = ["matrix", "vector", "images", "channels_last", "every_other", "repeated", "empty", "bf16"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("out", [3, 16, 48])
def test_products_are_those_of_pytorch(kind, bias, turned, out):
    x = inputs(kind)
    weight = torch.randn(32, out).t() if turned else torch.randn(out, 32)
    weight = weight.to(x.dtype)
    b = torch.randn(out).to(x.dtype) if bias else None
    torch.testing.assert_close(linear(x, weight, b), F.linear(x, weight, b))


@pytest.mark.parametrize("trained", ["", "weight", "bias"])
@pytest.mark.parametrize("autocast", [True, False])
def test_layers_and_gradients_are_those_of_pytorch(trained, autocast):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.SiLU(), nn.Linear(48, 20)).requires_grad_(False)
    parameter = getattr(model[2], trained or "weight").requires_grad_(bool(trained))
    found = []
    for fast in (False, True):
        if fast:
            use_fast_linear(model)
        x = torch.randn(5, 32, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=autocast):
            y = model(x)
        y.square().sum().backward()
        found.append([y.detach(), x.grad, parameter.grad])
        model.zero_grad()
    torch.testing.assert_close(*found)
    assert (found[1][2] is not None) == bool(trained)


@pytest.mark.skipif(not ONEDNN, reason="PyTorch was built without oneDNN")
@pytest.mark.parametrize(
    "kind, out, through", [("matrix", 16, True), ("matrix", 3, True), ("bf16", 16, False)]
)
def test_fp32_goes_through_onednn(kind, out, through):
    x = inputs(kind)
    weight = torch.randn(out, 32, dtype=x.dtype)
    with torch.profiler.profile() as profile:
        linear(x, weight)
    names = {event.name for event in profile.events()}
    assert ("mkldnn::_linear_pointwise" in names) == through


@pytest.mark.parametrize("rows", [5, 65])
def test_a_row_is_the_same_wherever_it_lies(threads, rows):
    check_rows(rows)


@pytest.mark.parametrize("threads", [1], indirect=True)
@pytest.mark.parametrize("rows", [5, 65])
def test_a_row_is_the_same_on_one_thread_without_onednn(monkeypatch, threads, rows):
    monkeypatch.setattr(fast_linear, "ONEDNN", False)
    check_rows(rows)


def check_rows(rows: int) -> None:
    """The products of each of `rows`, one place further on."""
    torch.manual_seed(0)
    for width, out in [(1281, 10), (130, 4), (77, 2), (9, 3), (64, 6), (20, 11)]:
        x = torch.randn(rows, width)
        for weight in (torch.randn(width, out).t(), torch.randn(out, width)):
            first, later = linear(x[:-1].clone(), weight), linear(x[1:].clone(), weight)
            assert torch.equal(first[1:], later[:-1]), (width, out, weight.stride())
