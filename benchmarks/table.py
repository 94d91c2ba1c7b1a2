"""The table of a paper: private generators, what one would otherwise pick, and the ceilings.

    python benchmarks/table.py --dataset_name ylecun/mnist            # about an hour and a half
    python benchmarks/table.py --dataset_name FOLDER --methods dp-merf dp-mepf
    python benchmarks/table.py --table                                # only print what there is

MNIST, from the digits model of examples/digits, epsilon 10, delta 1e-5. Every synthetic set has
10,000 images; `accuracy` is that of three small CNNs trained on it and tested on all real test
images. Rows are kept in benchmarks/results/table.json; a row that is there is not made again.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "table.json"
RUNS = ROOT / "runs" / "table"
DELTA = 1e-5
BUDGET = ["--target_epsilon", 10, "--target_delta", DELTA]
RECIPE = ["--config", "examples/mnist/dp_lora.yaml"]
DRAW = ["--pretrained_model_name_or_path", "examples/digits/base", "--class_names", *"0123456789"]
DRAW += ["--caption_template", "the digit {label}", "--num_images", 10_000]
METHODS = [
    *("public-model", "dp-merf", "dp-mepf", "dp-lora", "dp-sgd-classifier"),
    *("nonprivate-lora", "nonprivate-classifier"),
]


def call(script: str, *arguments) -> str:
    """Run a script of the repository; returns what it printed."""
    command = list(map(str, [sys.executable, script, *arguments]))
    print("\n$ python", *command[1:], flush=True)
    run = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return run.stdout


def train(method: str, dataset: str, folder: Path) -> tuple[Path | None, int | None]:
    """Train a generator; its adapter, and how many weights it has, where there are such."""
    if method in ("dp-merf", "dp-mepf"):
        features = "random_features" if method == "dp-merf" else "perceptual_features"
        what = ["--release", features, "--grey", "--num_synthetic_images", 10_000]
        data = ["--dataset_name", dataset, "--label_column", "label", "--output_dir", folder]
        call("release_means.py", *data, *BUDGET, *what)
        (folder / "set").rename(folder / "images")
        return None, None
    if method == "public-model":
        return None, 0
    adapter = folder / "adapter"
    data = [*RECIPE, "--dataset_name", dataset, "--output_dir", adapter]
    if method == "dp-lora":
        call("train_dp_lora.py", *data)
    else:  # an ordinary run: small batches, one pass over the data
        ordinary = ["--train_batch_size", 64, "--max_train_steps", 900, "--learning_rate", 1e-3]
        call("benchmarks/nonprivate_lora.py", *data, *ordinary)
    return adapter, trained_weights(adapter)


def trained_weights(adapter: Path) -> int:
    from safetensors import safe_open

    with safe_open(adapter / "pytorch_lora_weights.safetensors", "pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())


def measure_generator(method: str, dataset: str) -> dict:
    folder = RUNS / method
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    adapter, weights = train(method, dataset, folder)
    seconds = time.perf_counter() - start
    arguments = ["--synthetic", folder / "images", "--test_dataset_name", dataset]
    arguments += ["--metrics", "utility"]
    if method not in ("dp-merf", "dp-mepf"):
        arguments += DRAW + (["--adapter", adapter] if adapter else [])
    call("evaluate.py", *arguments)
    results = json.loads((folder / "images" / "metrics.json").read_text())
    accuracy, epsilon = results["accuracy"], results.get("epsilon")
    return {
        "epsilon": epsilon and epsilon["value"],
        "accuracy_mean": accuracy["value"],
        "accuracy_std": accuracy["std"],
        "seeds": accuracy["classifier_seeds"],
        "train_seconds": seconds,
        "trainable_parameters": weights,
    }


def measure_dp_sgd_classifier(dataset: str, seeds: int = 3) -> dict:
    """Each seed is a run of its own, with the whole budget."""
    where = ["--dataset_name", dataset, *BUDGET, "--json"]
    runs = [
        json.loads(call("benchmarks/dp_sgd_classifier.py", *where, "--seed", s).splitlines()[-1])
        for s in range(seeds)
    ]
    accuracies = [run["accuracy"] for run in runs]
    mean = sum(accuracies) / seeds
    return {
        "epsilon": runs[0]["epsilon"]["add_or_remove_one"],
        "accuracy_mean": mean,
        "accuracy_std": (sum((a - mean) ** 2 for a in accuracies) / seeds) ** 0.5,
        "seeds": seeds,
        "train_seconds": sum(run["train_seconds"] for run in runs) / seeds,
        "trainable_parameters": runs[0]["trainable_parameters"],
    }


def measure_real_images(dataset: str) -> dict:
    """The same classifiers, trained on the private images: no privacy."""
    output = RUNS / "nonprivate-classifier.json"
    start = time.perf_counter()
    where = ["--synthetic", dataset, "--test_dataset_name", dataset, "--metrics", "utility"]
    call("evaluate.py", *where, "--output_file", output)
    accuracy = json.loads(output.read_text())["accuracy"]
    return {
        "epsilon": None,
        "accuracy_mean": accuracy["value"],
        "accuracy_std": accuracy["std"],
        "seeds": accuracy["classifier_seeds"],
        "train_seconds": time.perf_counter() - start,
        "trainable_parameters": None,
    }


def known() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def print_table(rows: list[dict]) -> None:
    print("| method | accuracy, % | epsilon | trained weights | seconds |")
    print("| --- | --- | --- | --- | --- |")
    for row in sorted(rows, key=lambda row: METHODS.index(row["method"])):
        accuracy = f"{100 * row['accuracy_mean']:.1f} +- {100 * row['accuracy_std']:.1f}"
        epsilon = "none" if row["epsilon"] is None else f"{row['epsilon']:.3g}"
        weights = "-" if row["trainable_parameters"] is None else f"{row['trainable_parameters']:,}"
        seconds = f"{row['train_seconds']:.0f}"
        print(f"| {row['method']} | {accuracy} | {epsilon} | {weights} | {seconds} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="Hub id or folder")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--table", action="store_true", help="only print what there is")
    args = parser.parse_args()
    for method in [] if args.table else args.methods:
        if any(row["method"] == method for row in known()):
            continue
        if method == "dp-sgd-classifier":
            row = measure_dp_sgd_classifier(args.dataset_name)
        elif method == "nonprivate-classifier":
            row = measure_real_images(args.dataset_name)
        else:
            row = measure_generator(method, args.dataset_name)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        rows = [*known(), {"set": "mnist", "method": method, "delta": DELTA, **row}]
        RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print(json.dumps(rows[-1]), flush=True)
    print_table(known())


if __name__ == "__main__":
    main()
