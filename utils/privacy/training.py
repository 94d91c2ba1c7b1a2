"""The one private training loop."""

import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from diffusers.training_utils import EMAModel
from tqdm import tqdm

from utils.errors import UsageError, require_alike
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.gradients.recording import Recording
from utils.privacy.accounting import pld_epsilon, quote
from utils.privacy.dp_sgd import add_noise_once, clipped_sum, sample_poisson_batch
from utils.privacy.plan import PrivacyPlan
from utils.privacy.precision import check_products, describe_arithmetic, highest_precision
from utils.privacy.randomness import SecretRandomness

# (indices of units [U]) -> losses [U], each a function of its own unit alone
UnitLosses = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class TrainingState:
    """All that training changes.

    Attributes:
        engine: knows the trained parameters.
        average: a moving average of them, or None.
        adapter: by name, every tensor that is not the public model's: the trained ones, and those
            that stay at their random start; default: the trained ones.
        step: how many private steps were taken.
        recharged: steps charged beyond them, for the epsilon that is shown (`runs.Run`).
        behind: the events behind a private base model, and their delta, for the same; or None.
    """

    engine: PerUnitGradients
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    average: EMAModel | None = None
    adapter: dict[str, torch.Tensor] | None = None
    step: int = 0
    recharged: int = 0
    behind: dict | None = None

    def __post_init__(self):
        if self.adapter is None:
            self.adapter = dict(zip(self.engine.names, self.engine.parameters, strict=True))

    def state_dict(self) -> dict:
        """What a checkpoint holds: no generator, and nothing of the data but by the noisy steps."""
        return {
            "adapter": {name: tensor.detach().cpu() for name, tensor in self.adapter.items()},
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "step": self.step,
        }

    def load_state_dict(self, state: dict) -> None:
        for name, tensor in self.adapter.items():
            tensor.data.copy_(state["adapter"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.lr_scheduler.load_state_dict(state["lr_scheduler"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
            self.average.to(self.engine.device)
        self.step = state["step"]


def private_steps(
    accelerator: Accelerator,
    state: TrainingState,
    unit_losses: UnitLosses,
    plan: PrivacyPlan,
    randomness: SecretRandomness,
    micro_batch_size: int,
    show_progress: bool = True,
) -> Iterator[int]:
    """DP-SGD: Algorithm 1 of Abadi et al. 2016, with Poisson sampling and K draws per unit
    (noise multiplicity: Dockhorn et al. 2023, section 3.2).

    Resumes from `state.step`, and yields the number of steps taken after each. The trained
    parameters are (epsilon, delta)-differentially private as `plan` states. Nothing else that
    depends on the data leaves this function: no loss, norm, or batch size is shown.

    Raises:
        UsageError: fp16, whose gradients overflow and need a loss scale that looks at the data; or
            fp32 products are not computed in fp32; or the processes have different plans, or would
            round or draw differently.
        RuntimeError: a trainable tensor did not move at the first step with a positive rate, or the
            processes' weights differ after a step.
    """
    if accelerator.mixed_precision == "fp16":
        raise UsageError("fp16 is not supported: its loss scaling looks at the data; use bf16")
    engine, optimizer = state.engine, state.optimizer
    check_products(engine.device)
    require_alike(
        plan.bounds()
        | describe_arithmetic(engine.device)
        | {"mixed_precision": accelerator.mixed_precision, "micro_batch_size": micro_batch_size}
        | {"randomness": randomness.source}
    )
    start_as_main_process(state.adapter.values())
    progress = _Progress(accelerator, plan, state) if show_progress else None
    size = min(micro_batch_size, largest_share(plan, accelerator.num_processes))
    checked = False
    while state.step < plan.steps:
        batch = sample_poisson_batch(plan, randomness, accelerator)
        share = batch[accelerator.process_index :: accelerator.num_processes]
        total = clipped_gradient_sum(accelerator, engine, unit_losses, share, plan, size)
        engine.assign(add_noise_once(total, plan, randomness, accelerator))
        before = None if checked else [p.detach().clone() for p in engine.parameters]
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if before is not None and rate > 0:
            _check_that_weights_moved(engine, before)
            checked = True
        if state.average is not None:
            state.average.step(engine.parameters)
        state.lr_scheduler.step()
        optimizer.zero_grad()
        state.step += 1
        _check_that_processes_agree(accelerator, state)
        if progress is not None:
            progress.step(rate)
        yield state.step
    if progress is not None:
        progress.close()


def start_as_main_process(tensors: Iterable[torch.Tensor]) -> None:
    """Give every process the values of the main one: an adapter starts at random."""
    for tensor in tensors:
        tensor.data.copy_(broadcast(tensor.data, from_process=0))


def largest_share(plan: PrivacyPlan, num_processes: int) -> int:
    """More units than one process is likely to get in a step: a larger micro-batch would be
    mostly blank."""
    mean = plan.expected_batch_size / num_processes
    return math.ceil(mean + 3 * mean**0.5)


def clipped_gradient_sum(
    accelerator: Accelerator,
    engine: PerUnitGradients,
    unit_losses: UnitLosses,
    indices: torch.Tensor,
    plan: PrivacyPlan,
    micro_batch_size: int,
) -> torch.Tensor:
    """Sum over `indices` of each unit's clipped gradient: [P], fp64; zero for no units.

    The micro-batch changes speed and memory only: every unit is clipped by itself.
    """
    total = torch.zeros(engine.num_parameters, dtype=torch.float64, device=engine.device)
    for part in reduce_micro_batches(
        accelerator,
        engine.recording,
        unit_losses,
        split_units(indices, micro_batch_size),
        lambda record: clipped_sum(record, plan),
    ):
        total += part
    return total


def split_units(indices: torch.Tensor, micro_batch_size: int) -> tuple[torch.Tensor, ...]:
    """Units in micro-batches of one size, the last filled up with -1; none for no units.

    Shapes decide how a processor rounds: were the last micro-batch smaller, one more unit would
    change the rounding of others.
    """
    if not len(indices):
        return ()
    blanks = indices.new_full((-len(indices) % micro_batch_size,), -1)
    return torch.cat([indices, blanks]).split(micro_batch_size)


def reduce_micro_batches(
    accelerator: Accelerator,
    recording: Callable[[int], AbstractContextManager[Recording]],
    unit_losses: UnitLosses,
    micro_batches: Iterable[torch.Tensor],
    reduce: Callable[[Recording], torch.Tensor],
) -> Iterator[torch.Tensor]:
    """`reduce` of the per-unit gradients of each micro-batch, which are then forgotten.

    Args:
        recording: opens the recording of so many units: `PerUnitGradients.recording`.
        micro_batches: indices of units [U], one tensor a pass (`split_units`). A place that is -1
            is computed as the first unit is, and then dropped: it gives zero.
    """
    for units in micro_batches:
        blank = units < 0
        with highest_precision():
            with recording(len(units)) as record:
                with accelerator.autocast():
                    losses = unit_losses(units.where(~blank, units[0]))
                losses.sum().backward()
            if blank.any():
                record.drop(blank.to(losses.device))
            part = reduce(record)
        yield part


def avoid_devices_without_fp64() -> None:
    """Before processes find their devices: not Apple's GPU, which has no fp64, in which norms and
    sums are. The processor then does all the work; images can be drawn there as ever."""
    if torch.backends.mps.is_available():
        os.environ["ACCELERATE_USE_CPU"] = "true"
        print("Apple's GPU has no double precision: the processor trains", file=sys.stderr)


def _check_that_weights_moved(engine: PerUnitGradients, before: list[torch.Tensor]) -> None:
    for name, old, new in zip(engine.names, before, engine.parameters, strict=True):
        if torch.equal(old, new):
            raise RuntimeError(f"{name} did not move at the first step: it is not being trained")


def _check_that_processes_agree(accelerator: Accelerator, state: TrainingState) -> None:
    if accelerator.num_processes == 1:
        return
    here = checksum(state.adapter.values()).to(accelerator.device)
    if (accelerator.gather(here[None]) != here).any():
        raise RuntimeError(f"the processes' weights differ after step {state.step}")


def checksum(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One int64 that depends on every bit of the fp32 `tensors` and on their order."""
    total = torch.zeros((), dtype=torch.int64)
    for index, tensor in enumerate(tensors):
        bits = tensor.detach().contiguous().view(torch.int32)
        total += (2 * index + 1) * bits.sum(dtype=torch.int64).cpu()
    return total


class _Progress:
    """A bar with the step, epsilon so far and images per second: nothing that depends on the data.

    It moves after two steps at least: the time of one would give the size of its batch away. Images
    per second counts the expected batch size, not the batches that were sampled.
    """

    def __init__(self, accelerator, plan: PrivacyPlan, state: TrainingState, updates: int = 10):
        self.accelerator, self.plan = accelerator, plan
        self.every = max(2, plan.steps // updates)
        self.first = self.done = state.step
        self.recharged = state.recharged
        self.behind = state.behind or {"events": [], "delta": plan.delta}
        self.start = time.perf_counter()
        self.bar = tqdm(
            total=plan.steps,
            initial=self.first,
            desc="private steps",
            unit="step",
            disable=not accelerator.is_main_process,
        )
        self._look_ahead()

    def _look_ahead(self) -> None:
        """To the step at which the bar will move, and what is spent until then."""
        ahead = self.done + 2
        ahead += -ahead % self.every
        self.next = ahead if self.plan.steps - ahead >= 2 else self.plan.steps
        if self.accelerator.is_main_process:
            events = [*self.behind["events"], *self.plan.events(self.next + self.recharged)]
            self.epsilon = pld_epsilon(events, min(self.plan.delta, self.behind["delta"]))

    def step(self, learning_rate: float) -> None:
        self.done += 1
        if self.done < self.next or not self.accelerator.is_main_process:
            return
        values = {"learning_rate": learning_rate, "epsilon": self.epsilon}
        self._look_ahead()
        seconds = time.perf_counter() - self.start
        rate = (self.done - self.first) * self.plan.expected_batch_size / seconds
        self.bar.update(self.done - self.bar.n)
        self.bar.set_postfix_str(f"epsilon <= {quote(self.epsilon)}, {rate:.0f} images/s")
        if self.accelerator.trackers:
            self.accelerator.log(values, step=self.done)

    def close(self) -> None:
        self.bar.close()
