"""Do the distances rank what they should? And how long do 60,000 images against 60,000 take?

    python benchmarks/fidelity.py --name mnist --dataset_name ylecun/mnist \\
        --private runs/mnist/images --public runs/public/images
    python benchmarks/fidelity.py --name large --dataset_name ylecun/mnist --num_images 60000 \\
        --against FOLDER                     # a set of another 60,000, instead of the four

Against held-out real images: real images of the training split, images of a private adapter, images
of the public model it started from, and noise; each image is read, and brought to its size, once.
Rows go to benchmarks/results/fidelity.json; `--table` prints them as they stand in RESULTS.md.
"""

import json
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

import numpy as np
from accelerate import PartialState
from datasets import Dataset, Features, Image
from PIL import Image as PILImage

from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.parsing import option, parse
from utils.data.rows import load_split
from utils.errors import UsageError, run_script
from utils.evaluation.features import build_extractor, extract
from utils.evaluation.fidelity import measure_fidelity

ROOT = Path(__file__).resolve().parent.parent

RESULTS = ROOT / "benchmarks" / "results" / "fidelity.json"
SHOWN = ["frechet_distance", "kernel_distance", "precision", "recall", "density", "coverage"]


@dataclass
class BenchmarkArguments:
    """The sets."""

    name: str = option("what to call the real set", "mnist")
    dataset_name: str = option("real images, with splits train and test", "ylecun/mnist")
    private: str | None = option("images of a private adapter", None)
    public: str | None = option("images of the public model", None)
    against: str | None = option("instead of all those: one set, its training split", None)
    num_images: int = option("of each set, at most", 10_000)
    table: bool = option("only print what there is", False)


def noise(count: int, side: int = 28) -> Dataset:
    """Images of uniform noise."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side), dtype=np.uint8)
    features = Features({"image": Image()})
    images = [PILImage.fromarray(image) for image in pixels]
    return Dataset.from_dict({"image": images}, features=features)


def first(rows: Dataset, count: int) -> Dataset:
    return rows.select(range(min(count, len(rows))))


def load_sets(args: BenchmarkArguments, cache: str) -> dict[str, Dataset]:
    """The sets to compare with the held-out real images, each at most `num_images` long."""
    if args.against is not None:
        return {args.against: load_split(args.against, None, None, "train", cache)}
    if args.private is None or args.public is None:
        raise UsageError("give --private and --public, or --against")
    return {
        "real, training split": load_split(args.dataset_name, None, None, "train", cache),
        "private adapter": load_split(None, None, args.private, "train", cache),
        "public model": load_split(None, None, args.public, "train", cache),
        "noise": noise(args.num_images),
    }


def known() -> list[dict]:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else []


def print_table(rows: list[dict]) -> None:
    print(f"| set | extractor | images | against held-out real | {' | '.join(SHOWN)} | seconds |")
    print("| --- " * (5 + len(SHOWN)) + "|")
    for row in rows:
        values = " | ".join(f"{row['metrics'][name]:.4g}" for name in SHOWN)
        images = f"{row['num_images']} / {row['num_real']}"
        about = f"{row['set']} | {row['extractor']} | {images} | {row['images']}"
        print(f"| {about} | {values} | {row['seconds']:.0f} |")


def main():
    args, extractor = parse(BenchmarkArguments, ExtractorArguments, description=__doc__)
    state = PartialState()
    if not args.table:
        network = build_extractor(extractor, state.device)
        with TemporaryDirectory() as cache:
            split = "test" if args.against is None else "train"
            real = first(load_split(args.dataset_name, None, None, split, cache), args.num_images)
            start = time.perf_counter()
            held_out = extract(real, "image", network, state, "real")
            reading = time.perf_counter() - start
            rows = []
            for name, images in load_sets(args, cache).items():
                start = time.perf_counter()
                seen = extract(first(images, args.num_images), "image", network, state, name)
                metrics = measure_fidelity(seen, held_out, has_epsilon=True, public=True)
                rows.append(
                    {
                        "set": args.name,
                        "extractor": network.name,
                        "images": Path(name).name,
                        "num_images": len(seen),
                        "num_real": len(held_out),
                        "metrics": {metric: metrics[metric]["value"] for metric in SHOWN},
                        "seconds": reading + time.perf_counter() - start,
                        "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                    }
                )
                print(json.dumps(rows[-1]), flush=True)
        again = {(args.name, network.name)}
        kept = [row for row in known() if (row["set"], row["extractor"]) not in again]
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        RESULTS.write_text(json.dumps(kept + rows, indent=1) + "\n")
    print_table(known())


if __name__ == "__main__":
    run_script(main)
