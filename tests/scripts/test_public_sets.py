"""Public images that are made to look like private ones."""

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, load_dataset
from PIL import Image as PILImage

NAMES = ["clothing/T-Shirt", "caltech/car_side", "clothing/Not sure"]


def picture(thing: int, background: int, noise: int = 0) -> PILImage.Image:
    """A square of one grey level on another, brighter on its left half by ten."""
    grey = np.full((32, 32), background, float)
    grey += np.random.default_rng(0).integers(-noise, noise + 1, grey.shape)
    grey[8:24, 8:24] = thing
    grey[8:24, 8:16] += 10
    return PILImage.fromarray(grey.clip(0, 255).astype("uint8"))


def test_things_become_light_on_black_and_are_there_twice(run_script, tmp_path):
    busy = PILImage.fromarray(np.random.default_rng(1).integers(256, size=(32, 32), dtype=np.uint8))
    nothing = PILImage.new("L", (32, 32), 90)
    pictures = [picture(40, 220, 8), picture(200, 30), busy, nothing, picture(200, 30)]
    rows = {"image": pictures, "label": [0, 1, 1, 1, 2]}
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in" / "train.parquet")
    script = "examples/fashion_mnist/prepare_public.py"
    made = ["--dataset_name", tmp_path / "in", "--output_dir", tmp_path / "out"]
    run = run_script(script, *made)
    assert run.returncode == 0, run.stderr
    found = load_dataset(str(tmp_path / "out"), split="train")
    assert (
        found["label"][:] == ["T - shirt / top", "car side"] * 2
    )  # neither busy, empty nor unnamed
    images = [np.asarray(image).astype(int) for image in found["image"]]
    for image in images:
        assert image.max() == 255 and image[8:24, 8:24].min() > 200  # however dark it was
        outside = np.delete(image, slice(8, 24), 0)
        assert np.median(outside) == 0 and (outside > 0).mean() < 0.11  # nine tenths of the border
    for image, mirrored in zip(images[:2], images[2:], strict=True):
        assert (image[:, ::-1] == mirrored).all() and (image != mirrored).any()


def test_things_keep_their_names_or_get_those_of_the_private_set(run_script, tmp_path):
    rows = {"image": [picture(40, 220), picture(200, 30), picture(9, 3)], "label": [0, 1, 2]}
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    Dataset.from_dict(rows, features=features).to_parquet(tmp_path / "in" / "train.parquet")
    made = ["--dataset_name", tmp_path / "in", "--output_dir", tmp_path / "out"]
    run = run_script("examples/cifar10/prepare_public.py", *made)
    assert run.returncode == 0, run.stderr
    found = load_dataset(str(tmp_path / "out"), split="train")
    assert found["label"][:] == ["t-shirt", "automobile"] * 2  # none that has no name
    images = [np.asarray(image) for image in found["image"]]
    assert (images[0] == np.asarray(rows["image"][0])).all()
    for image, mirrored in zip(images[:2], images[2:], strict=True):
        assert (image[:, ::-1] == mirrored).all() and (image != mirrored).any()
