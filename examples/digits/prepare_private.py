"""Write the private set: scikit-learn's 1,797 real handwritten digits, as image folders.

    python examples/digits/prepare_private.py --output_dir runs/digits/private

The images are 8 x 8 scans by 43 people (Alpaydin and Kaynak, UCI 1998), cropped to the ink.
They are enlarged to 24 x 24 and centred on 32 x 32, the margin that public digits have.
OUTPUT_DIR/train/CLASS/*.png holds four fifths, OUTPUT_DIR/test/CLASS/*.png the rest, split evenly
over the classes; `datasets.load_dataset("imagefolder", data_dir=OUTPUT_DIR)` reads both.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split


def write_split(images: np.ndarray, labels: np.ndarray, folder: Path) -> None:
    """Write scans [n, 8, 8] of values 0 to 16 as folder/LABEL/INDEX.png."""
    for index, (scan, label) in enumerate(zip(images, labels, strict=True)):
        target = folder / str(label)
        target.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray((scan / 16 * 255).round().astype(np.uint8))
        framed = Image.new("L", (32, 32))
        framed.paste(image.resize((24, 24), Image.Resampling.BICUBIC), (4, 4))
        framed.save(target / f"{index:04}.png")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output_dir", type=Path, required=True)
    args = parser.parse_args()
    digits = load_digits()
    train_images, test_images, train_labels, test_labels = train_test_split(
        digits.images, digits.target, test_size=0.2, stratify=digits.target, random_state=0
    )
    write_split(train_images, train_labels, args.output_dir / "train")
    write_split(test_images, test_labels, args.output_dir / "test")
    print(f"{len(train_labels)} training and {len(test_labels)} test images in {args.output_dir}")


if __name__ == "__main__":
    main()
