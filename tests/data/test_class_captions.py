"""Captions of classes: told apart by the model, and made as their owner believes."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from datasets import ClassLabel, Dataset, Features
from PIL import Image

from tests.conftest import BUDGET, build_tiny_pipeline, read_json, train_here
from tests.families import build_family
from utils.arguments.training import DataArguments
from utils.data.diagnostics import list_class_captions, warn_of_captions
from utils.data.rows import read_captions
from utils.errors import UsageError
from utils.models.families import find_family

MEANS = ["--release_means", "--generator_steps", 2]


def test_captions_that_the_model_cannot_tell_apart_are_counted():
    family = find_family(build_tiny_pipeline())  # reads eight tokens
    assert family.count_alike([f"the digit {i}" for i in range(10)]) == 0 == family.count_alike([])
    long = "the digit the digit the digit the digit "
    assert family.count_alike([long + "1", long + "2", long + "3", "the digit 1"]) == 2
    assert family.count_alike(["the digit 1", "the Digit 1"]) == 1  # CLIP reads no capitals


def test_one_text_encoder_that_tells_captions_apart_is_enough(monkeypatch):
    family = find_family(build_family("sd3"))
    last, seven = family.tokenizers[-1], SimpleNamespace(input_ids=[[1, 7]] * 10)
    monkeypatch.setattr(type(last), "__call__", lambda self, captions, **options: seven)
    assert family.count_alike([f"the digit {i}" for i in range(10)]) == 0
    assert family.count_alike(["the digit 1"] * 10) == 9


def test_the_captions_of_classes_are_those_of_the_template():
    rows = Dataset.from_dict({"label": [1, 0, 1], "tags": [["a"], ["b"], []]})
    rows = rows.cast_column("label", ClassLabel(names=["cat", "black_dog"]))
    template = {"caption_template": "a {label}"}
    found = list_class_captions(rows, DataArguments(label_column="label", **template))
    assert found == ["a black dog", "a cat"]
    assert list_class_captions(rows, DataArguments(label_column="tags", **template)) == []
    assert list_class_captions(rows, DataArguments(caption="a cat")) == []


def test_they_are_refused_before_anything_is_spent(tiny_base, tmp_path):
    for name in ("pneumonia of the left lung", "pneumonia of the right lung"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    arguments = ["--pretrained_model_name_or_path", tiny_base, *BUDGET, "--label_column", "label"]
    arguments += ["--train_data_dir", tmp_path / "images", "--output_dir", tmp_path / "run"]
    shown = train_here([*arguments, "--caption_template", "a scan of a {label}"])
    assert "1 of the 2 classes have captions that are the same to the model" in shown
    assert "lung" not in shown  # names in a table are not public
    shown = train_here([*arguments, "--caption_template", "a scan of a {label}", *MEANS])
    assert "1 of the 2 classes" in shown
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_a_template_that_is_not_used_is_told_of(capsys):
    rows = Dataset.from_dict({"label": ["cat"], "text": ["a cat"]})
    for other, name in (
        ({"caption": "a"}, "--caption"),
        ({"caption_column": "text"}, "--caption_c"),
    ):
        warn_of_captions(
            rows, DataArguments(caption_template="{label}", label_column="label", **other)
        )
        assert f"captions are those of {name}" in capsys.readouterr().err


def test_a_number_that_names_no_class_is_refused():
    """`datasets` reads such files without a word."""
    names = ClassLabel(names=["cat", "dog", "cow"])
    table = pa.table({"label": [0, 3]}, schema=Features({"label": names}).arrow_schema)
    captions = read_captions(Dataset(table), DataArguments(label_column="label"))
    with pytest.raises(UsageError, match="a row holds 3, but the column names 3 classes, 0 to 2"):
        list(captions)


def test_images_without_a_caption_are_told_of(tiny_base, tmp_path, capsys):
    images = tmp_path / "images"
    images.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (9 * i, 0, 0)).save(images / f"{i}.png")
        (images / f"{i}.txt").write_text("" if i % 4 == 0 else "a cat")
    more = ["--train_data_dir", images, "--caption_column", "text", *BUDGET, "--dry_run"]
    base = ["--pretrained_model_name_or_path", tiny_base, "--output_dir", tmp_path / "run"]
    train_here([*base, *more, "--resolution", 16])
    assert "warning: some captions are empty" in capsys.readouterr().err
    assert read_json(tmp_path / "run" / "private" / "data.json")["captions_empty"] == 5
