"""Clauses 3 and 4: what one process is told, all are told, for but one plan is on record."""

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import train_arguments
from tests.scripts.test_many_processes import forked
from tests.worlds import build_plan
from utils.errors import UsageError, require_alike
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState, private_steps

OTHERWISE = """
import os, runpy, sys
sys.argv[0] = os.path.join(os.environ["PYTHONPATH"], "train_dp_lora.py")
if os.environ["RANK"] == "1":
    sys.argv += ["--max_grad_norm", "1000"]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_processes_that_were_told_different_bounds_stop(tiny_base, image_folder, tmp_path):
    """Two machines, each with a command of its own: but one bound is on record."""
    (script := tmp_path / "otherwise.py").write_text(OTHERWISE)
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--max_grad_norm", 0.1)
    found = forked(2, script, *arguments)
    assert found.returncode == 2
    assert "not started alike (max_grad_norm: 0.1 and 1000.0)" in found.stderr
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_the_engine_itself_compares_the_plans_of_processes(monkeypatch):
    told = {"max_grad_norm": 1.0, "method": {"votes": 2}, "steps": 3}
    require_alike(told)
    others = [told, told | {"method": {"votes": 20}}]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: others)
    with pytest.raises(UsageError, match=r"not started alike \(method.votes: 2 and 20\)"):
        require_alike(told)
    layer = torch.nn.Linear(2, 2)
    state = TrainingState(PerUnitGradients(layer), torch.optim.SGD(layer.parameters(), 1.0), None)
    with pytest.raises(UsageError, match="not started alike"):
        next(private_steps(Accelerator(), state, None, build_plan(), SecretRandomness(), 4))
