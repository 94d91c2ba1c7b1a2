"""Does it pay to select? DP-SAPF against training every matrix, and a random choice of them.

    python benchmarks/saliency.py --epsilons 10 --seeds 1       # digits: about 4 minutes a row
    python benchmarks/saliency.py --table                       # what there is so far

Every row is `train_dp_lora.py --config examples/digits/dp_lora.yaml` at one total epsilon,
selection included, with one seed; then 1,000 synthetic images and a classifier. Rows are appended
to benchmarks/results/saliency.json as they come, and those that are there are not made again. Draws
benchmarks/results/saliency.png: accuracy against the share of matrices kept. `make demo` (or
examples/digits/prepare_private.py) must have written runs/digits/private.
"""

import argparse
import contextlib
import importlib
import io
import json
import shutil
import sys
import time
from pathlib import Path
from statistics import mean, pstdev

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "saliency.json"
RUN = ROOT / "runs" / "saliency"
BASE = ROOT / "examples" / "digits" / "base"
PRIVATE = ROOT / "runs" / "digits" / "private"
DIGITS = ["--caption_template", "the digit {label}", "--class_names", *"0123456789"]


def row(mechanism: str, ratio: float, scope: str = "all", clipping: str = "flat") -> dict:
    return {"mechanism": mechanism, "ratio": ratio, "scope": scope, "clipping": clipping}


ROWS = [
    row("every", 1.0),
    row("squared_norm", 0.3),
    row("voting", 0.3),
    row("layer", 0.3),
    row("random", 0.3),
    row("every", 1.0, "attention"),
    row("squared_norm", 0.3, "attention"),
    row("random", 0.3, "attention"),
    row("every", 1.0, clipping="per_layer"),
    row("squared_norm", 0.3, clipping="per_layer"),
    row("random", 0.3, clipping="per_layer"),
    row("squared_norm", 0.1),
    row("squared_norm", 0.6),
]


def call(script: str, *arguments) -> str:
    """Run a script of the repository in this process; returns what it printed."""
    module, before = importlib.import_module(script), sys.argv
    sys.argv = [f"{script}.py", *map(str, arguments)]
    shown = io.StringIO()
    try:
        with contextlib.redirect_stdout(shown):
            module.main()
    finally:
        sys.argv = before
    return shown.getvalue()


def chosen(settings: dict, epsilon: float, seed: int) -> list:
    """The arguments that say what is trained."""
    if settings["mechanism"] == "every":
        selection = ["--mechanism", "random", "--top_ratio", 1.0]
    else:
        selection = ["--mechanism", settings["mechanism"], "--top_ratio", settings["ratio"]]
    return [
        *("--config", ROOT / "examples" / "digits" / "dp_lora.yaml", "--train_data_dir", PRIVATE),
        *("--pretrained_model_name_or_path", BASE, "--target_epsilon", epsilon, "--seed", seed),
        *("--select_saliency", "--scope", settings["scope"], "--clipping", settings["clipping"]),
        *("--num_validation_images", 0, *selection),
    ]


def measure(settings: dict, epsilon: float, seed: int) -> dict:
    """Select, train, sample and evaluate one row."""
    shutil.rmtree(RUN, ignore_errors=True)
    start = time.perf_counter()
    call("train_dp_lora", *chosen(settings, epsilon, seed), "--output_dir", RUN / "adapter")
    seconds = time.perf_counter() - start
    call(
        "evaluate", "--synthetic_dir", RUN / "images", "--test_data_dir", PRIVATE,
        "--pretrained_model_name_or_path", BASE, "--adapter", RUN / "adapter", *DIGITS,
        "--num_images", 1000, "--num_inference_steps", 12, "--batch_size", 100,
        "--classifier_steps", 300, "--classifier_seeds", 2,
    )  # fmt: skip
    statement = json.loads((RUN / "adapter" / "privacy.json").read_text())
    saliency = json.loads((RUN / "adapter" / "selection" / "saliency.json").read_text())
    accuracy = json.loads((RUN / "images" / "metrics.json").read_text())["accuracy"]
    return {
        "set": "digits",
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


def known() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def grouped(results: list[dict]) -> dict[tuple, list[float]]:
    """Accuracies over the seeds, by everything else."""
    groups: dict[tuple, list[float]] = {}
    for r in results:
        key = (r["target_epsilon"], r["scope"], r["clipping"], r["mechanism"], r["ratio"])
        groups.setdefault(key, []).append(100 * r["accuracy"])
    return groups


def print_table(results: list[dict]) -> None:
    print("| epsilon | scope | clipping | mechanism | kept | accuracy | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for (epsilon, scope, clipping, mechanism, ratio), values in sorted(grouped(results).items()):
        print(
            f"| {epsilon:g} | {scope} | {clipping} | {mechanism} | {ratio:.0%} | "
            f"{mean(values):.1f} +- {pstdev(values):.1f} % | {len(values)} |"
        )


def draw(results: list[dict]) -> None:
    groups = grouped(results)
    epsilons = sorted({key[0] for key in groups})
    size = (5 * len(epsilons), 4)
    figure, axes = plt.subplots(1, len(epsilons), figsize=size, squeeze=False, layout="constrained")
    for axis, epsilon in zip(axes[0], epsilons, strict=True):
        for line in sorted({key[1:4] for key in groups if key[0] == epsilon}):
            points = sorted(
                (k[4], v) for k, v in groups.items() if (k[0], *k[1:4]) == (epsilon, *line)
            )
            axis.errorbar(
                [ratio for ratio, _ in points],
                [mean(values) for _, values in points],
                [pstdev(values) for _, values in points],
                marker="o",
                capsize=3,
                label=", ".join(line),
            )
        axis.set(
            xlabel="share of matrices kept", ylabel="accuracy, %", title=f"epsilon {epsilon:g}"
        )
        axis.legend(frameon=False, fontsize=7)
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epsilons", type=float, nargs="+", default=[1.0, 10.0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only show what there is")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))  # the repository's evaluate.py, not the library
    for seed in range(0 if args.table else args.seeds):
        for epsilon in args.epsilons:
            for settings in ROWS:
                wanted = {"target_epsilon": epsilon, "seed": seed, **settings}
                if any(wanted.items() <= result.items() for result in known()):
                    continue
                result = measure(settings, epsilon, seed)
                RESULTS.parent.mkdir(parents=True, exist_ok=True)
                RESULTS.write_text(json.dumps([*known(), result], indent=1) + "\n")
                print(json.dumps(result), flush=True)
    if known():
        print_table(known())
        draw(known())


if __name__ == "__main__":
    main()
