"""The notebook, executed as it stands but for its first cell: on a zip of images, quickly."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.conftest import ROOT, quiet_environment
from tests.forks import run_in_fork
from utils.ledger.verification import find_problems, read_source

SMALL = {
    "install": False,
    "num_images": 20,
    "base": "examples/digits/base",
    "resolution": 32,
    "quick": [
        *("--max_train_steps", 2, "--expected_batch_size", 50, "--num_validation_images", 0),
        *("--generator_steps", 2, "--warm_start_steps", 2),
    ],
    "more": ["--max_train_steps", 2, "--num_validation_images", 0],
    "classifier_steps": 5,
}


@pytest.mark.slow
def test_the_notebook_runs_and_trains_on_a_zip(image_folder, tmp_path, monkeypatch, capsys):
    """In a copy of the repository, from the notebook's own folder."""
    copy = tmp_path / "copy"
    skipped = shutil.ignore_patterns(".git", ".venv*", "runs", "tests", "benchmarks", "__pycache__")
    shutil.copytree(ROOT, copy, ignore=skipped)
    zipped = shutil.make_archive(str(tmp_path / "mine"), "zip", image_folder)
    notebook = json.loads((copy / "examples" / "notebook.ipynb").read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["metadata"].get("tags") for cell in cells][:2] == [["parameters"], None]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    for name, value in quiet_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(copy / "examples")
    known: dict = {}

    def run(*words) -> None:
        done = run_in_fork([*words], copy, quiet_environment())
        assert done.returncode == 0, done.stderr

    exec("".join(cells[0]["source"]), known)
    assert set(SMALL) < set(known)
    known |= SMALL | {"zip_file": zipped}
    exec("".join(cells[1]["source"]), known)
    known["run"]("-c", "print('shown')")
    assert "shown" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="did not work"):
        known["run"]("-c", "1 / 0")
    known["run"] = run  # the same without waiting for imports
    for cell in cells[2:]:
        exec("".join(cell["source"]), known)
    assert Path(os.getcwd()) == copy
    for adapter in ("runs/digits/adapter", "runs/own/mine/adapter"):
        assert not find_problems(read_source(str(copy / adapter), None))
    assert (copy / "runs" / "own" / "mine" / "synthetic" / "grid.png").exists()
