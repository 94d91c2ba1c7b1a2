"""What is imported is named, with one version, in the file that installs it."""

import ast
import functools
import re
import subprocess
import sys
from importlib.metadata import packages_distributions, version
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from tests.test_house import list_files
from utils.version import VERSION

OURS = {"utils", "tests", *(path.stem for path in list_files())} - {"evaluate"}


def read_requirements(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text().splitlines()
    pins = [line.split("==") for line in lines if line[0].isalpha()]
    assert all(len(pin) == 2 for pin in pins), pins
    return dict(pins)


def find_libraries(path: Path) -> set[str]:
    """The distributions that a file imports, wherever in it."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            modules.add(node.module.split(".")[0])
    homes = find_homes()
    return {homes.get(m, [m])[0] for m in modules - OURS - set(sys.stdlib_module_names)}


find_homes = functools.cache(packages_distributions)  # a second each time


def find_unnamed(path: Path) -> set[str]:
    named = set(read_requirements("requirements.txt"))
    if path.is_relative_to(ROOT / "tests") or path.name == "mutants.py":
        named |= set(read_requirements("requirements-dev.txt"))
    if path.name == "mutants.py":  # `make mutants` installs more
        named |= {"coverage", *re.findall(r"([\w-]+)==", (ROOT / "Makefile").read_text())}
    if path.parent.name == "space":  # `make space` names it, at the version of its README
        named |= set(re.findall(r"^sdk: (\w+)$", (path.parent / "README.md").read_text(), re.M))
    return {normalise(name) for name in find_libraries(path)} - {normalise(n) for n in named}


def normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_library_that_is_imported_is_named():
    unnamed = {str(path.relative_to(ROOT)): find_unnamed(path) for path in list_files()}
    assert {path: names for path, names in unnamed.items() if names} == {}


def test_one_that_is_not_named_is_found(tmp_path):
    path = tmp_path / "script.py"
    path.write_text("import json, torch\ndef f():\n    import pytest\n    from anyio import run\n")
    assert find_unnamed(path) == {"pytest", "anyio"}


@pytest.mark.skipif(
    Path(sys.prefix).name in (".venv-latest", ".venv-lowest"), reason="made of other versions"
)
@pytest.mark.parametrize("name", ["requirements.txt", "requirements-dev.txt"])
def test_what_is_installed_is_what_is_named(name):
    for library, pinned in read_requirements(name).items():
        assert version(library).split("+")[0] == pinned, library


def test_the_lowest_versions_are_lower_and_of_named_libraries():
    pinned = read_requirements("requirements.txt")
    for library, lowest in read_requirements("requirements-lowest.txt").items():
        numbers = [[int(n) for n in text.split(".")] for text in (lowest, pinned[library])]
        assert numbers[0] < numbers[1], library


def test_the_version_is_the_same_everywhere():
    changes = re.findall(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert changes[0] == citation["version"] == VERSION


def test_the_workflow_runs_what_everybody_runs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())
    job = workflow["jobs"]["tests"]
    assert any(step.get("run") == ".ci/run" for step in job["steps"])
    assert job["strategy"]["matrix"]["python"][0] == "3.11"


def test_nothing_private_gets_into_a_container():
    """A folder of pictures may have any name: only what is of this repository is let in."""
    comment, everything, *rest = (ROOT / ".dockerignore").read_text().splitlines()
    assert comment.startswith("#") and everything == "*"
    assert rest[-2:] == ["**/private", "**/__pycache__"]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:  # not in a downloaded archive
        ours = {path.split("/")[0] for path in listed.stdout.split()} | {"*.py"}
        assert {line.removeprefix("!") for line in rest[:-2]} <= ours
    assert all(line.startswith("!") for line in rest[:-2])
    box = (ROOT / "Dockerfile").read_text()
    assert set(re.findall(r'-v "?(\S+?):', box)) == {"/data/scans", "$PWD/runs"}
    assert "-r requirements.txt" in box and "XDG_STATE_HOME=/app/runs" in box
