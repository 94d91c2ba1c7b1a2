"""Image folders as people have them: which files are in the set, and what is said of the others."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from utils.arguments.training import DataArguments
from utils.data.folders import load_image_folder
from utils.data.rows import load_split, read_captions, read_labels
from utils.data.units import number_units
from utils.errors import UsageError


def draw(path: Path, shade: int = 100) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), (shade % 256, 0, 0)).save(path)
    return path


def load(folder: Path, split: str = "train"):
    return load_split(None, None, str(folder), split)


def names(rows) -> list[str]:
    raw = rows.cast_column("image", rows.features["image"].__class__(decode=False))
    return [Path(image["path"]).name for image in raw["image"]]


def write_csv(path: Path, rows: list[dict], encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


@pytest.mark.parametrize(
    "special",
    ["train_{}.png", "test-{}.png", "rapid test {}.png", "val.{}.png", "{} eval.png", "dev{}.png"],
)
def test_a_split_word_in_a_name_decides_nothing(tmp_path, special):
    for label in ("cats", "dogs"):
        for number in range(30):
            name = special.format(number) if number < 6 else f"scan {number}.png"
            draw(tmp_path / label / name)
    rows = load(tmp_path)
    assert len(rows) == 60
    assert list(read_labels(rows, "label")) == ["cats"] * 30 + ["dogs"] * 30


def test_one_wreck_beside_twenty_scans(tmp_path):
    for number in range(20):
        draw(tmp_path / f"{number:02}.png")
    draw(tmp_path / "train_wreck.png")
    assert len(load(tmp_path)) == 21


def test_a_class_called_train(tmp_path):
    for label in ("bus", "car", "train"):
        for number in range(3):
            draw(tmp_path / label / f"{number}.png")
    rows = load(tmp_path)
    assert sorted(set(read_labels(rows, "label"))) == ["bus", "car", "train"] and len(rows) == 9


@pytest.mark.parametrize("train, test", [("train", "test"), ("Training", "eval"), ("train", "val")])
def test_folders_that_are_splits(tmp_path, train, test):
    for split, count in ((train, 4), (test, 2)):
        for number in range(count):
            draw(tmp_path / split / "ones" / f"{number}.png")
    assert len(load(tmp_path)) == 4
    split = "validation" if test == "val" else "test"
    rows = load(tmp_path, split)
    assert len(rows) == 2 and list(read_labels(rows, "label")) == ["ones", "ones"]
    missing = "test" if test == "val" else "validation"
    with pytest.raises(UsageError, match=f"has the splits .*: not '{missing}'"):
        load(tmp_path, missing)


def test_images_beside_splits_are_refused(tmp_path):
    """Else they would make classes of the splits, and test images private ones."""
    for split in ("train", "test"):
        draw(tmp_path / split / "0.png")
    draw(tmp_path / "preview.png")
    with pytest.raises(UsageError, match="and images beside them, such as preview.png: move"):
        load(tmp_path)


def test_a_folder_without_splits_has_only_train(tmp_path):
    draw(tmp_path / "a.png")
    with pytest.raises(UsageError, match="not divided into splits, so it has only 'train'"):
        load(tmp_path, "test")


# Metadata ----------------------------------------------------------------------------------------


def test_what_metadata_names_but_a_set_has_not_is_counted(tmp_path, capsys):
    folder = tmp_path / "set"
    named = ["a.png", ".b.png", ".c/c.png", "../pool/d.png", "gone.png"]
    for name in named[:-1]:
        draw(folder / name)
    write_csv(folder / "metadata.csv", [{"file_name": name, "text": name} for name in named])
    assert load(folder)["text"] == ["a.png"]
    said = capsys.readouterr().err
    assert "3 .png (in the metadata, but hidden, elsewhere, or no image)" in said
    assert "1 .png (in the metadata, but not there)" in said


def test_metadata_of_all_splits_names_those_of_others(tmp_path, capsys):
    named = [draw(tmp_path / split / "a.png").relative_to(tmp_path) for split in ("train", "test")]
    write_csv(tmp_path / "metadata.csv", [{"file_name": f"{name}", "text": "x"} for name in named])
    assert len(load(tmp_path)) == 1 and capsys.readouterr().err == ""


def test_text_in_a_table_stays_as_it_is_written(tmp_path):
    captions = ["None", "N/A", "null", "NaN", "", "1e3", " padded "]
    patients = ["007", "7", "1e3", "1000", "NB", "True", "7.0"]
    table = []
    for number, (caption, patient) in enumerate(zip(captions, patients, strict=True)):
        draw(tmp_path / f"{number}.png")
        table.append({"file_name": f"{number}.png", "text": caption, "patient_id": patient})
    write_csv(tmp_path / "metadata.csv", table)
    rows = load(tmp_path)
    assert list(read_captions(rows, DataArguments(caption_column="text"))) == captions
    assert number_units(rows, "patient_id").tolist() == list(range(7))


@pytest.mark.parametrize("name", ["metadata.csv", "Metadata.CSV"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_by_another_spelling_or_program(tmp_path, name, encoding):
    draw(tmp_path / "a.png")
    write_csv(tmp_path / name, [{"file_name": "a.png", "text": 'an "ä", and\nmore'}], encoding)
    assert load(tmp_path)["text"] == ['an "ä", and\nmore']


def test_classes_and_metadata_are_both_kept(tmp_path):
    table = []
    for label in ("sick", "well"):
        for number in range(2):
            draw(tmp_path / label / f"{number}.png")
            table.append({"file_name": f"{label}/{number}.png", "patient_id": f"p{number}"})
    write_csv(tmp_path / "metadata.csv", table)
    rows = load(tmp_path)
    assert list(read_labels(rows, "label")) == ["sick", "sick", "well", "well"]
    assert number_units(rows, "patient_id").tolist() == [0, 1, 0, 1]


def test_a_table_in_each_folder_or_above_the_splits(tmp_path):
    for split in ("train", "test"):
        draw(tmp_path / split / "a.png")
        write_csv(tmp_path / split / "metadata.csv", [{"file_name": "a.png", "text": split}])
    assert load(tmp_path)["text"] == ["train"] and load(tmp_path, "test")["text"] == ["test"]
    for split in ("train", "test"):
        (tmp_path / split / "metadata.csv").unlink()
    lines = [{"file_name": f"{split}/a.png", "text": split} for split in ("train", "test")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert load(tmp_path)["text"] == ["train"] and load(tmp_path, "test")["text"] == ["test"]


def test_what_is_not_used_is_counted_with_its_reason(tmp_path, capsys):
    for number in range(4):
        draw(tmp_path / f"{number}.png")
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "scan.dcm").write_bytes(b"")
    (tmp_path / "IM00001").write_bytes(b"\0" * 128 + b"DICM")
    (tmp_path / "captions.csv").write_text("file_name,text\n0.png,x\n")
    (tmp_path / ".DS_Store").write_bytes(b"")
    table = [{"file_name": f"{number}.png", "text": "x"} for number in (0, 1, 2, 9)]
    write_csv(tmp_path / "metadata.csv", table)
    assert names(load(tmp_path)) == ["0.png", "1.png", "2.png"]
    said = capsys.readouterr().err
    assert "3 images used" in said
    for part in (
        "1 .png (not in the metadata)",
        "1 .png (in the metadata, but not there)",
        "1 .txt (not an image)",
        "1 .dcm (a scan, convert it)",
        "1 other (a scan, convert it)",
        "1 .csv (a table is read if it is metadata.csv or .jsonl)",
    ):
        assert part in said
    assert said.count(".csv (") == 1 and "DS_Store" not in said


def test_nothing_is_said_where_all_is_used(tmp_path, capsys):
    draw(tmp_path / "a.png")
    load(tmp_path)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "lines, sentence",
    [
        (['{"file_name": "train/a.png"}'], "it names train/a.png, and .* did you mean a.png"),
        (['{"file_name": "b.png"}'], "none of the images is in"),
        (['{"text": "x"}'], "row 1 has no file_name"),
        (['{"file_name": "a.png"}', "[1]"], "row 2 has no file_name"),
        (["{broken"], "cannot read"),
        (['{"file_name": "a.png", "image": "x"}'], "has a column 'image'"),
    ],
)
def test_metadata_that_cannot_be_followed_gets_a_sentence(tmp_path, lines, sentence):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    with pytest.raises(UsageError, match=sentence):
        load(tmp_path)


def test_a_row_with_too_many_fields_is_refused(tmp_path):
    draw(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a cat, asleep\n")
    with pytest.raises(UsageError, match="more or fewer fields"):
        load(tmp_path)


def test_values_of_several_kinds_in_one_column_are_refused(tmp_path):
    for name in ("a.png", "b.png"):
        draw(tmp_path / name)
    lines = [{"file_name": "a.png", "id": 7}, {"file_name": "b.png", "id": "007"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(UsageError, match=r"mixes kinds in one column \(id\)") as refused:
        load(tmp_path)
    assert "007" not in str(refused.value)  # nor what another row says


# Captions beside the images ----------------------------------------------------------------------


def test_captions_in_text_files_beside_the_images(tmp_path, capsys):
    for number in range(3):
        draw(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(f"caption {number}\n")
    rows = load(tmp_path)
    assert rows["text"] == ["caption 0", "caption 1", "caption 2"]
    assert capsys.readouterr().err == ""
    (tmp_path / "1.txt").unlink()
    with pytest.raises(UsageError, match="1 of the 3 images .* have no .txt"):
        load(tmp_path)


def test_an_archive_is_named(tmp_path):
    (tmp_path / "images.zip").write_bytes(b"PK")
    with pytest.raises(UsageError, match="holds no images: unpack images.zip first"):
        load(tmp_path)


WORDS = ["train", "test", "val", "cat", "metadata", "0", "a b"]


@settings(max_examples=60, deadline=None)
@given(
    files=st.sets(
        st.tuples(st.sampled_from(["", "cats/", "train/", "dogs/"]), st.sampled_from(WORDS)),
        min_size=2,
        max_size=10,
    ),
    data=st.data(),
)
def test_one_more_image_changes_no_other_row(tmp_path_factory, files, data):
    """But where it makes splits of classes, or the reverse, which changes the set as a whole."""
    folder = tmp_path_factory.mktemp("set")
    extra = data.draw(st.sampled_from(sorted(files)))
    others = sorted(files - {extra})
    draw(folder / "keep" / "0.png")  # a class, so that `train` is one too
    for number, (where, word) in enumerate(others):
        draw(folder / f"{where}{word}.png", number)
    before = set(names_with_labels(load_image_folder(folder, "train"), folder))
    draw(folder / f"{extra[0]}{extra[1]}.png", 250)
    after = set(names_with_labels(load_image_folder(folder, "train"), folder))
    assert len(after) == len(before) + 1 and before <= after


def names_with_labels(rows, folder: Path) -> list[tuple[str, str | None]]:
    label = rows.features.get("label")
    raw = rows.cast_column("image", rows.features["image"].__class__(decode=False))
    paths = [str(Path(image["path"]).relative_to(folder)) for image in raw["image"]]
    numbers = rows["label"] if label is not None else [None] * len(rows)
    return [
        (path, None if number is None else label.int2str(number))
        for path, number in zip(paths, numbers, strict=True)
    ]
