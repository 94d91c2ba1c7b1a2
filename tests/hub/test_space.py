"""The Space: what it computes and refuses. Gradio is not installed with the tests (its Pillow is
older than ours), so a stand-in has the one thing that is used outside the page: its error."""

import runpy
import subprocess
import sys
from types import ModuleType

import pytest

from tests.conftest import ROOT, train_arguments, train_here
from utils.ledger.verification import read_source


class Error(Exception):
    pass


@pytest.fixture(scope="module")
def app():
    stand_in = ModuleType("gradio")
    stand_in.Error, stand_in.Blocks = Error, None
    before = sys.modules.get("gradio")
    sys.modules["gradio"] = stand_in
    try:
        yield runpy.run_path(str(ROOT / "examples" / "space" / "app.py"))
    finally:
        sys.modules.pop("gradio") if before is None else sys.modules.update(gradio=before)


def test_a_plan_is_told_with_its_table_and_picture(app):
    first, second = app["explore"](1437, 10, 0, 1400, 4)
    assert "for adding or removing one of 1,437 units" in first[0] and "epsilon **9.9" in first[0]
    assert [row[0] for row in first[1]] == [0.5, 1, 2, 4, 8, 10]
    assert first[2] is None and open(second[2], "rb").read(4) == b"\x89PNG"


@pytest.mark.parametrize(
    "numbers, said",
    [
        ((None, 8, None, 100, 10), "at least 3"),
        ((1000, 8, 0.5, 100, 10), "below 1/N"),
        ((1000, 8, 0, 100, 1e9), "steps must be between"),
        ((1000, -1, 0, 100, 10), "epsilon must be above 0"),
        ((1000, 8, 0, 0, 10), "--expected_batch_size"),
    ],
)
def test_impossible_numbers_get_a_sentence(app, numbers, said):
    with pytest.raises(Error, match=said):
        next(app["explore"](*numbers))


def test_only_repositories_are_read_and_a_statement_is_judged(
    app, tiny_base, image_folder, tmp_path
):
    for name in ("", "nonsense", "/etc/passwd", str(tmp_path), "examples/digits"):
        with pytest.raises(Error, match="give a repository of the Hub"):
            app["check"](name, "")
    train_here(train_arguments(tiny_base, image_folder, tmp_path / "run"))
    verdict, page = app["judge"]("user/run", read_source(str(tmp_path / "run"), None))
    assert verdict.startswith("### It holds") and "<iframe" in page and "What is left" in page
    weights = tmp_path / "run" / "pytorch_lora_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    verdict, page = app["judge"]("user/run", read_source(str(tmp_path / "run"), None))
    assert "It does not hold" in verdict and "Do not sign" in page


def test_its_folder_has_all_that_it_imports(tmp_path):
    """`make space`, but for its own copy of gradio."""
    subprocess.run(["make", "-s", "-o", ".venv/.installed", "space"], cwd=ROOT, check=True)
    folder = ROOT / "runs" / "space"
    (tmp_path / "gradio.py").write_text("Blocks = Error = None\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import app; import utils"
    code += "; print(utils.__file__)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert str(folder) in run.stdout
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert "pillow" in lines and "torch==2.13.0" in lines
    assert any(line.startswith("gradio==") for line in lines)
