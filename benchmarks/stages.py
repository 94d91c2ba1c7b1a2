"""Does each stage pay? Means alone, DP-LoRA alone, and both, each before and after a vote.

    python benchmarks/stages.py --set digits --dataset_name FOLDER --seeds 3   # minutes a seed
    python benchmarks/stages.py --set mnist --dataset_name FOLDER --epsilons 1 10
    python benchmarks/stages.py --set fashion_mnist --dataset_name FOLDER --methods means both
    python benchmarks/stages.py --set digits --dataset_name FOLDER --methods evolution --no_vote
    python benchmarks/stages.py --table                                        # only print and plot

A generator spends nine tenths of epsilon, and the vote brings the total to epsilon. With
`--no_vote` it spends epsilon, and nothing votes after it. `evolution` is Private Evolution: rounds
of votes on images of the public model, which are varied in between, and no training; it is its own
vote. `accuracy` is that of small CNNs that were
trained on the synthetic images, before the vote all of them, after it the better half, and tested
on real ones that nothing was trained on. Rows are kept in benchmarks/results/stages.json; a row
that is there is not made again.
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
RESULTS = ROOT / "benchmarks" / "results" / "stages.json"
METHODS = ["means", "dp-lora", "both", "evolution"]
ROUNDS = 4  # of votes, of Private Evolution
SHARE = 0.9  # of epsilon, before a vote
KINDS = [(1, False), (SHARE, False), (SHARE, True)]  # the generator's share; did units vote?
COLOURS = ["#8a8a8a", "#b9cde5", "#2f5f9e"]
EXTRACTOR = ["--extractor", "classifier", "--classifier_weights"]


DIGITS = list("0123456789")
CLOTHES = ["T - shirt / top", "Trouser", "Pullover", "Dress", "Coat"]
CLOTHES += ["Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@dataclass(frozen=True)
class Cell:
    """A private set, how it is trained on, and how much is drawn.

    Attributes:
        alone, both: recipes of DP-LoRA, without and with a warm start; and options beside them.
        base, classes, template: what is drawn. num_images: so many, before the vote.
        extractor: weights of the network in whose features units vote.
        data, test: the options that name a set of this kind.
    """

    alone: list
    both: list
    base: str
    classes: list
    template: str
    num_images: int
    extractor: str
    data: str = "--dataset_name"
    test: str = "--test_dataset_name"


# Of the recipes' 120 steps, what fits into minutes; a larger rate where there is no warm start.
QUICK = ["--max_train_steps", 15]
FIRST = ["--grey", "--generator_steps", 600, "--warm_start_steps", 300]
LARGE = {
    name: Cell(
        [f"examples/{name}/dp_lora.yaml", *QUICK, "--learning_rate", 6e-3],
        [f"examples/{name}/dp_lora.yaml", *QUICK, *FIRST, "--learning_rate", 2e-3],
        base,
        classes,
        template,
        4000,
        extractor,
    )
    for name, base, classes, template, extractor in (
        (
            "mnist",
            "examples/digits/base",
            DIGITS,
            "the digit {label}",
            "examples/digits/extractor.safetensors",
        ),
        (
            "fashion_mnist",
            "examples/fashion_mnist/base",
            CLOTHES,
            "a grey picture of a {label}",
            "runs/fashion_mnist/extractor.safetensors",
        ),
    )
}
SETS = LARGE | {
    "digits": Cell(
        ["examples/digits/dp_lora.yaml"],
        ["examples/digits/warm_start/dp_lora.yaml"],
        "examples/digits/base",
        DIGITS,
        "the digit {label}",
        1000,
        "examples/digits/extractor.safetensors",
        "--train_data_dir",
        "--test_data_dir",
    )
}


def call(script: str, *arguments) -> None:
    command = list(map(str, [sys.executable, script, *arguments]))
    print("\n$ python", *command[1:], flush=True)
    subprocess.run(command, cwd=ROOT, check=True)


def generate(
    cell: Cell, method: str, dataset: str, epsilon: float, seed: int, folder: Path
) -> Path:
    """A synthetic set of `method` for `epsilon`; its folder."""
    where = [cell.data, dataset, "--target_epsilon", epsilon, "--seed", seed, "--output_dir"]
    if method == "means":
        more = ["--num_synthetic_images", cell.num_images]
        call("release_means.py", "--config", *cell.both, *where, folder / "means", *more)
        return folder / "means" / "set"
    draw = ["--class_names", *cell.classes, "--caption_template", cell.template, "--seed", seed]
    draw += ["--num_images", cell.num_images, "--batch_size", 100]
    model = ["--pretrained_model_name_or_path", cell.base]
    if method == "evolution":
        call("sample.py", *model, *draw, "--output_dir", folder / "start")
        how = ["--config", *cell.alone, *where, folder / "evolved", "--synthetic", folder / "start"]
        call("curate.py", *how, *EXTRACTOR, cell.extractor, "--rounds", ROUNDS)
        return folder / "evolved" / "set"
    recipe = cell.alone if method == "dp-lora" else [*cell.both, "--release_means"]
    call("train_dp_lora.py", "--config", *recipe, *where, folder / "adapter")
    adapter = ["--adapter", folder / "adapter"]
    call("sample.py", *model, *adapter, *draw, "--output_dir", folder / "images")
    return folder / "images"


def measure(cell: Cell, images: Path, dataset: str, output: Path) -> dict:
    """Accuracy, and the verified epsilon, of a set."""
    where = ["--synthetic", images, cell.test, dataset, "--metrics", "utility"]
    how = ["--classifier_steps", 400, "--classifier_seeds", 2, "--output_file", output]
    call("evaluate.py", *where, *how)
    found = json.loads(output.read_text())
    accuracy, epsilon = found["accuracy"], found["epsilon"]
    count = len(list(images.glob("0*.png")))
    return {
        "epsilon": epsilon["value"],
        "delta": epsilon["delta"],
        "num_images": count,
        "accuracy_mean": accuracy["value"],
        "accuracy_std": accuracy["std"],
    }


def measure_cell(
    name: str, method: str, dataset: str, epsilon: float, seed: int, share: float
) -> list[dict]:
    """A row before the vote; if the generator's share of epsilon leaves any, one after it."""
    cell = SETS[name]
    folder = ROOT / "runs" / "stages" / f"{name}-{method}-{epsilon:g}-{seed}-{share:g}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    about = {"set": name, "method": method, "budget": epsilon, "seed": seed, "share": share}
    images = generate(cell, method, dataset, share * epsilon, seed, folder)
    before = measure(cell, images, dataset, folder / "before.json")
    rows = [about | {"vote": False, **before}]
    if share == 1:
        return rows
    vote = ["--synthetic", images, cell.data, dataset, "--target_epsilon", epsilon]
    vote += ["--config", *cell.alone, *EXTRACTOR, cell.extractor]
    call("curate.py", *vote, "--output_dir", folder / "curated")
    after = measure(cell, folder / "curated" / "set", dataset, folder / "after.json")
    return [*rows, about | {"vote": True, **after}]


def read_rows() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def select(rows: list[dict], share: float, vote: bool) -> list[float]:
    """Accuracies in percent."""
    kept = [r for r in rows if (r["share"], r["vote"]) == (share, vote)]
    return [100 * r["accuracy_mean"] for r in kept]


def print_table(rows: list[dict]) -> None:
    """Means over the seeds of a cell, and a plot."""
    print("| set | epsilon | method | no vote, % | before the vote, % | after it, % | seeds |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    keys = sorted({(r["set"], r["budget"], METHODS.index(r["method"])) for r in rows})
    for name, budget, number in keys:
        cell = [r for r in rows if (r["set"], r["budget"]) == (name, budget)]
        cell = [r for r in cell if r["method"] == METHODS[number]]
        cells = []
        for share, vote in KINDS:
            found = select(cell, share, vote)
            each = f" ({', '.join(f'{value:.1f}' for value in found)})" if len(found) > 1 else ""
            cells.append(f"{mean(found):.1f}{each}" if found else "not run")
        seeds = len({r["seed"] for r in cell})
        print(f"| {name} | {budget:g} | {METHODS[number]} | {' | '.join(cells)} | {seeds} |")
    plot(rows, keys)


def plot(rows: list[dict], keys: list[tuple]) -> None:
    """benchmarks/results/stages.png: a panel a set and budget; a bar a method and kind."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = sorted({(name, budget) for name, budget, _ in keys})
    figure, axes = plt.subplots(
        1, len(panels), figsize=(2.2 * len(panels), 3), sharey=True, squeeze=False
    )
    for axis, (name, budget) in zip(axes[0], panels, strict=True):
        for number, method in enumerate(METHODS):
            cell = [
                r for r in rows if (r["set"], r["budget"], r["method"]) == (name, budget, method)
            ]
            for kind, colour, at in zip(KINDS, COLOURS, (-0.27, 0, 0.27), strict=True):
                found = select(cell, *kind)
                if found:
                    axis.bar(number + at, mean(found), 0.25, color=colour)
                    axis.plot([number + at] * len(found), found, "k.", markersize=3)
        axis.set_title(f"{name.replace('_', '-')}\nepsilon {budget:g}", fontsize=9)
        axis.set_xticks(range(len(METHODS)), METHODS, fontsize=8, rotation=30)
        axis.set_ylim(0, 100)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("accuracy, %: no vote (grey), before it, after", fontsize=8)
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=list(SETS), help="the private set")
    parser.add_argument("--dataset_name", help="Hub id or folder of it")
    parser.add_argument("--methods", nargs="+", default=METHODS[:3], choices=METHODS)
    parser.add_argument("--epsilons", nargs="+", type=float, default=[1.0, 10.0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--no_vote", action="store_true", help="all of epsilon to the generator")
    parser.add_argument("--table", action="store_true", help="only print and plot what there is")
    args = parser.parse_args()
    share = 1 if args.no_vote else SHARE
    if "evolution" in args.methods and not args.no_vote:
        parser.error("evolution is its own vote: give --no_vote")
    wanted = [(e, m, s) for s in range(args.seeds) for e in args.epsilons for m in args.methods]
    for epsilon, method, seed in [] if args.table else wanted:
        key = {"set": args.set, "method": method, "budget": epsilon, "seed": seed, "share": share}
        if any(key.items() <= r.items() for r in read_rows()):
            continue
        found = measure_cell(args.set, method, args.dataset_name, epsilon, seed, share)
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps([*read_rows(), *found], indent=1) + "\n")
    print_table(read_rows())


if __name__ == "__main__":
    main()
