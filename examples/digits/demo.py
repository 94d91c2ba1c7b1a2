"""The whole way on real handwritten digits: prepare, train privately, sample, evaluate, compare.

    python examples/digits/demo.py          # or: make demo

The private set is scikit-learn's 1,797 handwritten digits (four fifths to train on, one fifth held
out); the public base model has seen typographic digits only. A classifier is trained on images of
the public model, on images of the private adapter, and (the ceiling, without privacy) on the real
training digits; each is tested on the held-out real digits.

Leaves runs/digits/metrics.json and runs/digits/before_after.png.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parents[2]
BASE = Path("examples/digits/base")
RUN = Path("runs/digits")
PARTS = ["private", "adapter", "images_base", "images_private", "metrics.json", "before_after.png"]
SAMPLING = ["--caption_template", "the digit {label}", "--class_names", *"0123456789"]
SAMPLING += ["--num_images", "1000"]
TESTING = [
    "--metrics",
    "utility",
    "--test_data_dir",
    RUN / "private",
    "--classifier_steps",
    "300",
    "--classifier_seeds",
    "2",
]


def run(script: str, *arguments) -> float:
    """Run one script of the repository; returns its seconds."""
    command = [sys.executable, script, *map(str, arguments)]
    print("\n$ python", *command[1:], flush=True)
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True)
    return time.perf_counter() - start


def sample(name: str, *more) -> Path:
    folder = RUN / f"images_{name}"
    base = ["--pretrained_model_name_or_path", BASE]
    run("sample.py", *base, *more, *SAMPLING, "--output_dir", folder)
    return folder


def measure(images: Path) -> dict:
    """Accuracy on the held-out real digits of classifiers trained on `images`."""
    output = RUN / "evaluation" / f"{images.name}.json"
    run("evaluate.py", "--synthetic", images, *TESTING, "--output_file", output)
    accuracy = json.loads((ROOT / output).read_text())["accuracy"]
    return {"accuracy": accuracy["value"], "accuracy_std": accuracy["std"]}


def real_sheet() -> Image.Image:
    """Ten by eight held-out real digits, laid out as the synthetic grids are."""
    sheet = Image.new("RGB", (320, 256))
    for digit in range(10):
        paths = sorted((ROOT / RUN / "private" / "test" / str(digit)).glob("*.png"))
        for row in range(8):
            sheet.paste(Image.open(paths[row]), (32 * digit, 32 * row))
    return sheet


def plot_before_after(output: Path) -> None:
    """Side by side: the public model, the private adapter, and held-out real digits."""
    panels = [
        ("public model", Image.open(ROOT / RUN / "images_base" / "grid.png")),
        ("private adapter", Image.open(ROOT / RUN / "images_private" / "grid.png")),
        ("real digits, held out", real_sheet()),
    ]
    canvas = Image.new("RGB", (3 * 340 - 20, 276), "white")
    pen = ImageDraw.Draw(canvas)
    for index, (title, grid) in enumerate(panels):
        pen.text((340 * index, 4), title, fill="black")
        canvas.paste(grid.crop((0, 0, 320, 256)), (340 * index, 20))
    canvas.resize((2 * canvas.width, 2 * canvas.height)).save(output)


def print_table(metrics: dict) -> None:
    print("\n                  accuracy     epsilon  seconds")
    for name, title in [
        ("base", "public model"),
        ("private", "private adapter"),
        ("real", "ceiling (real)"),
    ]:
        row = metrics[name]
        epsilon = {"base": "0", "real": "infinite"}.get(name) or f"{row['epsilon']:.2f}"
        shown = f"{100 * row['accuracy']:.1f} +- {100 * row['accuracy_std']:.1f} %"
        print(f"{title:16}  {shown:13}{epsilon:>8}  {row['seconds']:7.0f}")


def main():
    start = time.perf_counter()
    for part in PARTS:  # start afresh; the public set and a remade base model stay
        path = ROOT / RUN / part
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    run("examples/digits/prepare_private.py", "--output_dir", RUN / "private")
    training = run("train_dp_lora.py", "--config", "examples/digits/warm_start/dp_lora.yaml")

    metrics = {}
    adapter = ["--adapter", RUN / "adapter"]
    for name, more, earlier in [("base", [], 0.0), ("private", adapter, training)]:
        begun = time.perf_counter() - earlier
        metrics[name] = measure(sample(name, *more))
        metrics[name]["seconds"] = time.perf_counter() - begun
    begun = time.perf_counter()
    metrics["real"] = measure(RUN / "private") | {"seconds": time.perf_counter() - begun}
    statement = json.loads((ROOT / RUN / "adapter" / "privacy.json").read_text())
    metrics["private"]["epsilon"] = statement["epsilon"]["add_or_remove_one"]
    metrics["private"]["delta"] = statement["delta"]
    metrics["seconds"] = time.perf_counter() - start

    (ROOT / RUN / "metrics.json").write_text(json.dumps(metrics, indent=2) + "\n")
    plot_before_after(ROOT / RUN / "before_after.png")
    print_table(metrics)
    base, private, real = (metrics[name]["accuracy"] for name in ("base", "private", "real"))
    if real > base:
        print(f"\nThe private adapter closes {(private - base) / (real - base):.0%} of the gap.")
    print(f"{metrics['seconds']:.0f} seconds in all. See {RUN / 'before_after.png'}.")


if __name__ == "__main__":
    main()
