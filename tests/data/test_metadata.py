"""Image folders: rows that name a picture several times, paths, scans, and splits."""

import json

import pytest

from tests.data.test_folders import draw, load
from utils.data.rows import number_units
from utils.errors import UsageError


def test_an_image_that_is_named_several_times_is_a_row_each_time(tmp_path):
    """Five captions of each picture; `file_name` can be the privacy unit."""
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    lines = [
        {"file_name": name, "text": f"{name} {i}"}
        for i in range(5)
        for name in ("b.png", "./a.png")
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    rows = load(tmp_path)
    assert rows["file_name"] == ["a.png"] * 5 + ["b.png"] * 5
    assert rows["text"][:5] == [f"./a.png {i}" for i in range(5)]
    assert number_units(rows, "file_name").tolist() == [0] * 5 + [1] * 5
    assert number_units(rows, None).tolist() == list(range(10))


def test_paths_as_windows_writes_them(tmp_path):
    (tmp_path / "sub").mkdir()
    draw(tmp_path / "sub" / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\nsub\\a.png,a cat\n")
    assert load(tmp_path)["text"] == ["a cat"]


def test_a_folder_of_scans_says_how_to_convert_them(tmp_path):
    for name in ("1.dcm", "2.DCM"):
        (tmp_path / name).write_bytes(b"\0" * 128 + b"DICM")
    with pytest.raises(UsageError, match="but 2 scans such as 1.dcm: convert .* --intensity_range"):
        load(tmp_path)


def test_one_class_alone(tmp_path):
    (tmp_path / "benign").mkdir()
    draw(tmp_path / "benign" / "a.png")
    rows = load(tmp_path)
    assert rows.features["label"].names == ["benign"] and rows["label"] == [0]


@pytest.mark.parametrize(
    "folders, split, found",
    [
        ([""], None, ""),  # flat: the only split there is
        (["test", "train"], None, "test"),
        (["val"], None, "val"),
        (["train", "val"], None, None),
        ([""], "test", None),
        (["cat", "dog"], None, ""),
    ],
)
def test_which_images_are_the_test_images(tmp_path, folders, split, found):
    for name in folders:
        (tmp_path / name).mkdir(exist_ok=True)
        draw(tmp_path / name / "a.png")
    if found is None:
        with pytest.raises(UsageError, match="split"):
            load(tmp_path, split)
    else:
        assert len(load(tmp_path, split)) == sum(1 for n in folders if n.startswith(found))
