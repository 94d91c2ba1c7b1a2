"""The table: private generators on equal footing, by the protocol of docs/results.md.

    python benchmarks/table.py run benchmarks/cells/*.yaml --private mnist=FOLDER    # days; resumes
    python benchmarks/table.py show                                                  # and plots

A cell is a YAML file: the private set, epsilon, a name, and `steps`, each a command of this
repository that writes a folder of the cell. `{private}` stands for the private set and `{cell}` for
the cell's folder; --output_dir is added. `measure` is the folder of the images that are judged, by
classifiers that are trained on them, and by their Frechet distance to the test images; without it,
the last step prints an accuracy as JSON. `ledger` is the folder whose statement is verified; `runs`
is how often a cell is run, with new noise: `show` has the mean. A file may hold several `cells`,
each with what is its own; steps may name that in braces, too.

Cells run side by side, one thread each; or one after another, `--jobs 1 --processes 2`, each step
that shares its work on so many. A step that ended is not run again, another resumes. Rows are kept
in benchmarks/results/table.json; images whose classifiers learned for fewer steps are judged again.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev
from threading import Lock

sys.path += [str(Path(__file__).resolve().parent.parent), str(Path(__file__).resolve().parent)]

import yaml
from table_plots import draw_strip, plot

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "table.json"
RUNS = ROOT / "runs" / "table"
SETS = {"mnist": "ylecun/mnist", "fashion_mnist": "zalando-datasets/fashion_mnist"}
SETS["cifar10"] = "uoft-cs/cifar10"
NETWORKS = {"cnn": 2400, "wide-cnn": 1200, "resnet9": 600}  # optimizer steps of each, on digits
LONGER = {"mnist": 1, "fashion_mnist": 4, "cifar10": 4}  # times as many: things take longer
SEEN_BY = dict.fromkeys(SETS, "examples/digits/extractor.safetensors")  # for the distance
SEEN_BY["cifar10"] = "examples/extractors/things.safetensors"
JUDGES = "--classifier_seeds 1 --metrics utility fidelity --extractor classifier".split()
SPEND = ("train_dp_", "release_means", "select_saliency", "curate", "relabel")
SHARE = ("train_dp_", "sample", "relabel", "evaluate")  # their work among processes
RESUME = ["--resume_from_checkpoint", "latest"]
writing = Lock()


def call(command: list, log: Path, processes: int) -> str:
    """Run a script of the repository, one thread a process; returns what it printed.

    Raises:
        RuntimeError: it failed; its log says why.
    """
    several = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    shared = processes > 1 and command[0].startswith(SHARE)
    script = command[0]
    command = [sys.executable, *map(str, several if shared else []), *map(str, command)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        print("$", shlex.join(command[1:]), file=file, flush=True)
        run = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=file, text=True
        )
        print(run.stdout, file=file)
    if run.returncode:
        raise RuntimeError(f"{script} failed: see {log}")
    return run.stdout


def take_step(folder: Path, name: str, command: str, processes: int) -> dict:
    """Run one step of a cell, unless it ended before; what it printed, and how long it took.

    Raises:
        RuntimeError: it failed, or ended before with another command.
    """
    done, out = folder / f"{name}.json", folder / name
    if done.exists():
        step = json.loads(done.read_text())
        if step["command"] != command:
            raise RuntimeError(
                f"{folder} was made by another command: move it away, or name a cell"
            )
        return step
    parts, start = shlex.split(command), time.perf_counter()
    spends = parts[0].startswith(SPEND)
    parts += ["--output_dir", out] if not parts[0].startswith("benchmarks/dp_sgd") else []
    parts += RESUME if spends and (out / "private" / "checkpoints").is_dir() else []
    printed = call(parts, folder / f"{name}.log", processes)
    seconds = time.perf_counter() - start
    step = {"command": command, "seconds": seconds, "printed": printed.strip().split("\n")[-1]}
    done.write_text(json.dumps(step))
    return step


def verify(folder: Path, log: Path) -> dict:
    """What a verified statement says, and how many private runs its ledger counts.

    Raises:
        RuntimeError: it does not hold.
    """
    call(["privacy_report.py", "verify", folder], log, 1)
    statement = json.loads((folder / "privacy.json").read_text())
    ledgers = folder.parent.rglob("private/ledger.jsonl")
    lines = [json.loads(line) for ledger in ledgers for line in ledger.read_text().splitlines()]
    return {
        "epsilon": statement["epsilon"]["add_or_remove_one"],
        "delta": statement["delta"],
        "events": statement["events"],
        "private_runs": len({line["run"] for line in lines}),
    }


def count_trained(log: Path) -> int | None:
    """How many weights a training script said that it trains; None for other stages."""
    said = re.search(r"([\d,]+) trainable parameters", log.read_text() if log.exists() else "")
    return int(said[1].replace(",", "")) if said else None


def read_cells(path: Path) -> dict[str, dict]:
    """The cells of a file by the names of their folders, a cell of several runs once a run."""
    shared = yaml.safe_load(path.read_text())
    several = {name: shared | own for name, own in shared.pop("cells", {path.stem: {}}).items()}
    return {
        name if run == 1 else f"{name}_run{run}": cell
        for name, cell in several.items()
        for run in range(1, cell.get("runs", 1) + 1)
    }


def run_cell(title: str, cell: dict, private: dict[str, str], processes: int) -> None:
    """Take the steps of a cell that are left, measure its images, and keep its row."""
    if any(row["cell"] == title and judged_as_now(row) for row in read_rows()):
        return
    (folder := RUNS / title).mkdir(parents=True, exist_ok=True)
    names, steps = cell | {"private": private[cell["set"]], "cell": folder}, {}
    for name, command in cell.get("steps", {}).items():
        steps[name] = take_step(folder, name, command.format(**names), processes)
        print(f"{title}: {name}, {steps[name]['seconds'] / 60:.1f} minutes", flush=True)
    row = {key: cell[key] for key in ("set", "epsilon", "method")} | {"cell": title}
    row["seconds"] = {name: round(step["seconds"]) for name, step in steps.items()}  # to plan by
    row["commit"] = subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True)[:7]
    row["trained"] = count_trained(folder / "adapter.log")
    if "ledger" in cell:
        row["privacy"] = verify(folder / cell["ledger"], folder / "verify.log")
    if "measure" in cell:
        row |= measure(cell["measure"].format(**names), folder, names, processes)
    else:
        printed = json.loads(steps[list(steps)[-1]]["printed"])
        row |= {"accuracy": printed["accuracy"], "trained": printed["trainable_parameters"]}
        spent, delta = printed["epsilon"]["add_or_remove_one"], printed["epsilon"]["delta"]
        row["privacy"] = {"epsilon": spent, "delta": delta, "private_runs": 1}
    with writing:
        others = [other for other in read_rows() if other["cell"] != title]
        rows = sorted([*others, row], key=lambda row: row["cell"])
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{title}: accuracy {100 * row['accuracy']:.1f} %", flush=True)


def count_steps(private_set: str) -> dict[str, int]:
    """For how many optimizer steps each network learns from images of a set."""
    return {name: LONGER[private_set] * steps for name, steps in NETWORKS.items()}


def measure(images: str, folder: Path, names: dict, processes: int) -> dict:
    """The accuracy of each network that is trained on the images, their mean, and the distance."""
    output, steps = folder / "metrics.json", count_steps(names["set"])
    data = ["--synthetic", images, "--test_dataset_name", names["private"], "--output_file", output]
    done = json.loads(output.read_text())["accuracy"] if output.exists() else {}
    if done.get("classifier_steps") != steps:
        judges = ["--classifiers", *steps, "--classifier_steps", *steps.values()]
        judges += [*JUDGES, "--classifier_weights", SEEN_BY[names["set"]]]
        call(["evaluate.py", *data, *judges], folder / "evaluate.log", processes)
    strips = RESULTS.parent / "strips"
    if (Path(images) / "metadata.jsonl").exists():  # of a synthetic set
        strips.mkdir(exist_ok=True)
        draw_strip(Path(images), strips / f"{folder.name}.png")
    found = json.loads(output.read_text())
    distance = found["frechet_distance"]
    return {
        "accuracy": found["accuracy"]["value"],
        "networks": {name: v["value"] for name, v in found["accuracy"]["networks"].items()},
        "classifier_steps": found["accuracy"]["classifier_steps"],
        "images": distance["num_synthetic"],
        "frechet_distance": distance["value"],
        "extractor": distance["extractor"],
    }


def read_rows() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def judged_as_now(row: dict) -> bool:
    """Did its classifiers learn for as long as the protocol has it? Those of no images did."""
    steps = count_steps(row["set"])
    return row.get("classifier_steps", steps) == steps


def gather(rows: list[dict]) -> list[dict]:
    """One row a cell: the means of its runs, their deviation; private runs are added. Runs whose
    classifiers did not learn for as long have a row of their own."""
    cells: dict[tuple, list[dict]] = {}
    for row in rows:
        key = (row["set"], row["method"], row["epsilon"] or 0, not judged_as_now(row))
        cells.setdefault(key, []).append(row)
    gathered = []
    for _, runs in sorted(cells.items()):
        row = dict(runs[0]) | {"runs": len(runs), "deviation": None}
        for key in {"accuracy", "frechet_distance", "images"} & row.keys():
            row[key] = fmean(run[key] for run in runs)
        names = row.get("networks", ())
        row["networks"] = {name: fmean(run["networks"][name] for run in runs) for name in names}
        counts = [run.get("privacy", {}).get("private_runs") for run in runs]
        row["private_runs"] = None if None in counts else sum(counts)
        if len(runs) > 1:
            row["deviation"] = stdev(run["accuracy"] for run in runs)
        gathered.append(row)
    return gathered


def show(rows: list[dict]) -> None:
    """Print a table a set, and draw benchmarks/results/table.png."""
    rows = gather(rows)
    for name in sorted({row["set"] for row in rows}):
        print(f"\n### {name}\n")
        print("| method | epsilon | delta | runs | mean | " + " | ".join(NETWORKS), end="")
        print(" | Frechet distance | images | trained weights | private runs |")
        print("| --- " * (len(NETWORKS) + 9) + "|")
        for row in rows:
            if row["set"] == name:
                print("|", " | ".join(describe(row)), "|")
    now = [row for row in rows if judged_as_now(row)]
    if len(now) < len(rows):
        print("\n† by classifiers that learned for fewer steps, as the protocol had it before")
    plot(now, RESULTS.with_suffix(".png"))


def describe(row: dict) -> list[str]:
    """The cells of a row of `gather`, as text."""
    privacy, networks = row.get("privacy", {}), row["networks"]
    mean = f"**{100 * row['accuracy']:.1f}**"
    if row["deviation"] is not None:
        mean += f" ± {100 * row['deviation']:.1f}"
    mean += "" if judged_as_now(row) else " †"
    known = {
        "epsilon": (privacy.get("epsilon"), "{:.2f}"),
        "delta": (privacy.get("delta"), "{:.1e}"),
        "runs": (row["runs"], "{}"),
        "mean": (mean, "{}"),
        **{n: (100 * networks[n] if n in networks else None, "{:.1f}") for n in NETWORKS},
        "distance": (row.get("frechet_distance"), "{:.3g}"),
        "images": (row.get("images"), "{:,.0f}"),
        "trained": (row["trained"], "{:,}"),
        "private runs": (row["private_runs"], "{}"),
    }
    texts = ["-" if value is None else form.format(value) for value, form in known.values()]
    return [row["method"], *texts]


def main():
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="take the steps that are left")
    run.add_argument("cells", nargs="+", type=Path, help="YAML files")
    local = f"local copies of {', '.join(SETS)}"
    run.add_argument("--private", nargs="*", default=[], metavar="SET=FOLDER", help=local)
    run.add_argument("--jobs", type=int, default=2, help="cells at a time")
    run.add_argument("--processes", type=int, default=1, help="of a step that shares its work")
    run.add_argument(
        "--only", nargs="+", metavar="CELL", help="of those in the files, all runs, in this order"
    )
    commands.add_parser("show", help="print the tables, and draw the plots")
    args = parser.parse_args()
    if args.command == "show":
        return show(read_rows())
    private = SETS | dict(pair.split("=", 1) for pair in args.private)
    cells = {title: cell for path in args.cells for title, cell in read_cells(path).items()}
    of_cell = {title: re.sub(r"_run\d+$", "", title) for title in cells}
    if unknown := set(args.only or ()) - {*of_cell, *of_cell.values()}:
        parser.error(f"no cell of these files: {', '.join(sorted(unknown))}")
    chosen = [t for name in args.only or of_cell for t in cells if name in (t, of_cell[t])]
    failed = 0
    with ThreadPoolExecutor(args.jobs) as pool:
        rest = (private, args.processes)
        todo = [(t, pool.submit(run_cell, t, cells[t], *rest)) for t in dict.fromkeys(chosen)]
        for title, future in todo:
            if error := future.exception():
                failed = 1
                print(f"{title}: {error}", file=sys.stderr, flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
