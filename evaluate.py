"""How good is a synthetic set? Train a classifier on it, test it on real labelled images.

    python evaluate.py --synthetic runs/digits/private_images \\
        --test_data_dir runs/digits/private --output_file runs/digits/metrics/private.json

    # a published set; on a Hub dataset
    python evaluate.py --synthetic user/synthetic-scans --test_dataset_name user/scans

    # on a Hub dataset, or a folder of parquet files
    python evaluate.py --synthetic images --test_dataset_name ylecun/mnist --test_split test

    # an adapter of any kind: its images are drawn into --synthetic first
    python evaluate.py --pretrained_model_name_or_path examples/digits/base \\
        --adapter runs/digits/loda --class_names 0 1 2 3 4 5 6 7 8 9 \\
        --caption_template "the digit {label}" --num_images 1000 \\
        --synthetic runs/digits/loda_images --test_data_dir runs/digits/private

Writes metrics.json: for each metric its mean over classifier seeds, their spread (standard
deviation), and whether the epsilon of the adapter covers it. Accuracy reads the real test images,
so it is not covered: publish it only if those images may be used that way.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, pstdev
from tempfile import TemporaryDirectory

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from datasets import Dataset

from utils.arguments import ModelArguments, option, parse
from utils.classifiers import accuracy, train_classifier
from utils.data import keep_readable, labels_of, load_rows, pixel_batches, to_unit_range
from utils.errors import UsageError, run_script
from utils.generation import SamplingArguments, draw_folder

METRICS = ["accuracy"]


@dataclass
class EvaluateArguments:
    """The two sets, and the classifier."""

    synthetic: str = option("synthetic set: a folder that sample.py left, or a Hub id")
    synthetic_revision: str | None = option("revision of a synthetic set on the Hub", None)
    metrics: list[str] = option(f"which metrics; there are: {', '.join(METRICS)}", METRICS)
    test_dataset_name: str | None = option("real images: Hub id or folder of parquet files", None)
    test_data_dir: str | None = option("real images: image folder, instead", None)
    test_split: str = option("split of the real images", "test")
    image_column: str = option("column of the images, in both sets", "image")
    label_column: str = option("column of the labels, in both sets", "label")
    evaluation_resolution: int = option("both sets are resized to this many pixels", 32)
    classifier_seeds: int = option("classifiers trained, each with another seed", 3)
    classifier_steps: int = option("optimizer steps of a classifier, 128 images each", 600)
    output_file: str | None = option(
        "default: metrics.json in the synthetic folder, or here for a set of the Hub", None
    )


@dataclass
class DrawFirst(ModelArguments):
    """Draw the synthetic set first: the public pipeline, with the options of sample.py."""

    pretrained_model_name_or_path: str | None = option(
        "draw the images into --synthetic with this pipeline first; default: they are there",
        None,
    )


def load_labelled(rows: Dataset, args: EvaluateArguments) -> tuple[torch.Tensor, list[str]]:
    """Images in [-1, 1], [N, 3, R, R], and their class names."""
    rows, _ = keep_readable(rows, args.image_column)
    labels = labels_of(rows, args.label_column)
    batches = pixel_batches(rows, args.image_column, args.evaluation_resolution, 256)
    return to_unit_range(torch.cat(list(batches))), list(labels)


def downstream_accuracy(synthetic, real, args: EvaluateArguments, state: PartialState) -> dict:
    """Accuracy on `real` of classifiers trained on `synthetic`; both are (images, class names).

    Each process trains its share of the classifiers.

    Raises:
        UsageError: the two sets have no class in common.
    """
    names = sorted(set(synthetic[1]) | set(real[1]))
    index = {name: i for i, name in enumerate(names)}
    train_labels = torch.tensor([index[name] for name in synthetic[1]])
    test_labels = torch.tensor([index[name] for name in real[1]])
    if not set(synthetic[1]) & set(real[1]):
        raise UsageError("the two sets have no class in common: check --label_column")
    values = []
    for seed in range(state.process_index, args.classifier_seeds, state.num_processes):
        model = train_classifier(
            synthetic[0], train_labels, len(names), args.classifier_steps, seed, state.device
        )
        values.append(accuracy(model, real[0], test_labels, state.device))
    values = gather_object(values)
    return {
        "value": mean(values),
        "std": pstdev(values),
        "covered_by_epsilon": False,
        "num_synthetic": len(train_labels),
        "num_real": len(test_labels),
        "classifier_seeds": args.classifier_seeds,
    }


def main():
    args, model, sampling = parse(
        EvaluateArguments, DrawFirst, SamplingArguments, description=__doc__
    )
    unknown = sorted(set(args.metrics) - set(METRICS))
    if unknown:
        raise UsageError(f"unknown metric {', '.join(unknown)}; there are: {', '.join(METRICS)}")
    if args.classifier_seeds < 1 or args.classifier_steps < 1:
        raise UsageError("--classifier_seeds and --classifier_steps must be at least 1")
    state, folder = PartialState(), Path(args.synthetic)
    if model.pretrained_model_name_or_path is not None:
        draw_folder(model, sampling, folder, state)
    elif sampling.adapter is not None:
        raise UsageError("--adapter needs --pretrained_model_name_or_path, which it adapts")
    with TemporaryDirectory() as cache:  # what `datasets` copies of real images goes with it
        synthetic = load_rows(args.synthetic, None, None, "train", cache, args.synthetic_revision)
        real = load_rows(args.test_dataset_name, None, args.test_data_dir, args.test_split, cache)
        synthetic, real = load_labelled(synthetic, args), load_labelled(real, args)
    results = {"accuracy": downstream_accuracy(synthetic, real, args, state)}

    output = Path("metrics.json") if not folder.is_dir() else folder / "metrics.json"
    if args.output_file is not None:
        output = Path(args.output_file)
    if state.is_main_process:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=2) + "\n")
    for name, result in results.items():
        state.print(f"{name}: {result['value']:.4f} +- {result['std']:.4f} ({output})")


if __name__ == "__main__":
    run_script(main)
