"""Are synthetic images good, useful, and does any of them give someone away?

    # fidelity and utility, against held-out real images
    python evaluate.py --synthetic runs/digits/synthetic --test_data_dir runs/digits/private

    # memorisation too: what the adapter was trained on, against what it never saw
    python evaluate.py --synthetic runs/digits/synthetic --test_data_dir runs/digits/private \\
        --private_data_dir runs/digits/private

    # a published set; on a Hub dataset; in a table and a plot with other runs
    python evaluate.py --synthetic user/synthetic-scans --test_dataset_name user/scans \\
        --compare runs/other/metrics.json

    # an adapter of any kind: its images are drawn into --synthetic first
    python evaluate.py --pretrained_model_name_or_path examples/digits/base \\
        --adapter runs/digits/loda --class_names 0 1 2 3 4 5 6 7 8 9 \\
        --caption_template "the digit {label}" --num_images 1000 \\
        --synthetic runs/digits/loda_images --test_data_dir runs/digits/private

Writes metrics.json, report.html beside it, and pictures of the closest private images into private/
beside them. What read private images says so (covered_by_epsilon: false): publish it only if those
images may be used that way.
"""

import sys
from pathlib import Path

# This script shares its name with the library that its metric modules use: look for that first.
sys.path.sort(key=lambda entry: Path(entry).resolve() == Path(__file__).resolve().parent)

import json  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402

import torch  # noqa: E402
from accelerate import PartialState  # noqa: E402
from datasets import Dataset  # noqa: E402

from utils.arguments import ModelArguments, option, parse  # noqa: E402
from utils.classifiers import CLASSIFIERS  # noqa: E402
from utils.data import keep_readable, labels_of, load_rows, pixel_batches  # noqa: E402
from utils.errors import UsageError, run_script  # noqa: E402
from utils.features import ExtractorArguments, build_extractor, extract  # noqa: E402
from utils.fidelity import NEIGHBOURS, fidelity  # noqa: E402
from utils.generation import SamplingArguments, draw_folder, prepare_drawing  # noqa: E402
from utils.hub import write_durably  # noqa: E402
from utils.memorisation import entries_of, save_pairs, spaces_of  # noqa: E402
from utils.report import Page, grid_of, number_of, read_runs, write_report  # noqa: E402
from utils.synthetic_sets import privacy_of  # noqa: E402
from utils.utility import LabelledImages, downstream_accuracy  # noqa: E402

METRICS = ["fidelity", "utility", "memorisation"]


@dataclass
class EvaluateArguments:
    """The sets, and what is asked of them."""

    synthetic: str = option("synthetic set: a folder that sample.py left, or a Hub id")
    synthetic_revision: str | None = option("revision of a synthetic set on the Hub", None)
    test_dataset_name: str | None = option(
        "real images that nothing was trained on: Hub id or folder of parquet files", None
    )
    test_data_dir: str | None = option("the same: image folder, instead", None)
    test_split: str = option("split of those", "test")
    test_is_public: bool = option("those may be shown, and numbers about them published", False)
    private_dataset_name: str | None = option(
        "what the adapter was trained on, for memorisation: Hub id or folder of parquet files", None
    )
    private_data_dir: str | None = option("the same: image folder, instead", None)
    private_split: str = option("split of those", "train")
    image_column: str = option("column of the images, in all sets", "image")
    label_column: str = option("column of the labels, for utility", "label")
    metrics: list[str] | None = option(
        f"which of {', '.join(METRICS)}; default: all that the sets allow", None
    )
    evaluation_resolution: int = option("classifiers and neighbours see this many pixels", 32)
    classifiers: list[str] = option(f"any of {', '.join(CLASSIFIERS)}", ["cnn"])
    classifier_seeds: int = option("classifiers trained of each, each with another seed", 3)
    classifier_steps: int = option("optimizer steps of a classifier, 128 images each", 600)
    train_on_real: bool = option(
        "for reference, also train the classifiers on the private images", False
    )
    compare: list[str] | None = option("metrics.json of other runs, for the report", None)
    output_file: str | None = option(
        "default: metrics.json in the folder that sample.py left, or else in runs/NAME", None
    )

    def __post_init__(self):
        for name, known in (("metrics", METRICS), ("classifiers", list(CLASSIFIERS))):
            unknown = sorted(set(getattr(self, name) or []) - set(known))
            if unknown:
                there = ", ".join(known)
                raise UsageError(f"--{name} {' '.join(unknown)}: unknown; there are: {there}")
        if self.has_private and self.test_source == self.private_source:
            raise UsageError("the held-out images and the private ones are the same set")
        if self.classifier_seeds < 1 or self.classifier_steps < 1 or not self.classifiers:
            raise UsageError("--classifier_seeds and --classifier_steps must be at least 1")
        if not self.has_private and (self.train_on_real or "memorisation" in (self.metrics or [])):
            raise UsageError(
                "memorisation and --train_on_real need the images that the adapter was trained on: "
                "give --private_dataset_name or --private_data_dir"
            )

    @property
    def has_private(self) -> bool:
        return self.private_dataset_name is not None or self.private_data_dir is not None

    @property
    def test_source(self) -> tuple:
        """Arguments of `load_rows`."""
        return (self.test_dataset_name, None, self.test_data_dir, self.test_split)

    @property
    def private_source(self) -> tuple:
        return (self.private_dataset_name, None, self.private_data_dir, self.private_split)


@dataclass
class DrawFirst(ModelArguments):
    """Draw the synthetic set first: the public pipeline, with the options of sample.py."""

    pretrained_model_name_or_path: str | None = option(
        "draw the images into --synthetic with this pipeline first; default: they are there",
        None,
    )


def load_sets(args: EvaluateArguments, cache: str) -> dict[str, Dataset]:
    """The readable rows of the synthetic, the real, and (if named) the private set."""
    sets = {
        "synthetic": load_rows(args.synthetic, None, None, "train", cache, args.synthetic_revision),
        "real": load_rows(*args.test_source, cache),
    }
    if args.has_private:
        sets["private"] = load_rows(*args.private_source, cache)
    return {name: keep_readable(rows, args.image_column)[0] for name, rows in sets.items()}


def chosen_metrics(args: EvaluateArguments, sets: dict[str, Dataset]) -> list[str]:
    """What was asked for, or else all that is possible.

    Raises:
        UsageError: it was asked for, and there are too few images.
    """
    labelled = all(args.label_column in sets[name].column_names for name in ("synthetic", "real"))
    many = min(map(len, sets.values())) > NEIGHBOURS
    possible = {"fidelity": many, "utility": labelled, "memorisation": args.has_private and many}
    if not many and {"fidelity", "memorisation"} & set(args.metrics or []):
        raise UsageError(
            f"fidelity and memorisation need more than {NEIGHBOURS} images in each set"
        )
    return args.metrics or [metric for metric in METRICS if possible[metric]]


def look_at(sets: dict[str, Dataset], metrics: list[str], args, extractor, state: PartialState):
    """What the metrics see of each set: through the extractor, and as pixels."""
    reads_private = "memorisation" in metrics
    seen, pixels = {}, {}
    if "fidelity" in metrics or reads_private:
        network = build_extractor(extractor, state.device)
        for name, rows in sets.items():
            if name != "private" or reads_private:
                seen[name] = extract(rows, args.image_column, network, state, name)
    for name, rows in sets.items():
        if "utility" in metrics or reads_private:
            batches = pixel_batches(rows, args.image_column, args.evaluation_resolution, 256)
            pixels[name] = torch.cat(list(batches))
    return seen, pixels


def measure_utility(sets: dict[str, Dataset], pixels, args, covered, state) -> dict[str, dict]:
    """Accuracy of classifiers trained on the synthetic, and perhaps on the private, images."""
    images = {
        name: LabelledImages(pixels[name], list(labels_of(rows, args.label_column)))
        for name, rows in sets.items()
        if name != "private" or args.train_on_real
    }
    setting = (args.classifiers, args.classifier_steps, args.classifier_seeds, state)
    entries = {}
    for name, metric in (("synthetic", "accuracy"), ("private", "accuracy_of_real")):
        if name in images:
            counted = {"covered_by_epsilon": covered and name == "synthetic"}
            counted[f"num_{name}"] = len(images[name])
            found = downstream_accuracy(images[name], images["real"], *setting)
            entries[metric] = {**found, **counted}
    return entries


def main():
    args, extractor, model, sampling = parse(
        EvaluateArguments, ExtractorArguments, DrawFirst, SamplingArguments, description=__doc__
    )
    state, folder = PartialState(), Path(args.synthetic)
    runs = read_runs(args.compare or [])
    if model.pretrained_model_name_or_path is not None:
        draw_folder(prepare_drawing(model, sampling, folder, state), sampling, folder, state)
    elif sampling.adapter is not None:
        raise UsageError("--adapter needs --pretrained_model_name_or_path, which it adapts")
    statement, results = privacy_of(args.synthetic, args.synthetic_revision)
    # Any other folder would take it for its own.
    ours = any((folder / name).is_file() for name in ("metadata.jsonl", "sampling.json"))
    output = (folder if ours else Path("runs") / folder.name) / "metrics.json"
    output = output if args.output_file is None else Path(args.output_file)
    known = results.get("epsilon", {}).get("value") is not None
    with TemporaryDirectory() as cache:  # what `datasets` copies of real images goes with it
        sets = load_sets(args, cache)
        metrics = chosen_metrics(args, sets)
        seen, pixels = look_at(sets, metrics, args, extractor, state)
        if "utility" in metrics:
            results |= measure_utility(sets, pixels, args, known and args.test_is_public, state)
        if not state.is_main_process:
            return
        if "fidelity" in metrics:
            results |= fidelity(seen["synthetic"], seen["real"], known, args.test_is_public)
        spaces = []
        if "memorisation" in metrics:
            features = {name: rows.features for name, rows in seen.items()}
            spaces = spaces_of(pixels, features)
            results |= entries_of(spaces)
            save_pairs(spaces, pixels, output.parent)
        shown = (["synthetic"] if known else []) + (["real"] if args.test_is_public else [])
        columns = (args.image_column, args.label_column)
        sheets = {name: grid_of(sets[name], *columns) for name in shown}
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(output, json.dumps(results, indent=2) + "\n")
    page = Page(folder.name, results, statement, sheets, spaces, runs)
    report = output.with_name("report.html" if output.stem == "metrics" else f"{output.stem}.html")
    write_report(page, report)
    for name, entry in results.items():
        print(f"{name}: {number_of(entry)}")
    for warning in sorted({entry["warning"] for entry in results.values() if "warning" in entry}):
        print(f"warning: {warning}", file=sys.stderr)
    print(f"{output} and {report}")


if __name__ == "__main__":
    run_script(main)
