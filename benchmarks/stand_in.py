"""A public stand-in for few handwritten digits, on which shares of a budget are tuned.

    python benchmarks/stand_in.py --output_dir runs/stand_in
    python train_dp_lora.py --config examples/digits/warm_start/dp_lora.yaml --train_data_dir \\
        runs/stand_in --class_names 0 1 2 3 4 5 6 7 8 9 --release_share 0.6 --output_dir runs/tried

Typographic digits of fonts that the public base has not seen (`draw_public.py`), bent and slanted
further than it has seen any, reduced to 8 x 8 pixels and enlarged as the private digits are: 1,437
for training, as many as those, and 2,000 held out. An image folder, OUTPUT_DIR/SPLIT/CLASS/*.png.

The base draws such digits nearly as well as they are. With --turn 40, all lie askew, as pages do in
a scanner: then there is more to be learned.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from datasets import load_dataset
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

ROOT = Path(__file__).resolve().parent.parent
SIDE, DRAWN, HELD_OUT = 32, 24_000, 2000


def bend(image: Image.Image, random: np.random.Generator) -> np.ndarray:
    """Slant to the left, widen, and bend by up to two pixels: [32, 32]."""
    rows, columns = np.mgrid[0:SIDE, 0:SIDE].astype(float)
    across, down = (gaussian_filter(random.normal(size=(SIDE, SIDE)), 5) for _ in range(2))
    across, down = (2 * field / np.abs(field).max() for field in (across, down))
    slant, zoom = -0.35 + 0.1 * random.normal(), 1.15 + 0.08 * random.normal()
    middle = SIDE / 2
    at_row = (rows - middle) * zoom + middle + down
    at_column = (columns - middle) * zoom * 0.95 + middle + slant * (rows - middle) + across
    grey = np.asarray(image.convert("L"), float)
    return map_coordinates(grey, [at_row, at_column], order=1).clip(0, 255)


def coarsen(pixels: np.ndarray, turn: float = 0) -> Image.Image:
    """As the private digits are: 8 x 8 pixels, enlarged to 24, on 32; `turn` degrees rightwards."""
    image = Image.fromarray(pixels.round().astype(np.uint8))
    image = image.rotate(-turn, Image.Resampling.BICUBIC).crop((4, 4, 28, 28))
    small = image.resize((8, 8), Image.Resampling.BOX)
    framed = Image.new("L", (SIDE, SIDE))
    framed.paste(small.resize((24, 24), Image.Resampling.BICUBIC), (4, 4))
    return framed


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_train", type=int, default=1437, help=f"up to {DRAWN - HELD_OUT:,}")
    parser.add_argument("--turn", type=float, default=0, help="degrees to the right, of all digits")
    args = parser.parse_args()
    splits = {"train": (0, args.num_train), "test": (args.num_train, args.num_train + HELD_OUT)}
    random = np.random.default_rng(3)
    with TemporaryDirectory() as folder:
        draw = ["--num_train", 160, "--num_validation", DRAWN, "--seed", 7, "--output_dir", folder]
        command = [sys.executable, ROOT / "examples" / "digits" / "draw_public.py", *draw]
        subprocess.run(list(map(str, command)), check=True)
        file = str(Path(folder) / "validation.parquet")
        rows = load_dataset("parquet", data_files=file, split="train", cache_dir=folder)
        order = random.permutation(len(rows)).tolist()
        for split, (first, last) in splits.items():
            for index, place in enumerate(order[first:last]):
                row = rows[place]
                target = args.output_dir / split / str(row["label"])
                target.mkdir(parents=True, exist_ok=True)
                coarsen(bend(row["image"], random), args.turn).save(target / f"{index:04}.png")


if __name__ == "__main__":
    main()
