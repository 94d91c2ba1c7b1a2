"""Public photographs of things, made to look like the private ones: light on black.

    python examples/fashion_mnist/prepare_public.py --dataset_name FOLDER \\
        --output_dir runs/fashion_mnist/public

FOLDER is a data set with the columns image and label: the clothing-dataset of A. Grigorev and
others (CC0 1.0), whose pieces lie on floors, beds and walls, with or without other things, whose
labels may begin with their source and a slash. Each image becomes the distance of its grey values
from the median of its border, less what the border itself varies by, scaled to reach 255; those
whose border varies much are left out. Each is there twice, the second time mirrored. Classes are
called as in Fashion-MNIST where the same thing is meant; what it does not know keeps its name.
"""

import argparse
from pathlib import Path

import numpy as np
from datasets import Features, Value, load_dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageOps

CALLED = {
    **dict.fromkeys(["T-Shirt", "Polo", "Top", "Undershirt"], "T - shirt / top"),
    "Pants": "Trouser",
    **dict.fromkeys(["Longsleeve", "Hoodie"], "Pullover"),
    **dict.fromkeys(["Outwear", "Blazer"], "Coat"),
    **dict.fromkeys(["Shirt", "Blouse"], "Shirt"),
    "Shoes": "Sneaker",
}
QUIET = 0.4  # of the largest distance
UNNAMED = ("Not sure", "Other", "Skip", "BACKGROUND Google")


def darken(image: Image.Image) -> Image.Image | None:
    """The distance of each grey value from the median of the border, less what nine tenths of the
    border stay below, scaled to reach 255; None if a tenth of the border is further than QUIET,
    or nothing differs from it."""
    grey = np.asarray(image.convert("L").resize((32, 32)), dtype=float)
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    distance, noise = np.abs(grey - np.median(border)), np.abs(border - np.median(border))
    floor = np.quantile(noise, 0.9)
    if distance.max() < 1 or floor > QUIET * distance.max():
        return None
    cleared = np.clip(distance - floor, 0, None)
    return Image.fromarray((255 * cleared / max(cleared.max(), 1)).round().astype("uint8"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder")
    parser.add_argument("--output_dir", required=True, help="gets train.parquet")
    args = parser.parse_args()
    rows = load_dataset(args.dataset_name, split="train")
    names = [name.split("/")[-1].replace("_", " ") for name in rows.features["label"].names]

    def prepare(batch: dict) -> dict:
        pairs = zip(map(darken, batch["image"]), batch["label"], strict=True)
        kept = [(image, CALLED.get(names[n], names[n])) for image, n in pairs if image is not None]
        kept += [(ImageOps.mirror(image), name) for image, name in kept]
        return {"image": [image for image, _ in kept], "label": [name for _, name in kept]}

    features = Features({"image": ImageFeature(), "label": Value("string")})
    rows = rows.filter(lambda label: names[label] not in UNNAMED, input_columns="label")
    rows = rows.map(prepare, batched=True, remove_columns=rows.column_names, features=features)
    Path(args.output_dir).mkdir(parents=True, exist_ok=True)
    rows.to_parquet(Path(args.output_dir) / "train.parquet")


if __name__ == "__main__":
    main()
