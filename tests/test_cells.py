"""The cells of the table name what is there."""

import json
import re
import runpy
import shlex
from types import SimpleNamespace

import pytest
import yaml

from tests.conftest import ROOT

# By its path: Opacus installs a package of the name benchmarks.
table = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "table.py")))
CELLS = sorted((ROOT / "benchmarks" / "cells").glob("*.yaml"))


@pytest.mark.parametrize("path", CELLS, ids=lambda path: path.stem)
def test_every_step_is_a_script_with_such_options(path):
    cell = yaml.safe_load(path.read_text())
    assert cell["set"] in table.SETS and cell["method"]
    steps = cell.get("steps", {})
    arguments = "".join(file.read_text() for file in (ROOT / "utils" / "arguments").glob("*.py"))
    for number, command in enumerate(steps.values()):
        script, *words = shlex.split(command.format(private="P", cell="C"))
        assert (ROOT / script).is_file()
        known = arguments + (ROOT / script).read_text()
        for option in [word[2:] for word in words if word.startswith("--")]:
            assert re.search(rf"\b{option}: ", known), option
        inputs = [word[2:] for word in words if word.startswith("C/")]
        assert {name.split("/")[0] for name in inputs} <= set(list(steps)[:number])
        files = [word for word in words if word.startswith("examples/")]
        assert all((ROOT / name).exists() for name in files), files
    delta = [w for c in steps.values() for w in re.findall(r"--target_delta (\S+)", c)]
    assert set(delta) <= {"1.5e-6"}
    measured = cell.get("measure", "{private}")
    assert measured == "{private}" or measured.split("/")[1] in steps
    assert cell.get("ledger", next(iter(steps), None)) in [None, *steps]


def test_a_step_that_ended_is_not_run_again(tmp_path, monkeypatch):
    calls = []
    call = lambda command, log: calls.append(command) or "a\nb\n"  # noqa: E731
    monkeypatch.setitem(table.take_step.__globals__, "call", call)
    (tmp_path / "adapter" / "private" / "checkpoints").mkdir(parents=True)
    command = "train_dp_lora.py --rank 4"
    first = table.take_step(tmp_path, "adapter", command)
    assert first == table.take_step(tmp_path, "adapter", command) and len(calls) == 1
    assert calls[0][-2:] == table.RESUME  # its checkpoints were there
    assert first["printed"] == "b"


def test_rows_are_described_as_they_are():
    rows = json.loads(table.RESULTS.read_text()) if table.RESULTS.exists() else []
    for row in rows:
        assert len(table.describe(row)) == len(table.NETWORKS) + 8
        if "privacy" in row and row["epsilon"]:
            assert row["privacy"]["epsilon"] <= row["epsilon"]
        if "networks" in row:
            mean = sum(row["networks"].values()) / len(row["networks"])
            assert abs(mean - row["accuracy"]) < 1e-9
