"""The sets of an evaluation: each has its own columns, and what was trained on is not held out."""

import io

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features
from datasets import Image as ImageFeature
from PIL import Image

from tests.conftest import read_json
from utils.arguments.evaluation import EvaluateArguments
from utils.errors import UsageError
from utils.evaluation.measuring import choose_metrics, load_sets

CLASSES = ["airplane", "automobile", "bird"]


def draw(folder, count: int, seed: int) -> list[bytes]:
    """Images of 16 pixels, one class after the other, as sample.py leaves them."""
    folder.mkdir(parents=True)
    generator, files, lines = np.random.default_rng(seed), [], []
    for index in range(count):
        pixels = generator.integers(0, 99, (16, 16, 3), np.uint8)
        pixels[:, 5 * (index % 3) : 5 * (index % 3) + 4] = 220
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(file.getvalue())
        (folder / f"{index:06}.png").write_bytes(files[-1])
        name = CLASSES[index % 3]
        lines.append(f'{{"file_name": "{index:06}.png", "text": "a {name}", "label": "{name}"}}')
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return files


def save_as_cifar(folder, splits: dict[str, list[bytes]], image: str = "img") -> None:
    """With the columns of uoft-cs/cifar10: `img` and `label`."""
    features = Features({image: ImageFeature(), "label": ClassLabel(names=CLASSES)})
    DatasetDict({
        split: Dataset.from_dict(
            {image: [{"bytes": f, "path": None} for f in files],
             "label": [i % 3 for i in range(len(files))]}, features,
        )
        for split, files in splits.items()
    }).save_to_disk(folder)  # fmt: skip


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    root = tmp_path_factory.mktemp("sets")
    draw(root / "synthetic", 60, 0)
    train, test = draw(root / "train", 60, 1), draw(root / "test", 60, 2)
    save_as_cifar(root / "cifar10", {"train": train, "test": test})
    return root


def load(**arguments):
    return load_sets(EvaluateArguments(**{k: str(v) for k, v in arguments.items()}), None)


@pytest.mark.slow
def test_the_columns_of_the_cifar10_recipe(sets, run_script, tmp_path):
    """Its images are in `img`, those of sample.py in `image`."""
    arguments = ["--synthetic", sets / "synthetic", "--test_dataset_name", sets / "cifar10"]
    arguments += ["--private_dataset_name", sets / "cifar10", "--train_on_real"]
    arguments += ["--classifier_steps", 40, "--classifier_seeds", 1]
    arguments += ["--evaluation_resolution", 16, "--output_file", tmp_path / "metrics.json"]
    run = run_script("evaluate.py", *arguments)
    assert run.returncode == 0, run.stderr
    found = read_json(tmp_path / "metrics.json")
    assert found["accuracy"]["value"] > 0.9 and found["accuracy_of_real"]["value"] > 0.9
    assert found["copies"]["value"] == 0 and found["accuracy"]["num_synthetic"] == 60


def test_a_column_is_named_where_several_hold_images(sets, tmp_path):
    rows = Dataset.load_from_disk(str(sets / "cifar10" / "test"))
    both = rows.add_column("mask", [None] * len(rows), feature=ImageFeature())
    both.save_to_disk(tmp_path / "both")
    more = {"synthetic": sets / "synthetic", "test_dataset_name": tmp_path / "both"}
    with pytest.raises(UsageError, match="give --test_image_column: the columns are img, label, m"):
        load(**more)
    assert load(**more, test_image_column="img")["real"].images.column == "img"
    with pytest.raises(UsageError, match="--test_image_column picture: there is no such column"):
        load(**more, test_image_column="picture")


def test_label_columns_of_their_own(sets):
    args = EvaluateArguments(
        synthetic=str(sets / "synthetic"), test_data_dir=str(sets / "test"),
        test_label_column="text", private_data_dir=str(sets / "train"),
    )  # fmt: skip
    found = load_sets(args, None)
    names = {name: loaded.label_column for name, loaded in found.items()}
    assert names == {"synthetic": "label", "real": "text", "private": "text"}
    assert "utility" in choose_metrics(args, found)
    found["real"] = found["real"]._replace(label_column="label of none")
    assert "utility" not in choose_metrics(args, found)
    args.frechet_by_class = True
    with pytest.raises(UsageError, match="one label an image in both sets"):
        choose_metrics(args, found)
    args.test_label_column = "lable"
    with pytest.raises(UsageError, match="--test_label_column lable: there is no such column"):
        load_sets(args, None)


@pytest.mark.parametrize("spelling", ["train", "train/", "./train", "../SETS/train", "elsewhere"])
def test_private_images_are_not_held_out_however_they_are_named(sets, monkeypatch, spelling):
    """What counts is what they are, not where."""
    monkeypatch.chdir(sets)
    test = spelling.replace("SETS", sets.name)
    if spelling == "elsewhere":
        test = "cifar10/train"
    more = {"test_dataset_name": test, "private_data_dir": "train"}
    with pytest.raises(UsageError, match="60 of the 60 test images are among the private ones"):
        load(synthetic="synthetic", **more)


def test_one_shared_image_is_enough(sets, tmp_path):
    files = draw(tmp_path / "held_out", 20, 3)
    (sets / "train" / "000000.png").replace(tmp_path / "kept.png")
    (sets / "train" / "000000.png").write_bytes(files[7])
    try:
        with pytest.raises(UsageError, match="^1 of the 20 test images"):
            load(synthetic=sets / "synthetic", test_data_dir=tmp_path / "held_out",
                 private_data_dir=sets / "train")  # fmt: skip
    finally:
        (tmp_path / "kept.png").replace(sets / "train" / "000000.png")


def test_a_flat_folder_of_held_out_images_needs_no_split(sets):
    found = load(synthetic=sets / "synthetic", test_data_dir=sets / "test")
    assert len(found["real"].images) == 60


def test_greys_of_more_than_eight_bits_are_counted(sets, tmp_path, capsys):
    draw(tmp_path / "test", 20, 4)
    scan = Image.fromarray(np.full((16, 16), 4095, np.uint16))
    scan.save(tmp_path / "test" / "000003.png")
    where = {"synthetic": sets / "synthetic", "test_data_dir": tmp_path / "test"}
    assert len(load(**where)["real"].images) == 19
    assert "real images left out: 1 of more than 8 bits" in capsys.readouterr().err
    args = EvaluateArguments(**{k: str(v) for k, v in where.items()}, intensity_range=[0, 4095])
    assert len(load_sets(args, None)["real"].images) == 20
