"""Image folders with links, with folders within folders, and with tables that are no metadata."""

from pathlib import Path

import pytest

from tests.data.test_folders import draw, load, write_csv
from utils.data.folders import is_image_folder, refuse_among_images
from utils.data.rows import read_labels
from utils.errors import UsageError

# What links to what ------------------------------------------------------------------------------


def test_folders_behind_links_are_read_once(tmp_path, capsys):
    elsewhere = tmp_path / "elsewhere"
    for name in ("a", "b"):
        draw(elsewhere / "cats" / f"{name}.png")
    folder = tmp_path / "set"
    draw(folder / "dogs" / "c.png")
    (folder / "cats").symlink_to(elsewhere / "cats")
    (folder / "also dogs").symlink_to(folder / "dogs")
    (folder / "dogs" / "up").symlink_to(folder)
    rows = load(folder)
    assert list(read_labels(rows, "label")) == ["cats", "cats", "dogs"]
    said = "not used: 2 other (a folder that is read already, under another name)"
    assert said in capsys.readouterr().err


def test_results_are_refused_where_a_link_leads(tmp_path):
    """The next run would read its samples, and the sheet of private images, as images of people."""
    draw(tmp_path / "disk" / "cats" / "a.png")
    folder = draw(tmp_path / "scans" / "dogs" / "b.png").parent.parent
    (folder / "cats").symlink_to(tmp_path / "disk")
    refuse_among_images(tmp_path / "run", str(folder))
    for inside in (tmp_path / "disk" / "run", tmp_path / "disk" / "cats", folder / "run"):
        with pytest.raises(UsageError, match="lies in .*scans, whose images are read"):
            refuse_among_images(inside, str(folder))


def test_what_is_private_beside_results_makes_no_classes_of_splits(tmp_path):
    for split in ("train", "test"):
        draw(tmp_path / split / "a.png")
    (tmp_path / "metrics.json").write_text("{}")
    draw(tmp_path / "private" / "closest_pixels.png")
    assert len(load(tmp_path)) == len(load(tmp_path, "test")) == 1


def test_what_a_file_server_leaves_among_images_is_not_read(tmp_path):
    """A thumbnail of each would be a private unit of its own: twice the crowd that there is."""
    draw(tmp_path / "a.png")
    for name in ("@eaDir", "#recycle", "$RECYCLE.BIN"):
        draw(tmp_path / name / "a.png" / "THUMBNAIL.png")
    assert len(load(tmp_path)) == 1


def test_splits_beside_other_folders_are_refused(tmp_path):
    """Or the held-out images would be trained on, as a class of their own."""
    for name in ("train", "bus", "car"):
        draw(tmp_path / name / "a.png")
    assert len(load(tmp_path)) == 3  # three vehicles
    draw(tmp_path / "test" / "a.png")
    with pytest.raises(
        UsageError, match="folders that are splits, and others, such as bus: nobody"
    ):
        load(tmp_path)


def test_photographs_that_cannot_be_read_are_named(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(b"")
    assert is_image_folder(tmp_path)
    with pytest.raises(UsageError, match="1 photographs such as IMG_1.HEIC: convert them to JPEG"):
        load(tmp_path)


def test_a_link_to_nothing_is_counted(tmp_path, capsys):
    draw(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(tmp_path / "gone.png")
    assert len(load(tmp_path)) == 1
    assert "1 images used; not used: 1 .png (a link to nothing)" in capsys.readouterr().err


def test_a_folder_that_may_not_be_read_is_said(tmp_path, monkeypatch):
    draw(tmp_path / "a" / "a.png")
    draw(tmp_path / "b" / "b.png")
    whole = Path.iterdir

    def refused(self):
        if self.name == "b":
            raise PermissionError(13, "Permission denied", str(self))
        return whole(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    with pytest.raises(UsageError, match="Permission denied: .*b"):
        load(tmp_path)


# Classes -----------------------------------------------------------------------------------------


def test_folders_within_folders_are_no_classes(tmp_path, capsys):
    """Of NORMAL/p001/scan.png the patient would be the class, and its name published."""
    for folder in ("NORMAL/p001", "NORMAL/p002", "ILL/p003"):
        draw(tmp_path / folder / "scan.png")
    assert load(tmp_path).column_names == ["image"]
    assert "no column label is made of the folders, since" in capsys.readouterr().err
    assert list(read_labels(load(tmp_path / "NORMAL"), "label")) == ["p001", "p002"]


def test_one_class_deeper_than_another_is_none(tmp_path):
    for path in ("cats/1.png", "cats/more/2.png", "dogs/3.png"):
        draw(tmp_path / path)
    assert load(tmp_path).column_names == ["image"]


def test_what_all_images_lie_in_is_no_class(tmp_path):
    for path in ("images/cats/1.png", "images/dogs/2.png"):
        draw(tmp_path / path)
    assert list(read_labels(load(tmp_path), "label")) == ["cats", "dogs"]


def test_a_column_by_the_name_of_the_classes_wins(tmp_path):
    draw(tmp_path / "images" / "a.png")
    write_csv(tmp_path / "metadata.csv", [{"file_name": "images/a.png", "Label": "cat"}])
    assert load(tmp_path).column_names == ["image", "file_name", "Label"]


# Parquet files beside images ---------------------------------------------------------------------


def test_a_stray_table_does_not_make_a_parquet_set(tmp_path):
    for number in range(3):
        draw(tmp_path / f"train_{number}.png" if number else tmp_path / "other.png")
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "index.parquet").write_bytes(b"PAR1")
    assert len(load(tmp_path)) == 3
    (tmp_path / "embeddings.parquet").write_bytes(b"PAR1")
    with pytest.raises(UsageError, match="holds 3 images, but also embeddings.parquet: which"):
        load(tmp_path)
    (tmp_path / "embeddings.parquet").rename(tmp_path / "train-00000-of-00001.parquet")
    assert not is_image_folder(tmp_path)  # shards, with pictures for a README
