"""Images per second of sampling, and what fewer steps cost.

    python benchmarks/sampling.py --json                        # speed: three ways at equal steps
    python benchmarks/sampling.py --adapter runs/mnist/adapter \\
        --test_dataset_name ylecun/mnist                        # quality: accuracy by solver, steps

Speed, in images per second, interleaved, medians of the rounds: `loop` calls a plain diffusers
pipeline once a prompt, `batched` once with all prompts, each saving its images; `ours` is what
sample.py does, `ours_bf16` with --mixed_precision bf16. Quality: 50 steps of DDIM against fewer of
DPM-Solver++, and 8 that begin at the last timestep (Lin et al. 2024, section 3.3), all with
guidance and in the same way, by the accuracy of classifiers trained on as many images of each, and
by their Frechet distance; rows go to benchmarks/results/sampling.json.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from diffusers import StableDiffusionPipeline

from utils.arguments.sampling import SamplingArguments
from utils.models.adapters import load_adapter
from utils.models.drawing import choose_settings
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline
from utils.models.public_models import build_stable_diffusion
from utils.sampling.generation import Generation, generate_pieces, write_metadata
from utils.sampling.shards import plan_image_files

ROOT = Path(__file__).resolve().parent.parent

BASE = ROOT / "examples" / "digits" / "base"
RESULTS = ROOT / "benchmarks" / "results" / "sampling.json"
JUDGES = "--metrics utility fidelity --classifier_seeds 5 --extractor classifier".split()
JUDGES += ["--classifier_weights", "examples/digits/extractor.safetensors"]
PROMPTS = [{"text": f"the digit {i}", "label": str(i)} for i in range(10)]
SETTINGS = [  # solver, steps, spacing of the timesteps
    ("DDIM", 50, "leading"),
    ("DPM-Solver++", 20, "leading"),
    ("DPM-Solver++", 10, "leading"),
    ("DPM-Solver++", 8, "leading"),
    ("DPM-Solver++", 8, "trailing"),
]
SHAPES = {"tiny": {"images": 64, "rounds": 5}, "sd15": {"images": 2, "rounds": 2}}


def build(shape: str, folder: Path) -> Path:
    """The folder of a pipeline."""
    if shape == "tiny":
        return BASE
    build_stable_diffusion("1.5", [entry["text"] for entry in PROMPTS]).save_pretrained(folder)
    return folder


def speed(args) -> dict[str, float]:
    """Images per second of each way, saving included."""
    with TemporaryDirectory() as folder:
        base = build(args.shape, Path(folder) / "base")
        plain = StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
        plain.set_progress_bar_config(disable=True)
        sampling = SamplingArguments(num_inference_steps=args.steps, guidance_scale=2.0)
        drawing = choose_settings(plain, sampling, args.resolution)
        ours = Generation(load_pipeline(str(base)), PROMPTS, drawing)
        halved = Generation(load_pipeline(str(base)).to(torch.bfloat16), PROMPTS, drawing)
        for pipeline in (plain, ours.pipeline, halved.pipeline):
            drawing.use_scheduler(pipeline)
        settings = drawing.describe_call("StableDiffusionPipeline")
        count, out = args.images, Path(folder) / "images"
        out.mkdir()
        entries = [PROMPTS[i % 10] for i in range(count)]
        texts = [entry["text"] for entry in entries]

        def loop() -> None:
            for index, text in enumerate(texts):
                plain(text, **settings).images[0].save(out / f"{index}.png")

        def batched() -> None:
            for index, image in enumerate(plain(texts, **settings).images):
                image.save(out / f"{index}.png")

        pieces = plan_image_files(count)
        ways = {
            "loop": loop,
            "batched": batched,
            "ours": lambda: generate_pieces(ours, entries, pieces, sampling, out),
            "ours_bf16": lambda: generate_pieces(halved, entries, pieces, sampling, out),
        }
        seconds = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                if turn > 0:
                    seconds[name].append(time.perf_counter() - start)
    return {name: count / median(values) for name, values in seconds.items()}


def quality(args, solver: str, steps: int, spacing: str) -> dict:
    """Draw images with one solver, train classifiers on them, and measure their distance."""
    pipeline = load_pipeline(str(BASE))
    load_adapter(pipeline, Path(args.adapter))
    ours = find_family(pipeline).scheduler if solver == "DPM-Solver++" else {}
    scheduler = {"_class_name": "DDIMScheduler", **ours, "timestep_spacing": spacing}
    sampling = SamplingArguments(num_inference_steps=steps, guidance_scale=2.0)
    drawing = choose_settings(pipeline, sampling, None, {"scheduler": scheduler})
    drawing.use_scheduler(pipeline)
    prepared = Generation(pipeline, PROMPTS, drawing)
    entries = [PROMPTS[i % 10] for i in range(args.num_images)]
    with TemporaryDirectory() as folder:
        start = time.perf_counter()
        generate_pieces(prepared, entries, plan_image_files(len(entries)), sampling, Path(folder))
        seconds = time.perf_counter() - start
        write_metadata(Path(folder), entries)
        command = [sys.executable, "evaluate.py", "--synthetic", folder, *JUDGES]
        command += ["--test_dataset_name", args.test_dataset_name]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        found = json.loads((Path(folder) / "metrics.json").read_text())
    return {
        "solver": solver,
        "steps": steps,
        "spacing": spacing,
        "images": args.num_images,
        "seconds": seconds,
        "accuracy": found["accuracy"]["value"],
        "accuracy_std": found["accuracy"]["std"],
        "frechet_distance": found["frechet_distance"]["value"],
    }


def print_quality(rows: list[dict]) -> None:
    print("| solver | steps | spacing | images/s | times faster | accuracy, % | distance |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    slowest = max(row["seconds"] / row["images"] for row in rows)
    for row in rows:
        each = row["seconds"] / row["images"]
        accuracy = f"{100 * row['accuracy']:.1f} +- {100 * row['accuracy_std']:.1f}"
        cells = [row["solver"], row["steps"], row["spacing"], f"{1 / each:.1f}"]
        cells += [f"{slowest / each:.1f}", accuracy, f"{row['frechet_distance']:.2f}"]
        print(f"| {' | '.join(map(str, cells))} |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=list(SHAPES), default="tiny")
    parser.add_argument("--images", type=int, help="a round, for speed")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--resolution", type=int, help="for speed; default: the model's")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--adapter", help="measure quality, with this adapter of the digits model")
    parser.add_argument("--test_dataset_name", help="real images, for quality")
    parser.add_argument("--num_images", type=int, default=3000, help="of each solver, for quality")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    for name, value in SHAPES[args.shape].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    torch.manual_seed(0)
    if args.adapter is not None:
        rows = []
        for setting in SETTINGS:
            rows.append(quality(args, *setting))
            print(json.dumps(rows[-1]), flush=True)
            RESULTS.write_text(json.dumps(rows, indent=1) + "\n")
        print_quality(rows)
        return
    rates = speed(args)
    ratio = {f"ours_over_{name}": rates["ours"] / rates[name] for name in ("loop", "batched")}
    for name, rate in rates.items():
        print(f"{name:10} {rate:9.3f} images/s")
    if args.json:
        print(json.dumps({"shape": args.shape, "images_per_second": rates, "ratio": ratio}))


if __name__ == "__main__":
    main()
