"""Are synthetic images good, useful, and does any of them give someone away?

    # fidelity and utility, against held-out real images
    python evaluate.py --synthetic runs/digits/synthetic --test_data_dir runs/digits/private

    # memorisation too: what the adapter was trained on, against what it never saw
    python evaluate.py --synthetic runs/digits/synthetic --test_data_dir runs/digits/private \\
        --private_data_dir runs/digits/private

    # a published set; on a Hub dataset; in a table and a plot with other runs
    python evaluate.py --synthetic user/synthetic-scans --test_dataset_name user/scans \\
        --compare runs/other/metrics.json

    # an adapter of any kind: its images are generated into --synthetic first
    python evaluate.py --pretrained_model_name_or_path examples/digits/base \\
        --adapter runs/digits/loda --class_names 0 1 2 3 4 5 6 7 8 9 \\
        --caption_template "the digit {label}" --num_images 1000 \\
        --synthetic runs/digits/loda_images --test_data_dir runs/digits/private

Writes metrics.json, report.html beside it, and pictures of the closest private images into private/
beside them. Figures that were computed from private images are marked (covered_by_epsilon: false):
publish them only if those images may be used that way.
"""

import importlib.machinery
import importlib.util
import sys
from pathlib import Path


def main():
    # Imported here, since `import evaluate` runs this file too, and means the library.
    from utils.arguments.evaluation import (
        EvaluateArguments,
        ExtractorArguments,
        GenerateFirstArguments,
    )
    from utils.arguments.parsing import parse
    from utils.arguments.sampling import SamplingArguments

    arguments = parse(
        EvaluateArguments,
        ExtractorArguments,
        GenerateFirstArguments,
        SamplingArguments,
        description=__doc__,
    )
    from utils.evaluation.measuring import evaluate_set

    evaluate_set(*arguments)


def load_library():
    """The Hugging Face library `evaluate`, which shares its name with this script."""
    here = Path(__file__).resolve().parent
    elsewhere = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = importlib.machinery.PathFinder.find_spec("evaluate", elsewhere)
    if spec is None:
        raise ModuleNotFoundError("the library evaluate is not installed", name="evaluate")
    sys.modules["evaluate"] = library = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(library)


if __name__ == "__main__":
    from utils.errors import run_script

    run_script(main)
elif __name__ == "evaluate":  # imported, not run: the importer means the library
    load_library()
