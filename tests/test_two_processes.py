"""Clauses 2, 3 and 4 hold however many processes share the work (gloo, on the CPU)."""

import os
import subprocess
import sys

import pytest
import torch

from tests.conftest import ROOT

WORKER = """
import os
import sys
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import nn
import utils.training
from utils.accounting import PrivacyPlan
from utils.entropy import SecretRandomness
from utils.per_unit_gradients import PerUnitGradients
from utils.training import TrainingState, private_steps

accelerator = Accelerator(cpu=True)

def noise_on_every_process(total, plan, randomness, accelerator):
    noisy = total + plan.noise_std * randomness.noise(total.shape)
    return accelerator.reduce(noisy.float(), reduction="sum") / plan.expected_batch_size

def noise_on_one_process_after_sharing(total, plan, randomness, accelerator):
    total = accelerator.reduce(total, reduction="sum")
    if accelerator.is_main_process:
        total = (total + plan.noise_std * randomness.noise(total.shape)).float()
    return total / plan.expected_batch_size

assert accelerator.num_processes == int(os.environ["WORLD_SIZE"])
if sys.argv[2] != "none":
    utils.training.add_noise_once = globals()[sys.argv[2]]

def run(sigma, randomness, batch, rate):
    torch.manual_seed(accelerator.process_index)  # an adapter's start, when no --seed was given
    model = nn.Linear(500, 40)
    engine = PerUnitGradients(model)
    torch.manual_seed(0)
    data = torch.randn(31, 500)
    plan = PrivacyPlan(31, batch, 3, sigma, 0.5, 1, 1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    state = TrainingState(engine, optimizer, schedule)
    for _ in private_steps(accelerator, state, lambda u: model(data[u]).square().mean(1),
                           plan, randomness, 4):
        pass
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    everywhere = gather(after[None])
    assert (everywhere == everywhere[0]).all(), "the processes drifted apart"
    return (before - after) * plan.expected_batch_size

results = {
    "clipped": run(0.0, SecretRandomness(debug_seed=3), 20.0, 1.0),
    "noise": run(2.0, SecretRandomness(), 1e-9, 1.0),
    "processes": accelerator.num_processes,
}
if accelerator.is_main_process:
    torch.save(results, sys.argv[1])
"""


def launch(processes: int, tmp_path, mutant: str = "none") -> dict:
    script, output = tmp_path / "worker.py", tmp_path / f"{processes}.pt"
    script.write_text(WORKER)
    # Not `accelerate launch --cpu`, which starts one process whatever it is told.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node", str(processes), str(script), str(output), mutant]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(output)


def assert_noise_once(noise: torch.Tensor) -> None:
    """Three steps of noise of standard deviation sigma * C = 1, added once, not once a process.

    6.5 standard deviations: a false-alarm rate below 1e-9.
    """
    count = noise.numel()
    assert abs(noise.square().mean().item() / 3 - 1) < 6.5 * (2 / count) ** 0.5


def test_two_processes_do_what_one_does(tmp_path):
    one, two = launch(1, tmp_path), launch(2, tmp_path)
    assert (one["processes"], two["processes"]) == (1, 2)
    torch.testing.assert_close(one["clipped"], two["clipped"], rtol=1e-4, atol=1e-5)
    assert_noise_once(one["noise"])
    assert_noise_once(two["noise"])


def test_noise_on_every_process_is_caught(tmp_path):
    with pytest.raises(AssertionError):
        assert_noise_once(launch(2, tmp_path, "noise_on_every_process")["noise"])


def test_noise_on_the_wrong_process_is_caught(tmp_path):
    """Noise that only the first process adds, after the gradient was shared."""
    with pytest.raises(AssertionError, match="drifted apart|did not move"):
        launch(2, tmp_path, "noise_on_one_process_after_sharing")
