"""The house: rooms import only from below, no circles, sizes, and a map that names every room."""

import ast
import functools
import re
from pathlib import Path

import pytest

from tests.conftest import ROOT

# From the ground up. A package imports from floors below its own, and within itself.
FLOORS = [
    {"chatter", "version", "memory"},
    {"errors"},
    {"files", "fetching"},
    {"listing"},
    {"arguments", "metrics"},
    {"gradients"},
    {"privacy"},
    {"ledger"},
    {"models"},
    {"data"},
    {"hub"},
    {"sampling"},
    {"evaluation"},
    {"audit"},
    {"methods"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
SKIP = {".venv", ".venv-latest", ".venv-lowest", "runs", ".git"}


def list_files(folder: Path = ROOT) -> list[Path]:
    found = sorted(folder.rglob("*.py"))
    return [path for path in found if not SKIP & set(path.relative_to(ROOT).parts)]


def find_imports(text: str) -> set[str]:
    """The modules of ours that a file imports, also within its functions: "utils.data.rows"."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{name.name}" for name in node.names}  # if it is a module
    return found & list_modules()


@functools.cache
def list_modules() -> set[str]:
    """All modules of ours, but `evaluate`: to import that is to import the library."""
    modules = {".".join(p.relative_to(ROOT).with_suffix("").parts) for p in list_files()}
    return modules - {"evaluate"}


def find_wrong_arrows(files: dict[str, str]) -> list[str]:
    """Imports that point up, sideways to another package, or out of utils; by module, its text."""
    wrong = []
    for module, text in files.items():
        room = module.split(".")[1]
        for target in find_imports(text):
            if not target.startswith("utils."):
                wrong.append(f"{module} imports {target}")
                continue
            below = target.split(".")[1]
            if below != room and FLOOR[below] >= FLOOR[room]:
                wrong.append(f"{module} imports {target}")
    return wrong


def read_utils() -> dict[str, str]:
    files = [path for path in list_files(ROOT / "utils") if path.name != "__init__.py"]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts): p.read_text() for p in files}


def test_no_import_points_up():
    files = read_utils()
    assert len(files) > 60 and not find_wrong_arrows(files)


@pytest.mark.parametrize(
    "module, line",
    [
        ("utils.data.images", "from utils.hub.upload import upload"),
        ("utils.data.images", "import utils.methods.plots"),
        ("utils.privacy.dp_sgd", "def f():\n    from utils.ledger import runs"),
        ("utils.audit.canaries", "from utils.methods.planning import reserve"),
        ("utils.methods.planning", "from train_dp_lora import main"),
    ],
)
def test_an_import_that_points_up_is_caught(module, line):
    files = read_utils()
    assert len(find_wrong_arrows({**files, module: files[module] + "\n" + line})) == 1


def test_no_circle_of_files():
    files = read_utils()
    arrows = {m: {t for t in find_imports(text) if t in files} for m, text in files.items()}
    assert arrows["utils.gradients.leaves"] >= {"utils.gradients.recording"}
    while arrows:  # take away what imports nothing that is left
        free = {module for module, targets in arrows.items() if not targets & set(arrows)}
        assert free, f"a circle among {sorted(arrows)}"
        arrows = {module: targets for module, targets in arrows.items() if module not in free}


def measure_functions(path: Path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            names = [a.arg for a in arguments if a.arg not in ("self", "cls", "ctx")]
            yield node.name, node.end_lineno - node.lineno + 1, len(names)


def test_modules_functions_and_signatures_stay_small():
    for path in list_files():
        lines = len(path.read_text().splitlines())
        assert lines <= 300, f"{path} has {lines} lines"
        for name, length, arguments in measure_functions(path):
            assert length <= 60, f"{path}: {name} has {length} lines"
            assert arguments <= 7, f"{path}: {name} has {arguments} arguments"


def test_the_map_names_every_room_and_no_other():
    text = ast.get_docstring(ast.parse((ROOT / "utils" / "__init__.py").read_text()))
    rooms = set()
    for path in (ROOT / "utils").iterdir():
        if path.suffix == ".py" and path.name != "__init__.py":
            rooms.add(path.stem)
        elif path.is_dir() and path.name != "__pycache__":
            rooms.add(f"{path.name}/")
            if path.name not in ("metrics", "arguments"):
                inner = [p for p in path.iterdir() if p.name[0] != "_" and p.suffix != ".css"]
                rooms |= {f"{p.name}/" if p.is_dir() else p.stem for p in inner}
    upper = text[: text.index("The way of one image")]
    named = re.findall(r"^ {4,8}([a-z_]+/?)  ", upper, re.M)
    assert sorted(set(named)) == sorted(rooms)


def test_tests_mirror_the_house():
    folders = {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()}
    folders -= {"__pycache__", "scripts"}
    assert folders <= {path.name for path in (ROOT / "utils").iterdir() if path.is_dir()}
    assert len(folders) >= 10


def test_a_benchmark_finds_the_house_before_it_imports_from_it():
    """Started as docs say, `python benchmarks/NAME.py`, it has its own folder on the path only."""
    files = {path.stem: path.read_text() for path in (ROOT / "benchmarks").glob("*.py")}
    for name, text in files.items():
        if '__name__ == "__main__"' not in text:
            continue
        known = False
        for node in ast.parse(text).body:
            known = known or "sys.path" in ast.unparse(node)
            if isinstance(node, ast.ImportFrom):
                sibling = files.get(node.module or "", "")
                needs = node.module.startswith("utils") or "from utils" in sibling
                assert known or not needs, f"benchmarks/{name}.py imports {node.module} too early"
