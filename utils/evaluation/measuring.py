"""The story of an evaluation: load the sets, measure what was asked for, write it down."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from accelerate import PartialState
from datasets import LargeList, List

from utils.arguments.evaluation import (
    LARGEST_SIDE,
    MEASURED,
    EvaluateArguments,
    ExtractorArguments,
    GenerateFirstArguments,
)
from utils.arguments.sampling import SamplingArguments
from utils.arguments.values import check_range
from utils.data.folders import LABEL, TEXT
from utils.data.image_column import find_image_column
from utils.data.images import (
    ImageRows,
    describe_left_out,
    find_readable_rows,
    read_pixel_batches,
)
from utils.data.rows import load_split, read_label_sets, read_labels, require_column
from utils.errors import UsageError, on_main_process
from utils.evaluation.downstream import (
    Classifiers,
    LabelledImages,
    measure_downstream_accuracy,
    measure_downstream_auroc,
)
from utils.evaluation.features import ExtractedFeatures, build_extractor, extract
from utils.evaluation.fidelity import NEIGHBOURS, measure_fidelity
from utils.evaluation.memorisation import compare_spaces, save_pairs, summarise_neighbours
from utils.evaluation.outputs import choose_output
from utils.evaluation.plots import measure_first, tile_sample
from utils.evaluation.report import Page, format_metric, read_runs, write_report
from utils.evaluation.trained_extractors import refuse_as_learned_from
from utils.files import (
    METRICS,
    REPORT,
    drop_private,
    private_folder,
    write_durably,
)
from utils.ledger.public_sets import refuse_as_public
from utils.metrics.frechet_distance.frechet_distance import frechet_distance_by_class
from utils.sampling.generation import prepare_generation
from utils.sampling.paid_sets import check_judge
from utils.sampling.rejection import generate_set
from utils.sampling.sources import find_source
from utils.sampling.synthetic_sets import read_privacy


def evaluate_set(
    args: EvaluateArguments,
    extractor: ExtractorArguments,
    model: GenerateFirstArguments,
    sampling: SamplingArguments,
) -> None:
    """Measure a synthetic set, and write metrics.json and report.html.

    Raises:
        UsageError: bad input of any kind.
    """
    state, folder = PartialState(), Path(args.synthetic)
    runs = read_runs(args.compare or [])
    on_main_process(lambda: refuse_as_learned_from(args, extractor))
    if args.test_is_public:
        test = args.test_dataset_name or args.test_data_dir
        on_main_process(lambda: refuse_as_public("--test_is_public:", test))
    if model.pretrained_model_name_or_path is not None:
        source = check_judge(sampling.reject_by, find_source(model, sampling))
        prepared = prepare_generation(model, sampling, source, folder, state)
        generate_set(prepared, sampling, folder, state)
    elif sampling.adapter is not None:
        raise UsageError("--adapter needs --pretrained_model_name_or_path, which it adapts")
    statement, results = read_privacy(args.synthetic, args.synthetic_revision)
    output = on_main_process(lambda: choose_output(args))
    kept = private_folder(output.parent) / f"judged-{output.stem}"
    known = results.get("epsilon", {}).get("value") is not None
    with TemporaryDirectory() as cache:  # what `datasets` copies of real images goes with it
        sets = load_sets(args, cache)
        separator = choose_separator(args, sets)
        metrics = choose_metrics(args, sets)
        features, pixels = extract_sets(sets, metrics, args, extractor, state)
        if "utility" in metrics:
            covered = known and args.test_is_public
            results |= measure_utility(sets, pixels, args, separator, covered, kept, state)
        if not state.is_main_process:
            return
        if "fidelity" in metrics:
            synthetic, real = features["synthetic"], features["real"]
            results |= measure_fidelity(synthetic, real, known, args.test_is_public)
            if args.frechet_by_class:
                results["frechet_distance"]["per_class"] = measure_classes(sets, features)
        spaces = []
        if "memorisation" in metrics:
            spaces = compare_spaces(pixels, {name: f.features for name, f in features.items()})
            results |= summarise_neighbours(spaces)
            save_pairs(spaces, pixels, output.parent)
        visible = (["synthetic"] if known else []) + (["real"] if args.test_is_public else [])
        sheets = {name: tile_sample(*sets[name], in_columns=separator is None) for name in visible}
    write_durably(output, json.dumps(results, indent=2) + "\n")
    drop_private(kept)
    page = Page(folder.name, results, statement, sheets, spaces, runs)
    report = output.with_name(REPORT if output.name == METRICS else f"{output.stem}.html")
    write_report(page, report)
    print_results(results)
    print(f"{output} and {report}")


def print_results(results: dict[str, dict]) -> None:
    """Each metric on stdout, and each warning on stderr."""
    for name, entry in results.items():
        mark = "" if entry["covered_by_epsilon"] else " (not covered by epsilon)"
        print(f"{name}: {format_metric(entry)}{mark}")
    for warning in sorted({entry["warning"] for entry in results.values() if "warning" in entry}):
        print(f"warning: {warning}", file=sys.stderr)


class LabelledRows(NamedTuple):
    """Rows whose image can be used, and the column of their labels, which may be missing."""

    images: ImageRows
    label_column: str


def load_sets(args: EvaluateArguments, cache: str) -> dict[str, LabelledRows]:
    """The usable rows of the synthetic, the real, and (if named) the private set.

    Raises:
        UsageError: see `load_split` and `find_readable_rows`; a column of labels that was asked for
            is not there; or the private and the real images, which are held out, have some in
            common, byte for byte.
    """
    synthetic = (args.synthetic, None, None, "train", cache, args.synthetic_revision)
    columns = {
        "synthetic": (args.synthetic_image_column, args.synthetic_label_column),
        "real": (args.test_image_column, args.test_label_column),
        "private": (args.private_image_column, args.private_label_column or args.test_label_column),
    }
    rows = {"synthetic": load_split(*synthetic), "real": load_split(*args.test_source, cache)}
    if args.has_private:
        rows["private"] = load_split(*args.private_source, cache)
    sets, digests = {}, {}
    for name, loaded in rows.items():
        asked, label_column = columns[name]
        side = "test" if name == "real" else name
        image_column = find_image_column(loaded, asked, f"--{side}_image_column")
        if label_column != LABEL and name != "private":  # there may be none, but not another
            require_column(loaded, label_column, f"--{side}_label_column")
        images = ImageRows(loaded, image_column, check_range(args.intensity_range))
        found = find_readable_rows(images)
        sets[name] = LabelledRows(images.select(found.good), label_column)
        digests[name] = [digest.tobytes() for digest in found.digests]
        if found.left_out:
            print(f"{name} images {describe_left_out(found.left_out)}", file=sys.stderr)
    shared = set(digests["real"]) & set(digests.get("private", ()))
    if shared:
        raise UsageError(
            f"{len(shared)} of the {len(digests['real'])} test images are among the private ones: "
            "what the adapter was trained on is not held out; leave them out of one set"
        )
    return sets


def choose_separator(args: EvaluateArguments, sets: dict[str, LabelledRows]) -> str | None:
    """What is between the names of an image's labels; None where it has one."""
    images, column = sets["real"]
    several = isinstance(images.rows.features.get(column), List | LargeList)
    return args.label_separator or ("," if several else None)


def choose_metrics(args: EvaluateArguments, sets: dict[str, LabelledRows]) -> list[str]:
    """What was asked for, or else all that is possible.

    Raises:
        UsageError: it was asked for, and there are too few images.
    """
    labelled = all(
        labels in images.rows.column_names
        for name, (images, labels) in sets.items()
        if name != "private"
    )
    many = min(len(images) for images, _ in sets.values()) > NEIGHBOURS
    possible = {"fidelity": many, "utility": labelled, "memorisation": args.has_private and many}
    if not many and {"fidelity", "memorisation"} & set(args.metrics or []):
        raise UsageError(
            f"fidelity and memorisation need more than {NEIGHBOURS} images in each set"
        )
    chosen = args.metrics or [metric for metric in MEASURED if possible[metric]]
    by_class = labelled and "fidelity" in chosen and choose_separator(args, sets) is None
    if args.frechet_by_class and not by_class:
        raise UsageError(
            "--frechet_by_class needs the metric fidelity, and one label an image in both sets: "
            "name their columns with --synthetic_label_column and --test_label_column"
        )
    return chosen


def extract_sets(
    sets: dict[str, LabelledRows],
    metrics: list[str],
    args: EvaluateArguments,
    extractor: ExtractorArguments,
    state: PartialState,
) -> tuple[dict[str, ExtractedFeatures], dict[str, torch.Tensor]]:
    """What the metrics compare of each set: its features, and its pixels, uint8 [N, 3, R, R]. With
    CLIP, the synthetic images' prompts, too, where they are known."""
    reads_private = "memorisation" in metrics
    features, pixels = {}, {}
    if "fidelity" in metrics or reads_private:
        network = build_extractor(extractor, state.device)
        for name, (images, _) in sets.items():
            if name != "private" or reads_private:
                features[name] = extract(images, network, state, name)
        rows = sets["synthetic"].images.rows
        if network.embed_texts is not None and TEXT in rows.column_names:
            prompts = network.embed_texts([text or "" for text in rows[TEXT]])
            features["synthetic"] = replace(features["synthetic"], prompts=prompts)
    side = args.evaluation_resolution
    if side is None:
        side = min(LARGEST_SIDE, *measure_first(sets["synthetic"].images))
    for name, (images, _) in sets.items():
        if "utility" in metrics or reads_private:
            batches = read_pixel_batches(images, side, 256)
            pixels[name] = torch.cat(list(batches))
    return features, pixels


def measure_classes(
    sets: dict[str, LabelledRows], features: dict[str, ExtractedFeatures]
) -> dict[str, float]:
    """The Frechet distance class by class."""
    rows, labels = [], []
    for name in ("synthetic", "real"):
        images, label_column = sets[name]
        rows.append(features[name].features)
        labels.append(list(read_labels(images.rows, label_column, may_be_blank=True)))
    return frechet_distance_by_class(*rows, *labels)


def measure_utility(
    sets: dict[str, LabelledRows],
    pixels: dict[str, torch.Tensor],
    args: EvaluateArguments,
    separator: str | None,
    covered: bool,
    kept: Path,
    state: PartialState,
) -> dict[str, dict]:
    """What classifiers learn from the synthetic, and perhaps from the private, images: their
    accuracy, or, where an image has any number of labels, the area under the ROC curve. In `kept`
    is what each was found to do, until all is written down."""
    metric, measure = "accuracy", measure_downstream_accuracy
    if separator is not None:
        metric, measure = "auroc", measure_downstream_auroc
    images = {}
    for name, (found, labels) in sets.items():
        if name == "private" and not args.train_on_real:
            continue
        if separator is None:
            option = f"--{'test' if name == 'real' else name}_label_column"
            own = list(read_labels(found.rows, labels, option, may_be_blank=True))
        else:
            own = read_label_sets(found.rows, labels, separator)
        images[name] = LabelledImages(pixels[name], own)
    classifiers = Classifiers(args.steps_of_networks, args.classifier_seeds, kept)
    entries = {}
    for name, entry in (("synthetic", metric), ("private", f"{metric}_of_real")):
        if name in images:
            counted = {"covered_by_epsilon": covered and name == "synthetic"}
            counted[f"num_{name}"] = len(images[name])
            found = measure(images[name], images["real"], classifiers, state)
            entries[entry] = {**found, **counted}
    return entries
