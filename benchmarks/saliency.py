"""Does it pay to select? DP-SAPF against training every matrix, and a random choice of them.

    python benchmarks/saliency.py --epsilons 10 --seeds 1       # digits: about 2 minutes a row
    python benchmarks/saliency.py --set mnist --dataset_name ylecun/mnist --seeds 1    # 10 a row
    python benchmarks/saliency.py --table                       # what there is so far

Every row is train_dp_lora.py at one total epsilon, selection included, with one seed; then
synthetic images and a classifier. The runs are short: `digits` is examples/digits/dp_lora.yaml
with B 700 instead of 1,400 and two draws a unit instead of four, and 500 images; `mnist` is
examples/mnist/dp_lora.yaml with 20 steps of 1,000 instead of 120 of 3,000, where 3,000 images are
ranked on, and 10,000 images.

Rows are appended to benchmarks/results/saliency.json as they come, and those that are there are not
made again; several processes may share the work if each has its own set or epsilon. Draws
benchmarks/results/saliency.png: accuracy against the share of matrices kept. The digits need
runs/digits/private, which `make demo` or examples/digits/prepare_private.py writes.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, pstdev

import matplotlib
from filelock import FileLock

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "saliency.json"
BASE = ROOT / "examples" / "digits" / "base"
DIGITS = ROOT / "runs" / "digits" / "private"
CLASSES = ["--caption_template", "the digit {label}", "--class_names", *"0123456789"]


def row(
    mechanism: str,
    ratio: float,
    scope: str = "all",
    clipping: str = "flat",
    normalise: str = "none",
) -> dict:
    return {
        "mechanism": mechanism,
        "ratio": ratio,
        "scope": scope,
        "clipping": clipping,
        "normalise": normalise,
    }


ROWS = {
    "digits": [
        row("every", 1.0),
        row("squared_norm", 0.3),
        row("voting", 0.3),
        row("random", 0.3),
        row("every", 1.0, "attention"),
        row("squared_norm", 0.3, "attention"),
        row("every", 1.0, clipping="per_layer"),
        row("squared_norm", 0.3, clipping="per_layer"),
        row("layer", 0.3),
        row("squared_norm", 0.3, normalise="per_parameter"),
    ],
    "mnist": [row("every", 1.0), row("squared_norm", 0.3), row("random", 0.3)],
}

RATIOS = [row("squared_norm", 0.1), row("squared_norm", 0.6)]  # digits, first seed: for the plot

# Marker of a mechanism, and how far aside it is drawn: all are at 30 %.
ASIDE = {"voting": ("s", -0.025), "layer": ("^", 0.025), "random": ("x", 0.05)}

COLOURS: dict[str, int] = {}


def call(script: str, *arguments) -> None:
    """Run a script of the repository."""
    command = [sys.executable, ROOT / f"{script}.py", *arguments]
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def chosen(args, settings: dict, epsilon: float, seed: int) -> list:
    """The arguments that say what is trained, and on what."""
    if args.set == "digits":
        recipe = ["--train_data_dir", DIGITS, "--noise_multiplicity", 2]
        recipe += ["--expected_batch_size", 700, "--train_batch_size", 64]
    else:
        recipe = ["--dataset_name", args.dataset_name, "--learning_rate", 6e-3]
        recipe += ["--expected_batch_size", 1000, "--max_train_steps", 20, "--sampling_rate", 0.05]
    if settings["mechanism"] == "every":
        selection = ["--mechanism", "random", "--top_ratio", 1.0]
    else:
        selection = ["--mechanism", settings["mechanism"], "--top_ratio", settings["ratio"]]
    return [
        *("--config", ROOT / "examples" / args.set / "dp_lora.yaml", *recipe),
        *("--pretrained_model_name_or_path", BASE, "--target_epsilon", epsilon, "--seed", seed),
        *("--select_saliency", "--scope", settings["scope"], "--clipping", settings["clipping"]),
        *("--normalise", settings["normalise"]),
        *("--num_validation_images", 0, *selection),
        *("--latents_dir", ROOT / "runs" / "saliency_latents"),
    ]


def measure(args, settings: dict, epsilon: float, seed: int) -> dict:
    """Select, train, sample and evaluate one row."""
    run = ROOT / "runs" / f"saliency_{args.set}_{epsilon:g}"
    shutil.rmtree(run, ignore_errors=True)
    start = time.perf_counter()
    call("train_dp_lora", *chosen(args, settings, epsilon, seed), "--output_dir", run / "adapter")
    seconds = time.perf_counter() - start
    test = ["--test_data_dir", DIGITS] if args.set == "digits" else []
    test += ["--test_dataset_name", args.dataset_name] if args.set == "mnist" else []
    call(
        "evaluate", "--synthetic", run / "images", *test, *CLASSES,
        "--pretrained_model_name_or_path", BASE, "--adapter", run / "adapter",
        *(("--num_images", 500, "--num_inference_steps", 8) if args.set == "digits" else
          ("--num_images", 10000, "--num_inference_steps", 6)),
        "--batch_size", 100, "--metrics", "utility",
        "--classifier_steps", 300, "--classifier_seeds", 2,
    )  # fmt: skip
    statement = json.loads((run / "adapter" / "privacy.json").read_text())
    saliency = json.loads((run / "adapter" / "selection" / "saliency.json").read_text())
    accuracy = json.loads((run / "images" / "metrics.json").read_text())["accuracy"]
    return {
        "set": args.set,
        "target_epsilon": epsilon,
        "seed": seed,
        **settings,
        "epsilon": statement["epsilon"]["add_or_remove_one"],
        "noise_multiplier": statement["events"][-1]["noise_multiplier"],
        "selected": len(saliency["selected"]),
        "candidates": len(saliency["candidates"]),
        "accuracy": accuracy["value"],
        "train_seconds": seconds,
    }


def append(result: dict) -> None:
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(RESULTS.with_suffix(".lock")):
        RESULTS.write_text(json.dumps([*known(), result], indent=1) + "\n")


def known() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def grouped(results: list[dict]) -> dict[tuple, list[float]]:
    """Accuracies in percent over the seeds, by everything else."""
    groups: dict[tuple, list[float]] = {}
    for r in results:
        key = tuple(r[k] for k in ("set", "target_epsilon", *ROWS["mnist"][0]))
        groups.setdefault(key, []).append(100 * r["accuracy"])
    return groups


def print_table(results: list[dict]) -> None:
    """One line a way to select, one column an epsilon."""
    groups = grouped(results)
    for name in ROWS:
        epsilons = sorted({key[1] for key in groups if key[0] == name})
        ways = [tuple(settings.values()) for settings in ROWS[name]]
        ways += [tuple(settings.values()) for settings in RATIOS if name == "digits"]
        print(f"\n{name}: accuracy in %, mean and standard deviation over seeds\n")
        print("| selected by | kept | scope | clipping | normalised |", end="")
        print("".join(f" epsilon {epsilon:g} |" for epsilon in epsilons))
        print("| --- " * (5 + len(epsilons)) + "|")
        for way in ways:
            cells = [groups.get((name, epsilon, *way), []) for epsilon in epsilons]
            shown = [f"{mean(c):.1f} +- {pstdev(c):.1f} ({len(c)})" if c else "-" for c in cells]
            mechanism, ratio, *rest = way
            print(f"| {' | '.join([mechanism, f'{ratio:.0%}', *rest, *shown])} |")


def draw(results: list[dict]) -> None:
    groups = grouped(results)
    panels = sorted({key[:2] for key in groups})
    size = (10, 4.5 * -(-len(panels) // 2))
    figure, axes = plt.subplots(
        -(-len(panels) // 2), 2, figsize=size, squeeze=False, layout="constrained"
    )
    for axis, (name, epsilon) in zip(axes.flat, panels, strict=False):
        here = {k[2:]: v for k, v in groups.items() if k[:2] == (name, epsilon)}
        ranked = {k: v for k, v in here.items() if k[0] in ("every", "squared_norm")}
        for rest in sorted({k[2:] for k in ranked}):
            curve = sorted((k[1], v) for k, v in ranked.items() if k[2:] == rest)
            scope, clipping, normalise = rest
            label = f"squared norm, {scope}, {clipping} clipping"
            label += ", by parameter" if normalise == "per_parameter" else ""
            _points(axis, curve, label, "-", "o")
        for (mechanism, ratio, *_), values in here.items():
            if mechanism in ("voting", "layer", "random"):
                marker, aside = ASIDE[mechanism]
                _points(axis, [(ratio + aside, values)], mechanism, "none", marker)
        axis.set(xlabel="share of matrices kept", ylabel="accuracy, %")
        axis.set(title=f"{name}, epsilon {epsilon:g}", xlim=(0, 1.05))
    names = {}
    for axis in axes.flat:
        names |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(names.values(), names, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    plt.close(figure)


def _points(axis, curve: list[tuple], label: str, line: str, marker: str) -> None:
    """Mean and standard deviation over the seeds; a label has one colour in all panels."""
    colour = f"C{COLOURS.setdefault(label, len(COLOURS))}"
    ratios, values = zip(*curve, strict=True)
    means, spreads = [mean(v) for v in values], [pstdev(v) for v in values]
    axis.errorbar(
        ratios, means, spreads, ls=line, marker=marker, capsize=3, label=label, color=colour
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=list(ROWS), default="digits")
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="MNIST: Hub id or folder")
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only show what there is")
    args = parser.parse_args()
    for seed in range(0 if args.table else args.seeds):
        for epsilon in args.epsilons:
            more = RATIOS if args.set == "digits" and seed == 0 else []
            for settings in ROWS[args.set] + more:
                wanted = {"set": args.set, "target_epsilon": epsilon, "seed": seed, **settings}
                if any(wanted.items() <= result.items() for result in known()):
                    continue
                append(measure(args, settings, epsilon, seed))
                print(json.dumps(known()[-1]), flush=True)
    if known():
        print_table(known())
        draw(known())


if __name__ == "__main__":
    main()
