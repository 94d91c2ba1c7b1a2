"""Public photographs for CIFAR-10, under its names where the same thing is meant.

    python examples/cifar10/prepare_public.py --dataset_name FOLDER \\
        --output_dir runs/cifar10/public

FOLDER is a data set with the columns image and label: Caltech-101 without its faces (CC BY 4.0),
the Grocery Store Dataset (MIT) and the clothing dataset of A. Grigorev and others (CC0 1.0), each
image area-averaged to 32 pixels; labels may begin with their source and a slash. Each image is
there twice, the second time mirrored. There are no horses, frogs, deer or trucks among them.
"""

import argparse
from pathlib import Path

from datasets import Value, concatenate_datasets, load_dataset
from PIL import ImageOps

CALLED = {
    "airplanes": "airplane",
    "car side": "automobile",
    **dict.fromkeys(["emu", "flamingo", "ibis", "pigeon", "rooster"], "bird"),
    "wild cat": "cat",
    "dalmatian": "dog",
    **dict.fromkeys(["ferry", "ketch", "schooner"], "ship"),
}
UNNAMED = ("background google", "not sure", "other", "skip")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset_name", required=True, help="Hub id or folder")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets train.parquet")
    args = parser.parse_args()
    rows = load_dataset(args.dataset_name, split="train").select_columns(["image", "label"])
    known = [n.split("/")[-1].replace("_", " ").lower() for n in rows.features["label"].names]
    rows = rows.filter(lambda label: known[label] not in UNNAMED, input_columns="label")
    names = [CALLED.get(known[label], known[label]) for label in rows["label"]]
    rows = rows.remove_columns("label").add_column("label", names, feature=Value("string"))
    mirrored = rows.map(lambda row: {"image": ImageOps.mirror(row["image"])})
    args.output_dir.mkdir(parents=True, exist_ok=True)
    concatenate_datasets([rows, mirrored]).to_parquet(args.output_dir / "train.parquet")


if __name__ == "__main__":
    main()
