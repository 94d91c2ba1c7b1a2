"""Public photographs of clothes, made to look like the private ones: light on black.

    python examples/fashion_mnist/prepare_public.py --dataset_name FOLDER \\
        --output_dir runs/fashion_mnist/public

FOLDER is a data set with the columns image and label of the clothing-dataset of A. Grigorev and
others (CC0 1.0), whose pieces lie on floors, beds and walls. Each image becomes the distance of its
grey values from the median of its border, scaled to reach 255; classes are called as in
Fashion-MNIST where the same thing is meant, and the pieces that it does not know keep their names.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image

CALLED = {
    **dict.fromkeys(["T-Shirt", "Polo", "Top", "Undershirt"], "T - shirt / top"),
    "Pants": "Trouser",
    **dict.fromkeys(["Longsleeve", "Hoodie"], "Pullover"),
    **dict.fromkeys(["Outwear", "Blazer"], "Coat"),
    **dict.fromkeys(["Shirt", "Blouse"], "Shirt"),
    "Shoes": "Sneaker",
}
UNNAMED = ("Not sure", "Other", "Skip")


def darken(image: Image.Image) -> Image.Image:
    """The distance of each grey value from the median of the border, scaled to reach 255."""
    grey = np.asarray(image.convert("L").resize((32, 32)), dtype=float)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    distance = np.abs(grey - np.median(border))
    return Image.fromarray((255 * distance / max(distance.max(), 1)).round().astype("uint8"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder")
    parser.add_argument("--output_dir", required=True, help="gets train.parquet")
    args = parser.parse_args()
    rows = load_dataset(args.dataset_name, split="train")
    names = rows.features["label"].names

    def prepare(row: dict) -> dict:
        name = names[row["label"]]
        return {"image": darken(row["image"]), "label": CALLED.get(name, name)}

    features = Features({"image": ImageFeature(), "label": Value("string")})
    rows = rows.filter(lambda label: names[label] not in UNNAMED, input_columns="label")
    rows = rows.map(prepare, remove_columns=rows.column_names, features=features)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    rows.to_parquet(Path(args.output_dir) / "train.parquet")


if __name__ == "__main__":
    main()
