"""Clauses 3 and 4: what one process is told, all are told, for but one plan is on record."""

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import train_arguments
from tests.scripts.test_many_processes import forked
from tests.worlds import build_plan
from utils.errors import UsageError, find_differences, require_alike
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
        ('sys.argv += ["--mixed_precision", "bf16"]', "mixed_precision: fp32 and bf16"),
        ('sys.argv += ["--train_batch_size", "3"]', "train_batch_size: 4 and 3"),
        ('sys.argv += ["--gradient_checkpointing"]', "gradient_checkpointing: False and True"),
        (
            'sys.argv += ["--mixed_precision", "bf16", "--base_precision", "bf16"]',
            "mixed_precision: fp32 and bf16; base_precision: fp32 and bf16",
        ),
        ('sys.argv += ["--debug_noise_seed", "1"]', "randomness: Philox, keyed by the operating"),
        ("import torch; torch.set_num_threads(5)", "device: cpu"),
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
    assert f"not started alike ({said}" in found.stderr
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_processes_that_were_told_otherwise_stop(monkeypatch):
    told = {"max_grad_norm": 1.0, "method": {"votes": 2}, "steps": 3}
    require_alike(told)
    others = [told, told | {"method": {"votes": 20}}]
    monkeypatch.setattr("accelerate.utils.gather_object", lambda own: others)
    with pytest.raises(UsageError, match=r"not started alike \(votes: 2 and 20\)"):
        require_alike(told)


def test_the_engine_itself_compares_what_bounds_and_rounds_a_unit(monkeypatch):
    told, layer = [], torch.nn.Linear(2, 2)
    state = TrainingState(PerUnitGradients(layer), torch.optim.SGD(layer.parameters(), 1.0), None)

    def tell(plan=None, randomness=None, micro_batch=4) -> None:
        monkeypatch.setattr("accelerate.utils.gather_object", lambda own: told.append(own) or own)
        plan, randomness = plan or build_plan(), randomness or SecretRandomness()
        next(private_steps(Accelerator(), state, None, plan, randomness, micro_batch), None)

    def stop(*others) -> None:
        raise InterruptedError

    monkeypatch.setattr("utils.privacy.training.start_as_main_process", stop)
    for other in (
        {},
        {"plan": build_plan(max_grad_norm=7.0)},
        {"randomness": SecretRandomness(1)},
        {"micro_batch": 5},
    ):
        with pytest.raises(InterruptedError):
            tell(**other)
    monkeypatch.setattr(torch, "__version__", "another")
    with pytest.raises(InterruptedError):
        tell()
    (first,), *others = told
    found = [[name for name, *_ in find_differences(first, other)] for (other,) in others]
    assert found == [["max_grad_norm"], ["randomness"], ["micro_batch_size"], ["torch"]]
    assert first["mixed_precision"] == "no" and first["device"].startswith("cpu ")
