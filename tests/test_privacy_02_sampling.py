"""Clause 2: sampling is what is accounted: Poisson, over the whole set, empty batches included.

Thresholds of 6.5 standard deviations (a normal tail of 8e-11) with at most some ten thousand
comparisons a test keep the false-alarm rate of each below 1e-6.
"""

import pytest
import torch

from tests.worlds import TAIL, assert_normal, build_plan, measure_update
from utils.audit.mutants import break_loop
from utils.privacy import training
from utils.privacy.randomness import SecretRandomness, SecureRandomness

SOURCES = [SecretRandomness, SecureRandomness]


@pytest.mark.parametrize("source", SOURCES)
def test_every_unit_is_sampled_independently_with_probability_q(accelerator, source):
    plan, draws, randomness = build_plan(), 4000, source()
    included = torch.zeros(draws, plan.num_units, dtype=torch.float64)
    for row in included:
        row[training.sample_poisson_batch(plan, randomness, accelerator)] = 1
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


def test_shuffled_batches_are_caught(accelerator):
    with break_loop("shuffled_batches"), pytest.raises(AssertionError):
        test_every_unit_is_sampled_independently_with_probability_q(accelerator, SecretRandomness)


def test_empty_batches_are_emitted(accelerator):
    plan, randomness = build_plan(num_units=10, expected_batch_size=0.5), SecretRandomness()
    sizes = [len(training.sample_poisson_batch(plan, randomness, accelerator)) for _ in range(500)]
    assert 0 in sizes and max(sizes) > 0


NEARLY_EMPTY = {"num_units": 10**6, "expected_batch_size": 1e-9}


def test_an_empty_batch_is_a_noisy_step(accelerator):
    plan = build_plan(**NEARLY_EMPTY, noise_multiplier=0.7, max_grad_norm=0.3)
    assert_normal(measure_update(accelerator, plan), 0.7 * 0.3)


def test_skipping_empty_batches_is_caught(accelerator, monkeypatch):
    """A loop that adds no noise when nobody was drawn."""
    whole = training.add_noise_once

    def only_if_somebody(total, plan, randomness, accelerator):
        return whole(total, plan, randomness, accelerator) if total.any() else total

    monkeypatch.setattr(training, "add_noise_once", only_if_somebody)
    monkeypatch.setattr(training, "_check_that_weights_moved", lambda *_: None)
    with pytest.raises(AssertionError):
        test_an_empty_batch_is_a_noisy_step(accelerator)
