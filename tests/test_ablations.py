"""The ablations change what they say, from one middle."""

import re
import runpy
from types import SimpleNamespace

import pytest

from tests.conftest import ROOT

# By its path: Opacus installs a package of the name benchmarks.
ablations = SimpleNamespace(**runpy.run_path(str(ROOT / "benchmarks" / "ablations.py")))


@pytest.mark.parametrize("axis", ablations.AXES)
def test_an_axis_goes_through_the_middle_once_with_options_that_exist(axis):
    points = ablations.AXES[axis].values()
    assert list(points).count(ablations.MIDDLE) == 1 and len(set(points)) == len(points) > 2
    known = "".join(file.read_text() for file in (ROOT / "utils" / "arguments").glob("*.py"))
    for point in points:
        for word in point.options:
            if str(word).startswith("--"):
                assert re.search(rf"\b{word[2:]}: ", known), word


def test_as_many_passes_are_as_many():
    for axis in ("K x steps", "B, at as many passes"):
        for point in ablations.AXES[axis].values():
            given = dict(zip(point.options[::2], point.options[1::2], strict=True))
            plan = ablations.PLAN | {name[2:]: value for name, value in given.items()}
            passes = plan["expected_batch_size"] * plan["max_train_steps"]
            assert passes * plan["noise_multiplicity"] == ablations.STEPS * ablations.BATCH


def test_all_axes_share_the_run_of_the_middle():
    rows = [
        {"axis": "", "point": "", "run": 0, "accuracy": 0.8},
        {"axis": "rank", "point": "1", "run": 0, "accuracy": 0.7},
        {"axis": "rank", "point": "1", "run": 1, "accuracy": 0.9},
    ]
    assert ablations.collect(rows, "rank") == {"1": [70.0, 90.0], "4": [80.0]}
    assert ablations.collect(rows, "clipping") == {"automatic": [80.0]}
