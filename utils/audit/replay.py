"""A replay: the real loop on a set, and on the set plus one unit, with all randomness the same.

The guarantee of a step rests on this: the presence of one unit changes nothing but its own
contribution, which is at most C, and noise of sigma * C hides that. So nobody else may be sampled,
or not be sampled, because of it; nobody else's draws or gradient may change by a bit, nor because
all moved on by one place; the clipped sum may move by at most C; and the noise must be there, once,
fresh in every step.

All units are public noise images: nothing private is read, nothing is spent, and the weights are
put back. The added unit's gradient is made as loud as clipping has to cope with.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DiffusionPipeline
from PIL import Image

from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.audit.watched import (
    LoopChange,
    PlacedRandomness,
    ReplayedRandomness,
    Seen,
    install,
    make_pieces,
)
from utils.data.images import ImageRows, find_readable_rows
from utils.data.latents import PrivateLosses, prepare_losses
from utils.data.private_set import PrivateSet
from utils.errors import need_one_process
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.families import find_family
from utils.privacy import training as loop
from utils.privacy.plan import PrivacyPlan
from utils.privacy.training import TrainingState, private_steps

NUM_UNITS, STEPS, MICRO_BATCH = 12, 6, 4
REPLAY = "a replay, for which --dry_run is enough,"
LOUD = 1e6  # times the loss of the added unit
# Standard deviations: a tail of 3e-12.
DEVIATIONS = 7.0


@dataclass
class Lane:
    """One of the two runs, which take turns on the same weights."""

    engine: PerUnitGradients
    plan: PrivacyPlan
    seen: Seen
    pieces: dict[str, Callable]
    steps: Iterator[int]
    randomness: ReplayedRandomness

    def take_step(self, number: int) -> Seen:
        self.randomness.start_step(number)
        with install(self.pieces):
            next(self.steps)
        return self.seen


def open_lane(
    accelerator: Accelerator,
    engine: PerUnitGradients,
    unit_losses: Callable[[torch.Tensor], torch.Tensor],
    plan: PrivacyPlan,
    randomness: ReplayedRandomness,
    broken: LoopChange,
) -> Lane:
    optimizer = torch.optim.SGD(engine.parameters, lr=1e-2 / plan.noise_std)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    state, seen = TrainingState(engine, optimizer, constant), Seen()
    steps = private_steps(accelerator, state, unit_losses, plan, randomness, MICRO_BATCH)
    return Lane(engine, plan, seen, make_pieces(seen, broken), steps, randomness)


@dataclass(frozen=True)
class SetUp:
    """The model that is about to train; `resolution` of its images, in pixels."""

    accelerator: Accelerator
    pipeline: DiffusionPipeline
    engine: PerUnitGradients
    resolution: int


def replay(
    setup: SetUp,
    privacy: PrivacyArguments,
    unit_column: str | None,
    training: TrainingArguments,
    broken: LoopChange = nullcontext,
) -> dict:
    """Replay some steps of the loop, with the model, the adapter and the arguments that are about
    to train; of the loop as it is within the context that `broken` makes.

    Returns what was found: `passed`, `problems` (sentences), `steps`, `largest_move` (of the
    clipped sum, in units of C).

    Raises:
        UsageError: several processes were started.
    """
    accelerator, engine, resolution = setup.accelerator, setup.engine, setup.resolution
    need_one_process(REPLAY)
    plan = PrivacyPlan(
        num_units=NUM_UNITS,
        expected_batch_size=NUM_UNITS / 2,
        steps=STEPS,
        noise_multiplier=1.0,
        max_grad_norm=privacy.max_grad_norm,
        delta=1e-3,
        noise_multiplicity=privacy.noise_multiplicity,
        clipping=privacy.clipping,
        unit_column=unit_column,
    )
    more = replace(plan, num_units=NUM_UNITS + 1, expected_batch_size=(NUM_UNITS + 1) / 2)
    start = [parameter.detach().clone() for parameter in engine.parameters]
    randomness = ReplayedRandomness()
    try:
        with TemporaryDirectory() as folder:
            captions = find_family(setup.pipeline).public_captions
            units = make_noise_units(NUM_UNITS + 1, captions, resolution, unit_column is not None)
            within = replace(training, latents_dir=folder)
            unit_losses, _ = prepare_losses(
                setup.pipeline, units, resolution, within, plan.noise_multiplicity, randomness
            )

            def loud_losses(indices: torch.Tensor) -> torch.Tensor:
                losses = unit_losses(indices)
                return losses * torch.where(indices == NUM_UNITS, LOUD, 1.0).to(losses.device)

            lanes = [
                open_lane(accelerator, engine, loud_losses, p, randomness, broken)
                for p in (plan, more)
            ]
            found = compare_lanes(*lanes)
            size = min(training.train_batch_size, NUM_UNITS)
            if place_counts(setup, unit_losses, plan, size, broken):
                found["problems"].append("one unit in front changed others' gradients")
            return found | {"passed": not found["problems"]}
    except RuntimeError as error:  # the loop itself found something
        return {"passed": False, "problems": [str(error)], "steps": STEPS, "largest_move": None}
    finally:
        for parameter, before in zip(engine.parameters, start, strict=True):
            parameter.data.copy_(before)


def place_counts(
    setup: SetUp, unit_losses: PrivateLosses, plan: PrivacyPlan, size: int, broken: LoopChange
) -> bool:
    """Whether the place of a unit in its micro-batch changes its gradient, by a bit: processors may
    round by it, and one unit more in front moves all others."""
    rows = []
    for first in (0, 1):
        seen, units = Seen(rows={}), torch.arange(first, first + size)
        placed = replace(unit_losses, randomness=PlacedRandomness(first, size))
        with install(make_pieces(seen, broken)):
            loop.clipped_gradient_sum(setup.accelerator, setup.engine, placed, units, plan, size)
        rows.append(seen.rows)
    return any(rows[0][unit] != rows[1][unit] for unit in range(1, size))


def make_noise_units(
    num_units: int, captions: Sequence[str], resolution: int, many_rows: bool
) -> PrivateSet:
    """Units of public noise images; the last has the last of the captions (the longest, by right),
    the others the others in turn. With `many_rows`, unit u has 1 + u modulo 3 of them."""
    rows = [u for u in range(num_units) for _ in range(1 + u % 3 if many_rows else 1)]
    shape = (len(rows), resolution, resolution, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    images = Dataset.from_dict({"image": [Image.fromarray(p) for p in pixels]})
    *others, last = captions
    texts = [last if u == num_units - 1 else others[i % len(others)] for i, u in enumerate(rows)]
    digests = find_readable_rows(ImageRows(images)).digests
    return PrivateSet(images, "image", texts, torch.tensor(rows), {}, digests)


def compare_lanes(without: Lane, with_one: Lane) -> dict:
    """Take all steps in both lanes, and hold them against each other."""
    problems, moves, before = {}, [], None  # problems: of each kind, the first
    bound = without.plan.sensitivity
    for number in range(1, STEPS + 1):
        weights = [parameter.detach().clone() for parameter in without.engine.parameters]
        few = without.take_step(number)
        for parameter, value in zip(without.engine.parameters, weights, strict=True):
            parameter.data.copy_(value)
        many = with_one.take_step(number)
        if [unit for unit in many.batch if unit != NUM_UNITS] != few.batch:
            problems.setdefault("batch", f"step {number}: adding one unit changed who was sampled")
        elif any(many.rows[unit] != few.rows[unit] for unit in few.rows):
            problems.setdefault("rows", f"step {number}: adding one unit changed others' gradients")
        moves.append((many.total - few.total).norm().item() / bound)
        if not moves[-1] <= 1 + 1e-5:
            words = f"step {number}: one unit moved the sum by {moves[-1]:.4g} C"
            problems.setdefault("move", words)
        for noise in (few.noise, many.noise):
            for words in check_noise(noise, before):
                problems.setdefault("noise", f"step {number}: {words}")
        before = many.noise
    if not max(moves) > 0.5:
        problems["still"] = f"the added unit moved no sum by more than {max(moves):.4g} C"
    return {
        "passed": not problems,
        "problems": list(problems.values()),
        "steps": STEPS,
        "largest_move": max(moves),
    }


def check_noise(noise: torch.Tensor, before: torch.Tensor | None) -> list[str]:
    """What is wrong with the noise of a step [P], in units of sigma * C, and beside that of the
    step before. A right one is called wrong once in 10^10 times."""
    size, problems = noise.numel(), []
    spread = noise.square().mean().sqrt().item()
    if not abs(spread - 1) <= DEVIATIONS / (2 * size) ** 0.5:
        problems.append(f"the noise has standard deviation {spread:.4f} sigma C")
    if before is not None and not abs((noise * before).mean()) <= DEVIATIONS / size**0.5:
        problems.append("the noise repeats that of the step before")
    return problems
