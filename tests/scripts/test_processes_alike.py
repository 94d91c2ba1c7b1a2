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
from utils.methods import planning
sys.argv[0] = os.path.join(os.environ["PYTHONPATH"], "train_dp_lora.py")
planning.find_commit = lambda: "a"
if os.environ["RANK"] == "1":
    DIFFERENCE
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    "difference, said",
    [
        ('sys.argv += ["--max_grad_norm", "1000"]', "max_grad_norm: 0.1 and 1000.0"),
        ('planning.find_commit = lambda: "b"', "code: a and b"),
    ],
)
def test_processes_that_were_not_started_alike_stop(
    tiny_base, image_folder, tmp_path, difference, said
):
    """Two machines, each with a command and a checkout of its own: but one bound is on record."""
    (script := tmp_path / "otherwise.py").write_text(OTHERWISE.replace("DIFFERENCE", difference))
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--max_grad_norm", 0.1)
    found = forked(2, script, *arguments)
    assert found.returncode == 2
    assert f"not started alike ({said})" in found.stderr
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_the_engine_itself_compares_the_plans_of_processes(monkeypatch):
    told = {"max_grad_norm": 1.0, "method": {"votes": 2}, "steps": 3}
    require_alike(told)
    others = [told, told | {"method": {"votes": 20}}]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: others)
    with pytest.raises(UsageError, match=r"not started alike \(votes: 2 and 20\)"):
        require_alike(told)
    layer = torch.nn.Linear(2, 2)
    state = TrainingState(PerUnitGradients(layer), torch.optim.SGD(layer.parameters(), 1.0), None)
    with pytest.raises(UsageError, match="not started alike"):
        next(private_steps(Accelerator(), state, None, build_plan(), SecretRandomness(), 4))
