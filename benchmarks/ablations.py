"""One choice at a time: what it changes about classifiers of the images.

    python benchmarks/stand_in.py --num_train 6000 --turn 40 --output_dir runs/askew
    python benchmarks/ablations.py --stand_in runs/askew              # hours; resumes
    python benchmarks/ablations.py --stand_in runs/askew --axes rank  # one panel
    python benchmarks/ablations.py --show                             # only print and plot

Public digits that lie askew, bent and coarse, stand for 6,000 private ones at epsilon 10:
everything may be looked at, so no epsilon is spent. The middle of all is DP-LoRA of rank 4 from the
upright typographic digits, 24 steps of 1,000, one draw a unit (K), automatic clipping, no warm
start; each axis changes what it is named after. The rate is what the defaults choose for the plan.
Accuracy is that of two small CNNs of 400 steps, trained on 1,000 images, on 2,000 digits held out;
what they learn from the public model's images is the dashed line.

Rows are kept in benchmarks/results/ablations.json; one that is there is not made again.
"""

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "ablations.json"
RUNS = ROOT / "runs" / "ablations"
SHIPPED = ROOT / "examples" / "digits" / "base"
DIGITS, IMAGES = list("0123456789"), 1000
PUBLIC = "public model"
SHOWN = 45, 70  # accuracies, in %, of all panels that they are enough for
FIRST = ("--release_means", "--grey")


@dataclass(frozen=True)
class Point:
    """What differs from the middle.

    Attributes:
        options: of train_dp_lora.py. public_steps: of the denoiser of the base; None, the shipped.
        images: how many are drawn.
    """

    options: tuple = ()
    public_steps: int | None = None
    images: int = IMAGES


MIDDLE = Point()
STEPS, BATCH = 24, 1000
PLAN = {
    "rank": 4,
    "noise_multiplicity": 1,
    "max_train_steps": STEPS,
    "expected_batch_size": BATCH,
}


def change(**values) -> Point:
    """A point with other numbers in the plan; the middle where they are its own."""
    changed = {name: value for name, value in values.items() if PLAN[name] != value}
    return Point(tuple(word for name in changed for word in (f"--{name}", changed[name])))


FLAT = {f"flat, {c}": Point(("--clipping", "flat", "--max_grad_norm", c)) for c in (0.1, 1, 10)}
AXES: dict[str, dict[str, Point]] = {
    "rank": {f"{r}": change(rank=r) for r in (1, 2, 4, 8, 16, 32)},
    "K x steps": {
        f"{k} x {STEPS // k}": change(noise_multiplicity=k, max_train_steps=STEPS // k)
        for k in (1, 2, 4, 8)
    },
    "K, at as many steps": {f"{k}": change(noise_multiplicity=k) for k in (1, 2, 4)},
    "B, at as many passes": {
        f"{b:,}": change(expected_batch_size=b, max_train_steps=STEPS * BATCH // b)
        for b in (250, 500, 1000, 2000, 4000)
    },
    "clipping": {
        "automatic": MIDDLE,
        **FLAT,
        "per layer, 1": Point(("--clipping", "per_layer", "--max_grad_norm", 1)),
    },
    "share of matrices, by saliency": {
        **{f"{s}": Point(("--select_saliency", "--top_ratio", s)) for s in (0.1, 0.3, 0.6)},
        "attention": MIDDLE,
    },
    "share of a warm start": {
        "0": MIDDLE,
        **{f"{s}": Point((*FIRST, "--release_share", s)) for s in (0.1, 0.3, 0.6, 0.9)},
    },
    "steps of the public stage": {
        **{f"{steps}": Point(public_steps=steps) for steps in (200, 800)},
        "2,600": MIDDLE,
    },
    "number of images": {
        f"{n:,}": Point(images=n) for n in (125, 250, 500, 1000, 2000, 4000, 8000)
    },
}


def call(script: str, *arguments) -> None:
    command = list(map(str, [sys.executable, script, *arguments]))
    print("\n$ python", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def find_base(steps: int | None) -> Path:
    """The public base of a point: the shipped one, or one of fewer steps, made once."""
    if steps is None:
        return SHIPPED
    base, public = RUNS / f"base-{steps}", ROOT / "runs" / "digits" / "public"
    if not (base / "model_index.json").exists():
        if not (public / "validation.parquet").exists():  # the last that is written
            call("examples/digits/draw_public.py", "--output_dir", public)
        how = ["--denoiser_steps", steps, "--autoencoder_from", SHIPPED, "--output_dir", base]
        call("pretrain_ldm.py", "--config", "examples/digits/base.yaml", *how)
    return base


def train(point: Point, stand_in: Path, run: int, folder: Path) -> Path:
    """The adapter of a point, trained into `folder` unless it is there."""
    if not (folder / "privacy.json").exists():
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was interrupted
        plan = [word for name, value in PLAN.items() for word in (f"--{name}", value)]
        plan += ["--target_epsilon", 10, "--target_delta", 1e-4, "--num_validation_images", 0]
        data = ["--train_data_dir", stand_in, "--label_column", "label", "--seed", run]
        model = ["--pretrained_model_name_or_path", find_base(point.public_steps)]
        more = [*data, *plan, *point.options, "--output_dir", folder]
        call("train_dp_lora.py", *model, *more)
    return folder


def measure(axis: str, name: str, stand_in: Path, run: int) -> dict:
    """A row. The middle, which all axes share, is of no axis, and nor is the public model."""
    point = AXES[axis][name] if axis else MIDDLE
    title = f"{axis} {name} {run}".strip() if name else f"middle {run}"
    folder = RUNS / "".join(c if c.isalnum() or c in ".," else "-" for c in title)
    is_middle = (point.options, point.public_steps) == (MIDDLE.options, MIDDLE.public_steps)
    where = RUNS / f"middle-{run}" if is_middle else folder
    adapter = []
    if name != PUBLIC:
        adapter = ["--adapter", train(point, stand_in, run, where / "adapter")]
    shutil.rmtree(folder / "images", ignore_errors=True)
    draw = [*adapter, "--class_names", *DIGITS, "--num_images", point.images]
    draw += ["--batch_size", 100, "--seed", run, "--output_dir", folder / "images"]
    call("sample.py", "--pretrained_model_name_or_path", find_base(point.public_steps), *draw)
    judge = ["--metrics", "utility", "--classifier_steps", 400, "--classifier_seeds", 2]
    output = folder / "metrics.json"
    test = ["--test_data_dir", stand_in, "--output_file", output]
    call("evaluate.py", "--synthetic", folder / "images", *test, *judge)
    found = json.loads(output.read_text())["accuracy"]["value"]
    return {"axis": axis, "point": name, "run": run, "accuracy": found}


def read_rows() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def collect(rows: list[dict], axis: str) -> dict[str, list[float]]:
    """The accuracies in percent of each point of an axis, the middle's among them."""
    found: dict[str, list[float]] = {}
    for name, point in AXES[axis].items():
        wanted = ("", "") if point == MIDDLE else (axis, name)
        mine = [row for row in rows if (row["axis"], row["point"]) == wanted]
        if mine:
            found[name] = [100 * row["accuracy"] for row in mine]
    return found


def show(rows: list[dict]) -> None:
    """A table, and benchmarks/results/ablations.png: a panel an axis, a dot a run."""
    import matplotlib.pyplot as plt

    plt.switch_backend("Agg")
    known = [100 * row["accuracy"] for row in rows if row["point"] == PUBLIC]
    print("| what is changed | to: accuracy, % |\n| --- | --- |")
    print(f"| nothing is trained | {', '.join(f'{v:.1f}' for v in known)} |")
    figure, axes = plt.subplots(3, 3, figsize=(11, 8))
    for panel, axis in zip(axes.flat, AXES, strict=True):
        found = collect(rows, axis)
        told = [f"{n}: {', '.join(f'{v:.1f}' for v in values)}" for n, values in found.items()]
        print(f"| {axis} | {'; '.join(told)} |")
        panel.plot(list(found), [mean(values) for values in found.values()], color="#b9cde5")
        for name, values in found.items():
            colour = "#c0504d" if AXES[axis][name] == MIDDLE else "#2f5f9e"
            panel.plot([name] * len(values), values, "o", color=colour, markersize=4)
        for value in known:
            panel.axhline(value, color="#888888", linewidth=0.8, linestyle="--")
        if all(SHOWN[0] < value < SHOWN[1] for values in found.values() for value in values):
            panel.set_ylim(*SHOWN)
        panel.set_title(axis, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    axes[1][0].set_ylabel("accuracy, %; the middle in red, the public model dashed", fontsize=9)
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=130)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stand_in", type=Path, help="folder of benchmarks/stand_in.py")
    parser.add_argument("--axes", nargs="+", default=list(AXES), choices=list(AXES), metavar="AXIS")
    parser.add_argument("--runs", type=int, default=1, help="of each point")
    parser.add_argument("--show", action="store_true", help="only print and plot what there is")
    args = parser.parse_args()
    if args.stand_in is None and not args.show:
        parser.error("give --stand_in")
    for run in range(0 if args.show else args.runs):
        todo = [(a, n) for a in args.axes for n, point in AXES[a].items() if point != MIDDLE]
        for axis, name in [("", PUBLIC), ("", ""), *todo]:
            key = {"axis": axis, "point": name, "run": run}
            if any(key.items() <= row.items() for row in read_rows()):
                continue
            row = measure(axis, name, args.stand_in.resolve(), run)
            RESULTS.write_text(json.dumps([*read_rows(), row], indent=1) + "\n")
    show(read_rows())


if __name__ == "__main__":
    main()
