"""Activations on a CPU: each number by its value alone."""

import pytest
import torch
import torch.nn.functional as F

from utils.gradients.elementwise import use_alike_activations


def gradient(function):
    def compute(x: torch.Tensor) -> torch.Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]

    return compute


FUNCTIONS = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "steep softplus": lambda x: F.softplus(x, 3.0, 10.0),
    "rsqrt": lambda x: torch.rsqrt(x.square() + 1e-3),
}
CASES = FUNCTIONS | {f"gradient of {name}": gradient(f) for name, f in FUNCTIONS.items()}
PLAIN = {name: f(torch.linspace(-9, 9, 77)) for name, f in CASES.items()}  # before any rule


@pytest.fixture(autouse=True)
def _rules():
    use_alike_activations()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_the_value_of_a_number_is_that_of_any_place(threads, name, dtype):
    """Behind one more, or before one more; in one share, or in several."""
    function = CASES[name]
    for size in (1, 70, 4096, 40960, 98305):
        x = 3 * torch.randn(size, generator=torch.Generator().manual_seed(size)).to(dtype)
        whole = function(x)
        for left in (1, 7, 33):
            assert torch.equal(function(x[left:].clone()), whole[left:])
            assert torch.equal(function(x[:-left].clone()), whole[:-left])


@pytest.mark.parametrize("name", CASES)
def test_the_layout_of_a_tensor_changes_no_value(threads, name):
    x = torch.randn(5, 6, 7, 9)
    whole = CASES[name](x)
    for other in (
        x.contiguous(memory_format=torch.channels_last),
        x.transpose(1, 2).contiguous().transpose(1, 2),
        torch.cat([x, x], -1)[..., :9],
        x[0].expand(5, 6, 7, 9),
    ):
        found = CASES[name](other)
        assert found.shape == x.shape
        assert torch.equal(found[0], whole[0])


@pytest.mark.parametrize("name", CASES)
def test_the_values_are_those_of_the_function(threads, name):
    torch.testing.assert_close(CASES[name](torch.linspace(-9, 9, 77)), PLAIN[name])
    assert FUNCTIONS.get(name, F.silu)(torch.empty(0, 3)).shape == (0, 3)
    assert torch.sigmoid(torch.arange(3)).dtype == torch.float32
    alone = FUNCTIONS.get(name, F.silu)(torch.tensor(0.5))
    assert alone.shape == () and alone.isfinite()
