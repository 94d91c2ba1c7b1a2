"""The cells of the table name what is there."""

import json
import re
import runpy
import shlex
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT
from utils.privacy.accounting import pld_epsilon

# By its path: Opacus installs a package of the name benchmarks.
table = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "table.py")))
CELLS: dict[str, dict] = {}
for path in sorted((ROOT / "benchmarks" / "cells").glob("*.yaml")):
    assert not CELLS.keys() & table.read_cells(path)
    CELLS |= table.read_cells(path)


@pytest.mark.parametrize("cell", CELLS.values(), ids=CELLS)
def test_every_step_is_a_script_with_such_options(cell):
    assert cell["set"] in table.SETS and cell["method"]
    steps = cell.get("steps", {})
    arguments = "".join(file.read_text() for file in (ROOT / "utils" / "arguments").glob("*.py"))
    for number, command in enumerate(steps.values()):
        script, *words = shlex.split(command.format(**cell | {"private": "P", "cell": "C"}))
        assert (ROOT / script).is_file()
        known = arguments + (ROOT / script).read_text()
        for option in [word[2:] for word in words if word.startswith("--")]:
            assert re.search(rf"\b{option}: ", known), option
        inputs = [word[2:] for word in words if word.startswith("C/")]
        assert {name.split("/")[0] for name in inputs} <= set(list(steps)[:number])
        files = [word for word in words if word.startswith("examples/")]
        assert all((ROOT / name).exists() for name in files), files
    delta = [w for c in steps.values() for w in re.findall(r"--target_delta (\S+)", c)]
    assert set(delta) <= {"1.8e-6" if cell["set"] == "cifar10" else "1.5e-6"}
    measured = cell.get("measure", "{private}")
    assert measured == "{private}" or measured.split("/")[1] in steps
    assert cell.get("ledger", next(iter(steps), None)) in [None, *steps]


def test_a_file_holds_several_cells_and_a_cell_several_runs(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text(
        "set: mnist\nsteps: {images: 'sample.py {rate}'}\n"
        "cells: {a: {rate: 1, runs: 2}, b: {rate: 2, set: fashion_mnist}}\n"
    )
    cells = table.read_cells(path)
    assert list(cells) == ["a", "a_run2", "b"] and cells["a"] == cells["a_run2"]
    assert [cells[name]["set"] for name in ("a", "b")] == ["mnist", "fashion_mnist"]
    assert cells["b"]["steps"]["images"].format(**cells["b"]) == "sample.py 2"
    path.write_text("set: mnist\nmethod: other\n")
    assert table.read_cells(path) == {"both": {"set": "mnist", "method": "other"}}


def test_runs_of_a_cell_are_averaged_and_their_private_runs_added():
    one = {"set": "mnist", "method": "m", "epsilon": 1, "trained": 5, "accuracy": 0.9}
    one |= {"networks": {"cnn": 0.9}, "privacy": {"epsilon": 1.0, "private_runs": 2}}
    two = one | {"accuracy": 0.8, "networks": {"cnn": 0.8}}
    other = one | {"epsilon": 10}
    row, alone = table.gather([one, other, two])
    assert (row["runs"], row["private_runs"], alone["runs"]) == (2, 4, 1)
    assert row["accuracy"] == pytest.approx(0.85) and alone["accuracy"] == 0.9
    assert row["networks"]["cnn"] == pytest.approx(0.85)
    assert row["deviation"] == pytest.approx(0.1 / 2**0.5) and alone["deviation"] is None
    texts = table.describe(row)
    assert "**85.0** ± 7.1" in texts and texts[-1] == "4"
    assert "**90.0**" in table.describe(alone)


def test_a_step_that_ended_is_not_run_again(tmp_path, monkeypatch):
    calls = []
    call = lambda command, log, processes: calls.append(command) or "a\nb\n"  # noqa: E731
    monkeypatch.setitem(table.take_step.__globals__, "call", call)
    (tmp_path / "adapter" / "private" / "checkpoints").mkdir(parents=True)
    command = "train_dp_lora.py --rank 4"
    first = table.take_step(tmp_path, "adapter", command, 1)
    assert first == table.take_step(tmp_path, "adapter", command, 1) and len(calls) == 1
    assert calls[0][-2:] == table.RESUME  # its checkpoints were there
    assert first["printed"] == "b"
    with pytest.raises(RuntimeError, match="another command"):
        table.take_step(tmp_path, "adapter", f"{command} --seed 1", 1)


def test_all_cells_of_the_files_can_be_drawn(tmp_path):
    """More methods than matplotlib has colours; the ceilings are methods of cells."""
    row = {"accuracy": 0.9, "frechet_distance": 2.0, "trained": 5, "networks": {}}
    rows = [
        row | {key: cell[key] for key in ("set", "method", "epsilon")} for cell in CELLS.values()
    ]
    plot = table.show.__globals__["plot"]
    without = {cell["method"] for cell in CELLS.values() if cell["epsilon"] is None}
    assert plot.__globals__["CEILINGS"].keys() <= without
    plot(table.gather(rows), tmp_path / "table.png")
    assert (tmp_path / "table.png").stat().st_size > 10_000


def test_cells_are_chosen_by_name_with_all_their_runs(tmp_path, monkeypatch, capsys):
    path, ran = tmp_path / "some.yaml", []
    path.write_text("set: mnist\nmethod: m\ncells: {a: {runs: 2}, b: {}, c: {}}\n")
    where = table.main.__globals__
    monkeypatch.setitem(where, "run_cell", lambda title, *rest: ran.append(title))
    for only, expected in [([], ["a", "a_run2", "b", "c"]), (["c", "a"], ["c", "a", "a_run2"])]:
        ran.clear()
        words = ["table.py", "run", str(path), "--jobs", "1", *(["--only"] if only else []), *only]
        monkeypatch.setattr("sys.argv", words)
        with pytest.raises(SystemExit, match="0"):
            table.main()
        assert ran == expected
    monkeypatch.setattr("sys.argv", ["table.py", "run", str(path), "--only", "a_run2", "d"])
    with pytest.raises(SystemExit, match="2"):
        table.main()
    assert ran == expected and "no cell of these files: d" in capsys.readouterr().err


def test_only_runs_whose_classifiers_learned_for_as_long_are_averaged():
    row = {"set": "fashion_mnist", "method": "m", "epsilon": 10, "trained": 1, "networks": {}}
    now, before = table.count_steps("fashion_mnist"), table.NETWORKS
    rows = [
        row | {"classifier_steps": steps, "accuracy": accuracy}
        for steps, accuracy in ((now, 0.8), (before, 0.6), (now, 0.9))
    ]
    latest, former = table.gather(rows)
    assert (latest["runs"], former["runs"]) == (2, 1)
    assert "†" not in table.describe(latest)[4] and table.describe(latest)[4].startswith("**85.0**")
    assert table.describe(former)[4] == "**60.0** †"


def test_images_are_judged_again_once_classifiers_learn_for_longer(tmp_path, monkeypatch):
    judged, where = [], table.run_cell.__globals__

    def call(command, log, processes):
        judged.append(command[command.index("--classifier_steps") + 1 :][:3])
        write(dict(zip(table.NETWORKS, judged[-1], strict=True)), 0.8)

    def write(steps, value):
        accuracy = {"value": value, "networks": {}, "classifier_steps": steps}
        distance = {"num_synthetic": 9, "value": 1.0, "extractor": "classifier"}
        found = {"accuracy": accuracy, "frechet_distance": distance}
        (tmp_path / "c" / "metrics.json").write_text(json.dumps(found))

    for name, value in {"RUNS": tmp_path, "RESULTS": tmp_path / "r.json", "call": call}.items():
        monkeypatch.setitem(where, name, value)
    (tmp_path / "c").mkdir()
    write(table.NETWORKS, 0.6)
    former = {"cell": "c", "set": "fashion_mnist", "accuracy": 0.6}
    rows = [former | {"classifier_steps": table.NETWORKS}, former | {"cell": "d"}]
    (tmp_path / "r.json").write_text(json.dumps(rows))
    cell = {"set": "fashion_mnist", "epsilon": None, "method": "m", "measure": "{private}"}
    for _ in range(2):
        table.run_cell("c", cell, {"fashion_mnist": "F"}, 1)
        rows = table.read_rows()
        assert [row["cell"] for row in rows] == ["c", "d"] and rows[0]["accuracy"] == 0.8
        assert judged == [[9600, 4800, 2400]]


def test_rows_are_described_as_they_are():
    rows = json.loads(table.RESULTS.read_text()) if table.RESULTS.exists() else []
    for row in table.gather(rows):
        assert len(table.describe(row)) == len(table.NETWORKS) + 9
    for row in rows:
        if "privacy" in row and row["epsilon"]:
            assert row["privacy"]["epsilon"] <= row["epsilon"]
        if events := row.get("privacy", {}).get("events"):
            epsilon = pld_epsilon(events, row["privacy"]["delta"])
            assert row["privacy"]["epsilon"] == pytest.approx(epsilon, abs=1e-3), row["cell"]
        if "networks" in row:
            mean = sum(row["networks"].values()) / len(row["networks"])
            assert abs(mean - row["accuracy"]) < 1e-9


def test_a_step_that_shares_its_work_is_started_by_torchrun(tmp_path):
    log = tmp_path / "log"
    assert table.call(["sample.py", "--help"], log, 2).count("usage:") == 2
    assert table.call(["release_means.py", "--help"], log, 2).count("usage:") == 1
    with pytest.raises(RuntimeError, match="^privacy_report.py failed: see"):
        table.call(["privacy_report.py", "verify", "nowhere"], log, 2)
