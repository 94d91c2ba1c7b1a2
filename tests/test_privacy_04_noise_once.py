"""Clause 4: noise once a step, on the sum, which is then divided by the public B.

False-alarm rates as in `tests/worlds.py`: below 1e-6 a test.
"""

import pytest
import torch

from tests.worlds import assert_normal, build_plan, measure_update
from utils.audit.mutants import break_loop
from utils.privacy import training
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness, SecureRandomness


@pytest.mark.parametrize("source", [SecretRandomness, SecureRandomness])
def test_noise_is_added_once_a_step_however_many_micro_batches(accelerator, source):
    plan = build_plan(expected_batch_size=150, noise_multiplier=2.0, max_grad_norm=0.5)
    assert_normal(measure_update(accelerator, plan, source()), 2.0 * 0.5)


def test_noise_of_different_steps_is_independent(accelerator):
    plan = build_plan(num_units=10**6, expected_batch_size=1e-9, steps=4)
    assert_normal(measure_update(accelerator, plan), 4**0.5)


def _noise_twice(total, plan, randomness, accelerator):
    once = add_noise_once(total, plan, randomness, accelerator) * plan.expected_batch_size
    return add_noise_once(once, plan, randomness, accelerator)


MUTANTS = ["no_noise", "noise_divided_by_batch", "noise_reused_each_step", "noise_twice"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_the_noise_tests_catch_broken_noise(accelerator, monkeypatch, mutant):
    plan = build_plan(expected_batch_size=150, steps=2)
    assert_normal(measure_update(accelerator, plan), 2**0.5)
    monkeypatch.setattr(training, "_check_that_weights_moved", lambda *_: None)
    if mutant == "noise_twice":
        monkeypatch.setattr(training, "add_noise_once", _noise_twice)
        mutant = None
    with break_loop(mutant), pytest.raises(AssertionError):
        assert_normal(measure_update(accelerator, plan), 2**0.5)


def mean_of_a_sum(accelerator, drawn: int) -> torch.Tensor:
    """The released gradient, without noise, when `drawn` units each contribute 1."""
    plan = build_plan(expected_batch_size=50, noise_multiplier=0.0)
    total = torch.full((7,), float(drawn))
    return training.add_noise_once(total, plan, SecretRandomness(), accelerator)


@pytest.mark.parametrize("drawn", [0, 1, 50, 100])
def test_the_sum_is_divided_by_the_public_batch_size(accelerator, drawn):
    torch.testing.assert_close(mean_of_a_sum(accelerator, drawn), torch.full((7,), drawn / 50))


def test_dividing_by_the_sampled_batch_is_caught(accelerator, monkeypatch):
    def by_the_drawn(total, plan: PrivacyPlan, randomness, accelerator):
        noisy = add_noise_once(total, plan, randomness, accelerator)
        return noisy * plan.expected_batch_size / total.max().clamp_min(1)

    monkeypatch.setattr(training, "add_noise_once", by_the_drawn)
    with pytest.raises(AssertionError):
        test_the_sum_is_divided_by_the_public_batch_size(accelerator, 100)
