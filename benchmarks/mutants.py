"""Mutation testing: which small defects in the code that a guarantee rests on do the tests notice?

    make mutants                                          # both of the commands below, hours
    python benchmarks/mutants.py trace                    # what each test runs, and for how long
    python benchmarks/mutants.py run --number 300 --seed 0
    python benchmarks/mutants.py run --only utils/privacy/dp_sgd.py:49 --seconds 900

Cosmic Ray makes the mutants: a number one larger, `<` for `<=`, `-` for `+`, a loop that never
runs. Places are drawn at random, each at most once, and for each place one of its mutants; notes of
types and the `*` of signatures are no places. Each mutant meets the tests that ran its line (those
of the privacy contract and of the packages named in TESTS), the quickest first, for as long as
`--seconds` allows by what each took when it was traced. One that passes them survives: it is a
missing test, or it changes nothing.
"""

import argparse
import ast
import difflib
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from itertools import islice
from multiprocessing.connection import wait
from pathlib import Path
from xml.etree import ElementTree

import pytest
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator, operator_names
from coverage import CoverageData

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs" / "mutants"
GUARDED = ["gradients/*.py", "ledger/*.py"]
GUARDED += [f"privacy/{name}.py" for name in ("accounting", "dp_sgd", "plan", "randomness")]
GUARDED += [f"privacy/{name}.py" for name in ("replace_one", "training")]
TESTS = [*(f"tests/{name}" for name in ("audit", "gradients", "ledger", "methods", "privacy"))]
TESTS += ["tests/sampling", "tests/scripts/test_privacy_report.py"]
KILLED = ("killed", "too slow")


@dataclass(frozen=True)
class Mutant:
    """One defect: `operator`, at the place that it finds as number `occurrence` in a file."""

    path: str
    line: int
    column: int
    operator: str
    occurrence: int

    def __str__(self) -> str:
        return f"{self.path}:{self.line}:{self.column} {self.operator.removeprefix('core/')}"

    def names(self) -> set[str]:
        """What `--only` may call it."""
        return {self.path, f"{self.path}:{self.line}", str(self)}

    def code(self) -> str:
        text = (ROOT / self.path).read_text()
        return mutate_code(text, get_operator(self.operator)(), self.occurrence)

    def diff(self) -> str:
        before, after = (ROOT / self.path).read_text(), self.code()
        lines = difflib.unified_diff(before.split("\n"), after.split("\n"), lineterm="", n=0)
        return "\n".join(f"    {line}" for line in list(lines)[3:])


def list_mutants(path: Path) -> list[Mutant]:
    """Every mutant of one file, but for those within notes of types."""
    text = path.read_text()
    nodes, found = list(ast_nodes(get_ast(text))), []
    notes = find_notes(text)
    for name in operator_names():
        if get_operator(name).arguments():
            continue  # of variables: it wants their names
        operator = get_operator(name)()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for occurrence, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in notes):
                found.append(Mutant(str(path.relative_to(ROOT)), *start, name, occurrence))
    return found


def find_notes(text: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """Where notes of types stand, from and to: (line, column), lines from 1."""
    found = []
    for node in ast.walk(ast.parse(text)):
        for name in ("annotation", "returns"):
            note = getattr(node, name, None)
            if note is not None:
                start = (note.lineno, note.col_offset)
                found.append((start, (note.end_lineno, note.end_col_offset)))
    return found


def compiles(mutant: Mutant) -> bool:
    """Whether it is a program, and another one."""
    before = ast.dump(ast.parse((ROOT / mutant.path).read_text()))
    try:
        return ast.dump(ast.parse(mutant.code())) != before
    except (SyntaxError, AttributeError):  # `-` for the `*` of a signature; `except os.error`
        return False


def draw(mutants: list[Mutant], number: int, seed: int) -> list[Mutant]:
    """Places at random, and at each one of its mutants."""
    places = defaultdict(list)
    for mutant in mutants:
        places[mutant.path, mutant.line, mutant.column].append(mutant)
    chosen, drawn = random.Random(seed), []
    order = sorted(places)
    chosen.shuffle(order)
    for place in order:
        here = chosen.sample(places[place], len(places[place]))
        drawn += islice(filter(compiles, here), 1)
        if len(drawn) == number:
            break
    return drawn


def trace(workers: int) -> None:
    """Run the tests once, in a copy, and keep what each ran and for how long."""
    copy = make_copy("traced")
    tests = [*sorted(str(p.relative_to(ROOT)) for p in ROOT.glob("tests/test_privacy_*")), *TESTS]
    command = [sys.executable, "-m", "pytest", "-n", str(workers), "--dist", "loadfile"]
    tracing = ["--cov", "utils", "--cov-context", "test", "--cov-report", ""]
    report = ["--junitxml", str(RUNS / "times.xml"), "-o", "junit_family=xunit1"]
    variables = {**os.environ, "COVERAGE_FILE": str(RUNS / "coverage"), "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, *tracing, *report, *tests], cwd=copy, env=variables, check=True)


def make_copy(name: str) -> Path:
    """What git keeps, as it stands here, in a folder of its own."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, stdout=subprocess.PIPE, check=True)
    copy = RUNS / name
    shutil.rmtree(copy, ignore_errors=True)
    for path in listed.stdout.decode().split("\0")[:-1]:
        (copy / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, copy / path)
    return copy


def read_times() -> dict[str, float]:
    """Seconds that each test took, by its name for pytest."""
    times = {}
    for case in ElementTree.parse(RUNS / "times.xml").iter("testcase"):
        times[f"{case.get('file')}::{case.get('name')}"] = float(case.get("time"))
    return times


def tests_by_line(path: str) -> dict[int, set[str]]:
    """For each line of a file, the tests that ran it; lines that are run on import have none."""
    data = CoverageData(str(RUNS / "coverage"))
    data.read()
    lines = data.contexts_by_lineno(str(RUNS / "traced" / path))
    return {n: {name.partition("|")[0] for name in names if name} for n, names in lines.items()}


def choose_tests(mutant: Mutant, times: dict[str, float], seconds: float) -> list[str]:
    """The tests to run, quickest first, that fit into so many seconds.

    For a line outside all functions, and a statement of many lines, what ran the nearest line
    that is traced around it.
    """
    lines = tests_by_line(mutant.path)
    known = [line for line in lines if lines[line]]
    nearest = sorted(known, key=lambda line: (abs(line - mutant.line), line))[:3]
    names = lines.get(mutant.line) or set().union(*(lines[line] for line in nearest))
    chosen, left = [], seconds
    for name in sorted(names & set(times), key=times.get):
        left -= times[name]
        if left >= 0:
            chosen.append(name)
    return chosen


def preload() -> None:
    """Import what our modules import, once, for all processes that are forked from this one."""
    sys.path.insert(0, str(ROOT))
    for path in (ROOT / "utils").rglob("[a-z]*.py"):
        importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    for name in list(sys.modules):  # of ours, each process imports its own
        if name.partition(".")[0] in ("utils", "evaluate"):
            del sys.modules[name]


def meet_tests(copy: Path, mutant: Mutant, tests: list[str]) -> None:
    """In a forked process: run the tests on the mutant; exits with 0 if they pass."""
    os.setsid()
    log = os.open(copy / "log", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.chdir(copy)
    os.environ["PYTHONPATH"] = str(copy)
    (copy / mutant.path).write_text(mutant.code())
    sys.path[:] = [str(copy), *(p for p in sys.path if str(ROOT) != p and "benchmarks" not in p)]
    plugins = ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov"]
    os._exit(pytest.main(["-x", "-q", *plugins, "--rootdir", str(copy), *tests]))


@dataclass
class Meeting:
    """A mutant in a copy of the repository, and the process that runs the tests on it."""

    mutant: Mutant
    copy: Path
    tests: list[str]
    limit: float  # seconds

    def __post_init__(self):
        context = multiprocessing.get_context("fork")
        arguments = (self.copy, self.mutant, self.tests)
        self.process = context.Process(target=meet_tests, args=arguments)
        self.process.start()
        self.deadline = time.monotonic() + self.limit

    def is_over(self) -> bool:
        return not self.process.is_alive() or time.monotonic() > self.deadline

    def end(self) -> str:
        """What came of it; the copy is as it was."""
        slow = self.process.is_alive()
        if slow:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        shutil.copy(ROOT / self.mutant.path, self.copy / self.mutant.path)
        if slow:
            return "too slow"
        if not self.tests:
            return "no test"
        self.log = (self.copy / "log").read_text()
        if self.process.exitcode == 4 and "loading conftest" not in self.log:
            raise RuntimeError(f"tests changed since they were traced: trace again\n{self.log}")
        return "killed" if self.process.exitcode else "survived"


def run(mutants: list[Mutant], args: argparse.Namespace) -> list[Mutant]:
    """Every mutant meets its tests, `args.workers` at a time; returns the survivors."""
    preload()
    sys.dont_write_bytecode = True  # that of a mutant would be taken for the file's
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    times, waiting, meetings, survivors, done = read_times(), list(mutants), [], [], 0
    free = [make_copy(str(number)) for number in range(args.workers)]
    while waiting or meetings:
        while waiting and free:
            mutant = waiting.pop(0)
            tests = choose_tests(mutant, times, args.seconds)
            limit = 120 + 4 * sum(times[test] for test in tests) + 900 * len(args.also)
            meetings.append(Meeting(mutant, free.pop(), tests + args.also, limit))
        wait([meeting.process.sentinel for meeting in meetings], timeout=1)
        for meeting in [meeting for meeting in meetings if meeting.is_over()]:
            meetings.remove(meeting)
            end, done = meeting.end(), done + 1
            free.append(meeting.copy)
            print(f"{done:4}/{len(mutants)} {end:8} {meeting.mutant}", flush=True)
            if end not in KILLED:
                survivors.append(meeting.mutant)
                print(meeting.mutant.diff(), flush=True)
    return survivors


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["trace", "run"])
    parser.add_argument("--number", type=int, default=300, help="mutants to draw")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--seconds", type=float, default=240, help="of tests, for each mutant")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--also", nargs="+", default=[], help="tests to run last, traced or not")
    parser.add_argument("--only", nargs="+", default=[], help="files, FILE:LINE, or as printed")
    args = parser.parse_args()
    if args.command == "trace":
        return trace(args.workers)
    paths = sorted({path for pattern in GUARDED for path in (ROOT / "utils").glob(pattern)})
    mutants = [mutant for path in paths for mutant in list_mutants(path)]
    if args.only:
        drawn = [m for m in mutants if m.names() & set(args.only) and compiles(m)]
    else:
        drawn = draw(mutants, args.number, args.seed)
    print(f"{len(drawn)} of {len(mutants)} mutants in {len(paths)} files", flush=True)
    killed = len(drawn) - len(run(drawn, args))
    print(f"{killed} of {len(drawn)} killed ({100 * killed / len(drawn):.1f} %)")


if __name__ == "__main__":
    main()
