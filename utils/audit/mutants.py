"""The private loop, broken on purpose as published code was: the audit and tests must catch it.

Only `audit_privacy.py` and the tests use these. Each replaces one piece that the loop in
`privacy/training.py` calls.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from utils.privacy import dp_sgd, training
from utils.privacy.randomness import SecretRandomness


def _no_noise(total, plan, randomness, accelerator):
    return accelerator.reduce(total, reduction="sum") / plan.expected_batch_size


def _noise_divided_by_batch(total, plan, randomness, accelerator):
    """Noise of standard deviation sigma * C / B on the sum: meant for the mean, added before it."""
    quiet = replace(plan, noise_multiplier=plan.noise_multiplier / plan.expected_batch_size)
    return dp_sgd.add_noise_once(total, quiet, randomness, accelerator)


def _noise_reused_each_step(total, plan, randomness, accelerator):
    """A generator that is seeded anew at every step."""
    return dp_sgd.add_noise_once(total, plan, SecretRandomness(debug_seed=0), accelerator)


def _double_clip_bound(record, plan):
    return dp_sgd.clipped_sum(record, replace(plan, max_grad_norm=2 * plan.max_grad_norm))


def _copies_clipped_one_by_one(accelerator, engine, unit_losses, indices, plan, micro_batch_size):
    """Each of a unit's K copies is clipped by itself, so the unit contributes up to K * C."""
    copies = [
        _CLIPPED_GRADIENT_SUM(accelerator, engine, unit_losses, indices, plan, micro_batch_size)
        for _ in range(plan.noise_multiplicity)
    ]
    return torch.stack(copies).sum(0)


class _ShuffledBatches:
    """Batches of B taken in turn from a shuffled list, as a data loader does."""

    def __init__(self):
        self.order = torch.empty(0, dtype=torch.long)

    def __call__(self, plan, randomness, accelerator):
        size = int(plan.expected_batch_size)
        if len(self.order) < size:
            self.order = randomness.uniform((plan.num_units,)).argsort()
        batch, self.order = self.order[:size], self.order[size:]
        return batch.sort().values


_CLIPPED_GRADIENT_SUM = training.clipped_gradient_sum
PIECES = {  # by mutant: the piece that it replaces, and what makes the replacement
    "no_noise": ("add_noise_once", lambda: _no_noise),
    "copies_clipped_one_by_one": ("clipped_gradient_sum", lambda: _copies_clipped_one_by_one),
    "double_clip_bound": ("clipped_sum", lambda: _double_clip_bound),
    "noise_divided_by_batch": ("add_noise_once", lambda: _noise_divided_by_batch),
    "shuffled_batches": ("sample_poisson_batch", _ShuffledBatches),
    "noise_reused_each_step": ("add_noise_once", lambda: _noise_reused_each_step),
}


@contextmanager
def break_loop(name: str | None) -> Iterator[None]:
    """Within this context `private_steps` is the mutant `name`; None leaves it as it is."""
    if name is None:
        yield
        return
    attribute, make = PIECES[name]
    whole = getattr(training, attribute)
    setattr(training, attribute, make())
    try:
        yield
    finally:
        setattr(training, attribute, whole)
