"""What the optimizers and the average do with the private gradient."""

import pytest
import torch

from tests.worlds import build_plan
from utils.arguments.training import TrainingArguments
from utils.privacy.optimizers import DPAdamBC, build_optimizer


def gradients(steps=30, size=50):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(steps, size, generator=generator) * 0.1


def trained_by(make) -> torch.Tensor:
    parameter = torch.nn.Parameter(torch.ones(50))
    optimizer = make([parameter])
    for gradient in gradients():
        parameter.grad = gradient.clone()
        optimizer.step()
    return parameter.detach()


def test_without_noise_adam_bc_is_adamw():
    settings = {"lr": 0.01, "weight_decay": 0.1, "eps": 1e-16}
    ours = trained_by(lambda p: DPAdamBC(p, noise_variance=0.0, **settings))
    torch.testing.assert_close(ours, trained_by(lambda p: torch.optim.AdamW(p, **settings)))


def test_adam_bc_takes_the_noise_off_the_second_moment():
    """By the formula, from the moments kept by hand."""
    noise, eps, lr = 0.008, 1e-5, 0.01
    mean = square = torch.zeros(50)
    expected = torch.ones(50)
    for step, gradient in enumerate(gradients(), start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        corrected = (square / (1 - 0.999**step) - noise).clamp_min(eps)
        expected = expected - lr * mean / (1 - 0.9**step) / corrected.sqrt()
    ours = trained_by(lambda p: DPAdamBC(p, lr=lr, noise_variance=noise, eps=eps))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, kind", [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD), ("adam_bc", DPAdamBC)]
)
def test_the_argument_chooses(name, kind):
    plan = build_plan(noise_multiplier=2.0, max_grad_norm=0.5, expected_batch_size=50.0)
    parameter = torch.nn.Parameter(torch.ones(3))
    training = TrainingArguments(output_dir="x", optimizer=name, learning_rate=0.3)
    optimizer = build_optimizer(training, [parameter], plan)
    assert type(optimizer) is kind and optimizer.param_groups[0]["lr"] == 0.3
    if name == "adam_bc":
        assert optimizer.param_groups[0]["noise_variance"] == pytest.approx((2.0 * 0.5 / 50) ** 2)
