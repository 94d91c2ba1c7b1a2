"""Clauses 2, 4 and 6: Poisson sampling, noise once, secret randomness.

Statistical thresholds are 6.5 standard deviations (a normal tail of 8e-11) with at most a few
thousand comparisons a test, so a test's false-alarm rate stays below 1e-6.
"""

import pickle

import pytest
import torch
from torch import nn

import utils.training
from tests.conftest import ROOT
from utils.accounting import PrivacyPlan
from utils.dp_sgd import add_noise_once, draw_poisson_batch
from utils.entropy import SecretRandomness
from utils.per_unit_gradients import PerUnitGradients
from utils.training import train_privately

TAIL = 6.5


def plan_of(units=200, batch=60.0, steps=1, sigma=1.0, bound=1.0) -> PrivacyPlan:
    return PrivacyPlan(units, batch, steps, sigma, bound, 1, 1e-4)


def test_every_unit_is_drawn_independently_with_probability_q(accelerator):
    plan, draws, randomness = plan_of(), 4000, SecretRandomness()
    included = torch.zeros(draws, plan.num_units, dtype=torch.float64)
    for row in included:
        row[draw_poisson_batch(plan, randomness, accelerator)] = 1
    q = plan.sampling_rate
    deviation = (q * (1 - q) / draws) ** 0.5
    assert (included.mean(0) - q).abs().max() < TAIL * deviation
    # The batch size varies as a binomial does: shuffled batches of fixed size would not.
    sizes = included.sum(1)
    variance = plan.num_units * q * (1 - q)
    assert abs(sizes.var().item() / variance - 1) < TAIL * (2 / draws) ** 0.5 * 1.2
    # Pairs of units, and the same unit in consecutive steps, are uncorrelated.
    z = (included - q) / (q * (1 - q)) ** 0.5
    pairs = (z.T @ z / draws).fill_diagonal_(0)
    assert pairs.abs().max() < (TAIL + 1) / draws**0.5
    in_a_row = (z[1:] * z[:-1]).mean(0)
    assert in_a_row.abs().max() < TAIL / (draws - 1) ** 0.5


def test_empty_batches_are_emitted(accelerator):
    plan, randomness = plan_of(units=10, batch=0.5), SecretRandomness()
    sizes = [len(draw_poisson_batch(plan, randomness, accelerator)) for _ in range(500)]
    assert 0 in sizes and max(sizes) > 0


def update_of(accelerator, plan, randomness, losses=None):
    """The parameters' move over `plan.steps` steps of plain SGD at rate 1, times B."""
    model = nn.Linear(1000, 100, bias=False)
    nn.init.zeros_(model.weight)
    engine = PerUnitGradients(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    losses = losses or (lambda units: 0 * model(torch.ones(len(units), 1000)).sum(1))
    train_privately(accelerator, engine, losses, plan, optimizer, constant, randomness, 16)
    return -model.weight.detach().flatten() * plan.expected_batch_size


def assert_normal(noise: torch.Tensor, std: float) -> None:
    count, z = noise.numel(), noise.double() / std
    assert abs(z.mean()) < TAIL / count**0.5
    assert abs(z.square().mean() - 1) < TAIL * (2 / count) ** 0.5
    assert abs(z.pow(3).mean()) < TAIL * (15 / count) ** 0.5
    assert abs(z.pow(4).mean() - 3) < TAIL * (96 / count) ** 0.5


def test_an_empty_batch_is_a_noisy_step(accelerator):
    plan = plan_of(units=10**6, batch=1e-9, sigma=0.7, bound=0.3)
    assert_normal(update_of(accelerator, plan, SecretRandomness()), 0.7 * 0.3)


def test_noise_is_added_once_a_step_however_many_micro_batches(accelerator):
    plan = plan_of(units=200, batch=150, sigma=2.0, bound=0.5)
    assert_normal(update_of(accelerator, plan, SecretRandomness()), 2.0 * 0.5)


def test_noise_of_different_steps_is_independent(accelerator):
    plan = plan_of(units=10**6, batch=1e-9, steps=4)
    assert_normal(update_of(accelerator, plan, SecretRandomness()), 4**0.5)


def _no_noise(total, plan, randomness, accelerator):
    return total / plan.expected_batch_size


def _noise_divided_by_batch(total, plan, randomness, accelerator):
    quiet = PrivacyPlan(200, 150.0, 1, plan.noise_multiplier / 150, plan.max_grad_norm, 1, 1e-4)
    return add_noise_once(total, quiet, randomness, accelerator)


def _noise_twice(total, plan, randomness, accelerator):
    once = add_noise_once(total, plan, randomness, accelerator) * plan.expected_batch_size
    return add_noise_once(once, plan, randomness, accelerator)


def _same_noise_every_step(total, plan, randomness, accelerator):
    return add_noise_once(total, plan, SecretRandomness(debug_seed=1), accelerator)


@pytest.mark.parametrize(
    "mutant", [_no_noise, _noise_divided_by_batch, _noise_twice, _same_noise_every_step]
)
def test_the_noise_tests_catch_broken_noise(accelerator, monkeypatch, mutant):
    plan = plan_of(units=200, batch=150, steps=2)
    assert_normal(update_of(accelerator, plan, SecretRandomness()), 2**0.5)
    monkeypatch.setattr(utils.training, "add_noise_once", mutant)
    monkeypatch.setattr(utils.training, "_check_that_weights_moved", lambda *_: None)
    with pytest.raises(AssertionError):
        assert_normal(update_of(accelerator, plan, SecretRandomness()), 2**0.5)


def test_the_sum_is_divided_by_the_public_batch_size(accelerator):
    """Without noise, an empty batch divides by B as a full one does: never by what was drawn."""
    plan = plan_of(units=200, batch=50, sigma=0.0)
    total = torch.full((7,), 100.0)
    mean = add_noise_once(total, plan, SecretRandomness(), accelerator)
    torch.testing.assert_close(mean, torch.full((7,), 2.0))


def test_the_seed_reaches_neither_noise_nor_sampling():
    drawn = []
    for _ in range(2):
        torch.manual_seed(0)
        randomness = SecretRandomness()
        drawn.append((randomness.normal((50,)), randomness.bernoulli(0.5, 200)))
    assert not torch.equal(drawn[0][0], drawn[1][0])
    assert not torch.equal(drawn[0][1], drawn[1][1])


def test_keys_have_more_than_64_bits():
    """PyTorch's CPU generator would keep 32 bits of its seed."""
    keys = [SecretRandomness()._generator.bit_generator.state["state"]["key"] for _ in range(64)]
    for word in range(2):
        assert len({int(key[word]) for key in keys}) == 64
        assert max(int(key[word]) for key in keys) > 2**57


def test_secret_randomness_cannot_be_saved(tmp_path):
    with pytest.raises(TypeError, match="never saved"):
        pickle.dumps(SecretRandomness())
    with pytest.raises(TypeError, match="never saved"):
        torch.save({"randomness": SecretRandomness()}, tmp_path / "state.pt")


def test_no_global_generator_is_used_by_the_private_step():
    """Draws of the engine go through SecretRandomness: its files name no other source."""
    for name in ("dp_sgd", "training", "latents"):
        text = (ROOT / "utils" / f"{name}.py").read_text()
        for source in (
            "torch.rand",
            "randn_like",
            "randint",
            "randperm",
            "np.random",
            "manual_seed",
        ):
            assert source not in text, f"utils/{name}.py draws from {source}"


def test_weights_that_do_not_move_are_an_error(accelerator):
    model = nn.Linear(3, 2)
    engine = PerUnitGradients(model)
    forgotten = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(forgotten, factor=1.0)
    losses = lambda units: model(torch.ones(len(units), 3)).sum(1)  # noqa: E731
    with pytest.raises(RuntimeError, match="did not move"):
        train_privately(
            accelerator,
            engine,
            losses,
            plan_of(steps=1),
            forgotten,
            constant,
            SecretRandomness(),
            8,
        )
