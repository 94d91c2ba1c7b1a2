"""The one private training loop."""

import time
from collections.abc import Callable

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from tqdm import tqdm

from utils.accounting import PrivacyPlan, pld_epsilon
from utils.dp_sgd import add_noise_once, clipped_sum, draw_poisson_batch
from utils.entropy import SecretRandomness
from utils.errors import UsageError
from utils.per_unit_gradients import PerUnitGradients

# (indices of units [U]) -> losses [U], each a function of its own unit alone
UnitLosses = Callable[[torch.Tensor], torch.Tensor]


def train_privately(
    accelerator: Accelerator,
    engine: PerUnitGradients,
    unit_losses: UnitLosses,
    plan: PrivacyPlan,
    optimizer: torch.optim.Optimizer,
    lr_scheduler,
    randomness: SecretRandomness,
    micro_batch_size: int,
) -> None:
    """DP-SGD: Algorithm 1 of Abadi et al. 2016, with Poisson sampling and K draws per unit
    (noise multiplicity: Dockhorn et al. 2023, section 3.2).

    The trained parameters are (epsilon, delta)-differentially private as `plan` states. Nothing
    else that depends on the data leaves this function: no loss, norm, or batch size is shown.

    Raises:
        UsageError: fp16, whose gradients overflow and need a loss scale that looks at the data.
        RuntimeError: a trainable tensor did not move at the first step with a positive rate.
    """
    if accelerator.mixed_precision == "fp16":
        raise UsageError("fp16 is not supported: its loss scaling looks at the data; use bf16")
    for parameter in engine.parameters:  # every process starts where the main one does
        parameter.data.copy_(broadcast(parameter.data, from_process=0))
    progress = _Progress(accelerator, plan)
    checked = False
    for _ in range(plan.steps):
        batch = draw_poisson_batch(plan, randomness, accelerator)
        share = batch[accelerator.process_index :: accelerator.num_processes]
        total = clipped_gradient_sum(
            accelerator, engine, unit_losses, share, plan, micro_batch_size
        )
        engine.assign(add_noise_once(total, plan, randomness, accelerator))
        before = None if checked else [p.detach().clone() for p in engine.parameters]
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if before is not None and rate > 0:
            _check_that_weights_moved(engine, before)
            checked = True
        lr_scheduler.step()
        optimizer.zero_grad()
        progress.step(rate)
    progress.close()


def clipped_gradient_sum(
    accelerator: Accelerator,
    engine: PerUnitGradients,
    unit_losses: UnitLosses,
    indices: torch.Tensor,
    plan: PrivacyPlan,
    micro_batch_size: int,
) -> torch.Tensor:
    """Sum over `indices` of each unit's clipped gradient: [P]; zero for no units.

    The micro-batch changes speed and memory only: every unit is clipped by itself.
    """
    total = torch.zeros(engine.num_parameters, device=engine.device)
    for units in indices.split(micro_batch_size) if len(indices) else []:
        with engine.recording(len(units)) as record:
            with accelerator.autocast():
                losses = unit_losses(units)
            losses.sum().backward()
        total += clipped_sum(record, plan)
    return total


def _check_that_weights_moved(engine: PerUnitGradients, before: list[torch.Tensor]) -> None:
    for name, old, new in zip(engine.names, before, engine.parameters, strict=True):
        if torch.equal(old, new):
            raise RuntimeError(f"{name} did not move at the first step: it is not being trained")


class _Progress:
    """A bar with the step, epsilon so far and images per second: nothing that depends on the data.

    Images per second counts the expected batch size, not the batches that were drawn.
    """

    def __init__(self, accelerator: Accelerator, plan: PrivacyPlan, updates: int = 10):
        self.accelerator, self.plan = accelerator, plan
        self.every = max(1, plan.steps // updates)
        self.done, self.epsilon, self.start = 0, 0.0, time.perf_counter()
        hidden = not accelerator.is_main_process
        self.bar = tqdm(total=plan.steps, desc="private steps", unit="step", disable=hidden)

    def step(self, learning_rate: float) -> None:
        if self.accelerator.is_main_process and self.done % self.every == 0:
            ahead = min(self.done + self.every, self.plan.steps)
            self.epsilon = pld_epsilon([self.plan.event(steps=ahead)], self.plan.delta)
        self.done += 1
        seconds = time.perf_counter() - self.start
        rate = self.done * self.plan.expected_batch_size / seconds
        self.bar.update()
        self.bar.set_postfix_str(f"epsilon <= {self.epsilon:.2f}, {rate:.0f} images/s")
        if self.accelerator.trackers:
            values = {"learning_rate": learning_rate, "epsilon": self.epsilon}
            self.accelerator.log(values, step=self.done)

    def close(self) -> None:
        self.bar.close()
