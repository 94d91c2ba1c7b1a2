"""The pieces of the private loop, watched: what went through them; and randomness that is the same
in two runs.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm import tqdm

from utils.privacy import training as loop
from utils.privacy.randomness import SecretRandomness

# Makes the context within which the loop is to be replayed (`mutants.break_loop`). Training scripts
# import this module, and must not be able to reach a mutant.
LoopChange = Callable[[], AbstractContextManager]


class ReplayedRandomness(SecretRandomness):
    """Values that depend on the step and on how often one asked in it, and on nothing else."""

    def __init__(self):
        super().__init__(debug_seed=0)
        self._step = self._asked = 0

    def start_step(self, step: int) -> None:
        self._step, self._asked = step, 0

    def _fresh(self) -> np.random.Generator:
        self._asked += 1
        return np.random.Generator(np.random.Philox(key=[self._step, self._asked]))

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(self._fresh().random(shape))

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(self._fresh().standard_normal(shape, dtype=np.float32))

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.from_numpy(self._fresh().standard_normal(shape))


class PlacedRandomness(ReplayedRandomness):
    """The same values for a unit in two micro-batches of `size` consecutive units, of which one
    begins with unit 0, and the other with unit 1: it begins with `first`."""

    def __init__(self, first: int, size: int):
        super().__init__()
        self.first, self.size = first, size

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._of_both(shape, super().uniform)

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._of_both(shape, super().normal)

    def _of_both(self, shape, draw: Callable) -> torch.Tensor:
        each = shape[0] // self.size  # rows a unit
        return draw((shape[0] + each, *shape[1:]))[self.first * each :][: shape[0]]


@dataclass
class Seen:
    """What one step did.

    Attributes:
        batch: the units that it sampled. rows: of each of them, what was recorded, as digests.
        total: the clipped sum [P]; noise: what was added to it [P], in units of sigma * C.
    """

    batch: list[int] | None = None
    rows: dict[int, list[str]] | None = None
    total: torch.Tensor | None = None
    noise: torch.Tensor | None = None


def make_pieces(seen: Seen, broken: LoopChange) -> dict[str, Callable]:
    """What the loop calls within `broken`; each notes in `seen` what went through."""
    with broken():
        names = ("sample_poisson_batch", "clipped_gradient_sum", "clipped_sum", "add_noise_once")
        sample, add_up, clip, add_noise = (getattr(loop, name) for name in names)
    units: list[int] = []  # of the micro-batch in work

    def note_sample(*arguments):
        batch = sample(*arguments)
        seen.batch, seen.rows = batch.tolist(), {}
        return batch

    def note_units(accelerator, engine, unit_losses, *rest):
        def losses(indices):
            units[:] = indices.tolist()
            return unit_losses(indices)

        return add_up(accelerator, engine, losses, *rest)

    def note_rows(record, plan):
        rows = {}
        for unit, digest in zip(units, record.digest_units(), strict=True):
            rows.setdefault(unit, digest)  # a blank repeats the first unit, and comes after it
        for unit, digest in rows.items():
            seen.rows.setdefault(unit, []).append(digest)
        return clip(record, plan)

    def note_noise(total, plan, randomness, accelerator):
        released = add_noise(total, plan, randomness, accelerator)
        seen.total = total.double().clone()
        noise = released.double() * plan.expected_batch_size - seen.total
        seen.noise = noise / (plan.noise_multiplier * plan.max_grad_norm)
        return released

    def hide_bar(**arguments):
        return tqdm(**arguments | {"disable": True})

    pieces = dict(zip(names, (note_sample, note_units, note_rows, note_noise), strict=True))
    return pieces | {"tqdm": hide_bar}


@contextmanager
def install(pieces: dict[str, Callable]) -> Iterator[None]:
    """Within this context the loop calls these pieces."""
    before = {name: getattr(loop, name) for name in pieces}
    vars(loop).update(pieces)
    try:
        yield
    finally:
        vars(loop).update(before)
