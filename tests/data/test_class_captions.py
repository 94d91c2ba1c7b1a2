"""Captions of classes: told apart by the model, and made as their owner believes."""

import numpy as np
import pytest
from datasets import ClassLabel, Dataset
from PIL import Image

from tests.conftest import BUDGET, build_tiny_pipeline, train_here
from utils.arguments.training import DataArguments
from utils.data.diagnostics import list_class_captions
from utils.errors import UsageError
from utils.models.families import find_family


def test_two_classes_that_the_model_cannot_tell_apart_are_refused():
    family = find_family(build_tiny_pipeline())  # reads eight tokens
    family.check_classes([f"the digit {i}" for i in range(10)])
    family.check_classes(["the digit 3", "the digit 3"])  # one class, written in two ways
    long = "the digit the digit the digit the digit "
    with pytest.raises(UsageError, match="reads 8 tokens, to which '.* 1' and '.* 2' are the same"):
        family.check_classes([long + "1", long + "2"])


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
    assert "are the same: give a shorter --caption_template" in shown
    for other in (["--caption", "a scan"], ["--caption_column", "label"]):
        shown = train_here([*arguments, "--caption_template", "{label}", *other])
        assert f"{other[0]} and --caption_template both say what captions are" in shown
    assert not list(tmp_path.rglob("ledger.jsonl"))
