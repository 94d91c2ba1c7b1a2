"""Clauses 2, 3 and 4 hold however many processes share the work (gloo, on the CPU)."""

import subprocess
import sys

import torch

from tests.conftest import ROOT

WORKER = """
import sys
import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import nn
from utils.accounting import PrivacyPlan
from utils.entropy import SecretRandomness
from utils.per_unit_gradients import PerUnitGradients
from utils.training import train_privately

accelerator = Accelerator(cpu=True)

def run(sigma, randomness, batch, rate):
    torch.manual_seed(0)
    model = nn.Linear(500, 40)
    engine = PerUnitGradients(model)
    data = torch.randn(31, 500)
    plan = PrivacyPlan(31, batch, 3, sigma, 0.5, 1, 1e-3)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    train_privately(accelerator, engine, lambda u: model(data[u]).square().mean(1),
                    plan, optimizer, schedule, randomness, 4)
    after = torch.cat([p.detach().flatten() for p in model.parameters()])
    everywhere = gather(after[None])
    assert (everywhere == everywhere[0]).all(), "the processes drifted apart"
    return (before - after) * plan.expected_batch_size

torch.save({
    "clipped": run(0.0, SecretRandomness(debug_seed=3), 20.0, 1.0),
    "noise": run(2.0, SecretRandomness(), 1e-9, 1.0),
}, sys.argv[1])
"""


def launch(processes: int, tmp_path) -> dict:
    script, output = tmp_path / "worker.py", tmp_path / f"{processes}.pt"
    script.write_text(WORKER)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    command += ["--num_processes", str(processes)]
    command += ["--main_process_port", "0", str(script), str(output)]
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    import os

    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return torch.load(output)


def test_two_processes_do_what_one_does(tmp_path):
    one, two = launch(1, tmp_path), launch(2, tmp_path)
    torch.testing.assert_close(one["clipped"], two["clipped"], rtol=1e-4, atol=1e-5)
    # Three steps of noise of standard deviation sigma * C = 1, added once, not once a process.
    for noise in (one["noise"], two["noise"]):
        count = noise.numel()
        assert abs(noise.square().mean().item() / 3 - 1) < 6.5 * (2 / count) ** 0.5
