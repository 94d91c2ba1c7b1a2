"""Folders of parquet files, saved datasets, and one caption for all images."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, List, Value
from datasets import Image as ImageFeature
from PIL import Image

from tests.conftest import BUDGET, train_arguments, train_here
from utils.arguments.training import DataArguments
from utils.data.diagnostics import warn_of_captions
from utils.data.private_set import load_private_set
from utils.data.rows import (
    find_used_template,
    load_rows,
    load_split,
    read_captions,
    read_labels,
)
from utils.errors import UsageError


def encode(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((16, 16), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def write_parquet(folder, count: int, split: str = "train", **more) -> None:
    folder.mkdir(exist_ok=True)
    files = [{"bytes": encode(index), "path": f"{index}.png"} for index in range(count)]
    table = pa.table({"image": files, **more})
    pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")


CARD = """---
dataset_info:
  features:
  - name: image
    struct:
    - name: bytes
      dtype: binary
    - name: path
      dtype: string
  splits:
  - name: train
    num_bytes: 100
    num_examples: 5
configs:
- config_name: default
  data_files:
  - split: train
    path: train-*
---
"""


def test_a_card_that_counts_someone_who_withdrew(tmp_path):
    write_parquet(tmp_path / "set", 4)
    (tmp_path / "set" / "README.md").write_text(CARD)
    assert len(load_split(str(tmp_path / "set"), None, None, "train", tmp_path / "cache")) == 4


@pytest.mark.parametrize("other", ["hospital_b", "train/b", "Part2.PARQUET"])
def test_a_parquet_file_of_no_split_is_named(tmp_path, other):
    """`datasets` would pass over it, for what its name says."""
    folder = tmp_path / "set"
    write_parquet(folder, 4)
    path = folder / (other if other.endswith("PARQUET") else f"{other}.parquet")
    path.parent.mkdir(exist_ok=True)
    path.write_bytes((folder / "train-00000-of-00001.parquet").read_bytes())
    try:
        assert len(load_split(str(folder), None, None, "train", tmp_path / "cache")) == 8
    except UsageError as error:
        assert "1 parquet file(s), such as " in str(error) and "belong to no split" in str(error)


def test_a_dataset_saved_as_one_split_has_no_other(tmp_path):
    rows = Dataset.from_dict({"image": [0, 1]}, split="validation")
    rows.save_to_disk(tmp_path / "saved")
    for split in ("train", "validation", None):  # the first is asked for by default
        assert len(load_split(str(tmp_path / "saved"), None, None, split)) == 2
    with pytest.raises(UsageError, match="'test' of .*: it was saved as one split, validation"):
        load_split(str(tmp_path / "saved"), None, None, "test")


def test_one_caption_for_all_opens_no_image(tmp_path):
    files = [{"bytes": b"no image", "path": None}] * 3
    rows = Dataset.from_dict({"image": files}, features=Features({"image": ImageFeature()}))
    captions = read_captions(rows, DataArguments(caption="a face"))
    assert len(captions) == 3 and list(captions) == captions[:] == ["a face"] * 3


@pytest.mark.parametrize("column", ["label", "labels"])
def test_numbers_of_classes_are_no_captions(column):
    classes = ClassLabel(names=["cat", "dog"])
    features = Features({"label": classes, "labels": List(classes)})
    rows = Dataset.from_dict({"label": [0], "labels": [[1]]}, features=features)
    with pytest.raises(UsageError, match="holds classes, whose captions would be numbers"):
        read_captions(rows, DataArguments(caption_column=column))


@pytest.mark.parametrize("script", ["train_dp_lora", "pretrain_ldm"])
def test_a_template_that_nothing_fills_is_refused(tiny_base, image_folder, tmp_path, script):
    words = ["--train_data_dir", image_folder, "--caption", "a scan", "--output_dir"]
    words += [tmp_path / "run", "--caption_template", "an X-ray of {label}", "--resolution", 16]
    own = ["--pretrained_model_name_or_path", tiny_base, *BUDGET]
    said = train_here([*words, *(own if script == "train_dp_lora" else [])], script)
    assert "--caption_template is filled with labels: give their --label_column" in said


def test_a_zero_or_one_for_every_class_is_no_list_of_labels():
    rows = Dataset.from_dict({"labels": [[0, 1, 0]]})
    with pytest.raises(UsageError, match="a row names a label twice; if it has a 0 or 1 for every"):
        list(read_labels(rows, "labels"))


def test_a_folder_with_a_loading_script(tmp_path):
    folder = tmp_path / "faces"
    folder.mkdir()
    (folder / "faces.py").write_text("import datasets\n")
    with pytest.raises(UsageError, match="cannot read split 'train'.*faces"):
        load_split(str(folder), None, None, "train", tmp_path / "cache")


@pytest.mark.parametrize("files", [{}, {"train.parquet": b"PAR1"}])
def test_a_folder_without_any_rows(tmp_path, files):
    folder = tmp_path / "set"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(UsageError):
        load_rows(DataArguments(dataset_name=str(folder), label_column="x"), tmp_path / "cache")


@pytest.mark.parametrize("splits, found", [(["train", "test"], 3), (["train"], 2), (["a", "b"], 0)])
def test_the_test_images_of_parquet_files_and_of_a_saved_dataset(tmp_path, splits, found):
    sizes = {"train": 2, "test": 3, "a": 2, "b": 2}
    for split in splits:
        write_parquet(tmp_path / "parquet", sizes[split], split)
    saved = {s: Dataset.from_dict({"x": list(range(sizes[s]))}) for s in splits}
    DatasetDict(saved).save_to_disk(tmp_path / "saved")
    kinds = ["saved"] if "a" in splits else ["parquet", "saved"]
    for kind in kinds:
        where = (str(tmp_path / kind), None, None, None, tmp_path / "cache")
        if found:
            assert len(load_split(*where)) == found
        else:
            with pytest.raises(UsageError, match="the test images .* name one"):
                load_split(*where)
            with pytest.raises(UsageError, match="it has the splits a, b: give one as --split"):
                load_split(*where[:3], "train", where[4])


def test_what_pyarrow_writes_can_be_trained_on(tmp_path, tiny_base):
    write_parquet(tmp_path / "set", 20, text=["a cat"] * 20)
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--dataset_name", tmp_path / "set"]
    arguments += ["--caption_column", "text", *BUDGET, "--expected_batch_size", 10]
    arguments += ["--max_train_steps", 1, "--num_validation_images", 0]
    shown = train_here([*arguments, "--output_dir", tmp_path / "run"])
    assert "20 private units" in shown and "saved the weights" in shown


# One caption for all images ----------------------------------------------------------------------


def test_one_caption_for_all_images_wins_over_columns(tmp_path, image_folder):
    rows = load_split(None, None, str(image_folder), "train")
    for caption in ("", "an x-ray"):
        captions = read_captions(rows, DataArguments(caption=caption))
        assert len(captions) == 40 and set(captions) == {caption} and captions[3] == caption
        both = DataArguments(caption=caption, label_column="label")
        assert list(read_captions(rows, both)) == [caption] * 40
    with pytest.raises(UsageError, match="--caption TEXT.*The columns are image, label"):
        read_captions(rows, DataArguments())


def test_images_without_captions_or_labels_train_and_draw(tmp_path, tiny_base, run_script):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.png").write_bytes(encode(index))
    arguments = train_arguments(tiny_base, folder, tmp_path / "run", "--caption", "")
    shown = train_here(arguments)
    assert "20 private units" in shown and "saved the weights" in shown
    draw = ["--pretrained_model_name_or_path", tiny_base, "--adapter", tmp_path / "run"]
    draw += ["--prompts", "", "--num_images", 2, "--num_inference_steps", 2]
    run = run_script("sample.py", *draw, "--output_dir", tmp_path / "drawn")
    assert run.returncode == 0, run.stderr
    rows = load_split(None, None, str(tmp_path / "drawn"), "train")
    assert rows["text"] == ["", ""]


def test_the_caption_is_the_prompt_of_the_samples(tmp_path, tiny_base, image_folder):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    assert "saved the weights" in train_here([*arguments, "--caption", "an x-ray"])
    assert "'an x-ray'" in (tmp_path / "run" / "README.md").read_text()


# The same picture in several rows ----------------------------------------------------------------


def build_private_set(contents: list[bytes], units: list[int]):
    files = [{"bytes": content, "path": None} for content in contents]
    rows = Dataset.from_dict({"image": files, "unit": units})
    return load_private_set(rows, DataArguments(caption="", privacy_unit_column="unit"))


@pytest.mark.parametrize(
    "pictures, units, repeated",
    [
        ([0, 1, 2], [0, 1, 2], 0),
        ([0, 0, 1], [0, 0, 1], 0),  # of one person, which counts once
        ([0, 0, 1], [0, 1, 2], 1),
        ([0, 0, 0, 1, 1, 2], [0, 1, 2, 3, 4, 5], 2),
        ([0, 0, 0], [0, 0, 1], 1),
    ],
)
def test_pictures_in_several_units_are_counted(pictures, units, repeated):
    private_set = build_private_set([encode(p) for p in pictures], units)
    assert private_set.count_repeated() == repeated


def test_it_is_warned_of_repeated_pictures_and_how_many_stays_private(tmp_path, tiny_base, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(20):
        (folder / f"{index}.png").write_bytes(encode(index % 17))
    arguments = train_arguments(tiny_base, folder, tmp_path / "run", "--caption", "")
    assert "saved the weights" in train_here(arguments)
    said = capsys.readouterr().err
    assert (
        "warning: some pictures are in several rows" in said
        and "3" not in said.split("warning: some")[1].split("(how many")[0]
    )
    report = (tmp_path / "run" / "private" / "data.json").read_text()
    assert '"pictures_in_several_units": 3' in report
    public = [p for p in (tmp_path / "run").rglob("*") if p.is_file() and "private" not in p.parts]
    assert not any(b"several_units" in path.read_bytes() for path in public)


@pytest.mark.parametrize("blank", ["", " ", "\t"])
def test_a_blank_label_is_none(blank):
    """As a cell of a table that nobody filled in: it would be a class of its own."""
    with pytest.raises(UsageError, match="a row has no label"):
        list(read_labels(Dataset.from_dict({"label": ["0", blank]}), "label"))


def test_whole_numbers_that_pandas_wrote_as_floats_name_their_classes():
    rows = Dataset.from_dict({"label": [0.0, 1.0, 12.0]})
    assert list(read_labels(rows, "label")) == ["0", "1", "12"]
    for value, said in ((0.5, "a row holds 0.5; a label is"), (float("nan"), "has no label")):
        with pytest.raises(UsageError, match=said):
            list(read_labels(Dataset.from_dict({"label": [1.0, value]}), "label"))


@pytest.mark.parametrize("name", ["./nowhere", "/no/where", "a/b/c", "../scans"])
def test_a_path_that_is_not_there_is_not_asked_of_the_hub(name, monkeypatch):
    monkeypatch.setattr("utils.data.rows.load_dataset", None)
    with pytest.raises(UsageError, match=f"{name.strip('./')} is not a folder"):
        load_split(name, None, None, "train")


def test_a_file_is_no_set(tmp_path):
    (tmp_path / "train.parquet").touch()
    with pytest.raises(UsageError, match="train.parquet is a file: name its folder"):
        load_split(str(tmp_path / "train.parquet"), None, None, "train")


def test_a_template_is_published_only_if_it_made_the_captions():
    """`sample.py --class_names` would fill prompts that nothing was trained on."""
    asked = {"label_column": "label", "caption_template": "a {label}"}
    assert find_used_template(DataArguments(**asked)) == "a {label}"
    for other in ({"caption": "x"}, {"caption": ""}, {"caption_column": "text"}):
        assert find_used_template(DataArguments(**asked, **other)) is None
    assert find_used_template(DataArguments(caption="x")) is None


@pytest.mark.parametrize(
    "feature, values, warned",
    [
        (Value("int64"), [3, 7], True),
        (Value("string"), ["cat", "dog"], False),
        (ClassLabel(names=["cat", "dog"]), [0, 1], False),
        (List(Value("int64")), [[3], [7]], True),
    ],
)
def test_classes_without_names_are_told_of(feature, values, warned, capsys):
    """Whoever asks for images of cats would get what nobody trained."""
    rows = Dataset.from_dict({"label": values}).cast_column("label", feature)
    warn_of_captions(rows, DataArguments(label_column="label", caption_template="a {label}"))
    assert ("captions read like 'a 0'" in capsys.readouterr().err) == warned
    warn_of_captions(rows, DataArguments(caption="a cat"))
    assert capsys.readouterr().err == ""
