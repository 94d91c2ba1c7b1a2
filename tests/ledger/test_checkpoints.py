"""Checkpoints on disk: whole or absent, and read without running anything."""

import json
import pickle
from pathlib import Path

import pytest
import torch

from utils.errors import UsageError
from utils.files import hash_file
from utils.ledger.checkpoints import (
    announce_checkpoint,
    empty_unfinished,
    find_newest_intact,
    list_differences,
    list_steps,
    locate_checkpoint,
    read_about,
    read_state,
    rotate,
    save_checkpoint,
    sweep,
    was_left_unfinished,
)


def save(folder: Path, step: int, value: float = 1.0) -> None:
    announce_checkpoint(folder, step)
    save_checkpoint(folder, step, {"weight": torch.tensor([value])}, {"run": "a", "agreed": {}})


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    announce_checkpoint(tmp_path, 3)
    assert was_left_unfinished(tmp_path, 3) and list_steps(tmp_path) == []
    save(tmp_path, 3, 7.0)
    assert not was_left_unfinished(tmp_path, 3) and list_steps(tmp_path) == [3]
    path = locate_checkpoint(tmp_path, 3)
    about = read_about(path)
    assert about["step"] == 3 and about["schema_version"] == 1 and about["run"] == "a"
    assert about["sha256"] == hash_file(path / "state.pt")
    assert read_state(path)["weight"] == 7.0
    save(tmp_path, 3, 8.0)  # once more, after an older one was resumed from
    assert read_state(path)["weight"] == 8.0


def test_the_newest_are_kept_and_the_newest_intact_is_found(tmp_path):
    for step in (2, 10, 9):
        save(tmp_path, step)
    (tmp_path / "checkpoint-11-of-another").mkdir()
    assert list_steps(tmp_path) == [2, 9, 10]
    rotate(tmp_path, 2)
    assert list_steps(tmp_path) == [9, 10]
    rotate(tmp_path, 5)
    assert list_steps(tmp_path) == [9, 10]
    assert find_newest_intact(tmp_path) == (tmp_path / "checkpoint-10", [])
    for content in map(bytes, range(20)):  # of digests before and after the right one
        (tmp_path / "checkpoint-10" / "state.pt").write_bytes(content)
        path, (sentence,) = find_newest_intact(tmp_path)
        assert path == tmp_path / "checkpoint-9"
    assert "checkpoint-10 is missing or damaged: state.pt is not what was written" in sentence
    assert sentence.endswith("; resuming from the one before")
    (tmp_path / "checkpoint-9" / "about.json").unlink()
    with pytest.raises(UsageError, match="there is no intact checkpoint in"):
        find_newest_intact(tmp_path)
    with pytest.raises(UsageError, match="there is no checkpoint in .* start a new run instead"):
        find_newest_intact(tmp_path / "none")


def test_a_checkpoint_of_a_newer_version_is_refused(tmp_path):
    save(tmp_path, 1)
    path = locate_checkpoint(tmp_path, 1)
    about = json.loads((path / "about.json").read_text())
    (path / "about.json").write_text(json.dumps(about | {"schema_version": 2}))
    with pytest.raises(UsageError, match="newer version"):
        read_about(path)


def test_what_is_left_over_is_swept(tmp_path):
    save(tmp_path, 1)
    announce_checkpoint(tmp_path, 2)
    (tmp_path / "deleting-checkpoint-0").mkdir()
    sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    sweep(tmp_path / "none")


def test_what_an_unfinished_checkpoint_holds_is_destroyed_and_its_folder_stays(tmp_path):
    for step in (2, 3):
        announce_checkpoint(tmp_path, step)
        (tmp_path / f"unfinished-{step}" / "state.pt").write_bytes(b"noisy weights")
    empty_unfinished(tmp_path)
    for step in (2, 3):
        assert was_left_unfinished(tmp_path, step)
        assert not list((tmp_path / f"unfinished-{step}").iterdir())


def test_differences_are_named_however_deep():
    then, now = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4}, {"a": 1, "b": {"c": 5, "d": 3}, "f": 6}
    assert list_differences(then, now) == ["c was 2, is 5", "e was 4, is None", "f was None, is 6"]
    assert list_differences(then, then) == []
    assert list_differences({"a": {"b": 1}}, {"a": 2}) == ["a was {'b': 1}, is 2"]
    assert list_differences({"a": None}, {"a": {"b": 1}}) == ["a was None, is {'b': 1}"]


class Bomb:
    def __reduce__(self):
        return print, ("code of a checkpoint was run",)


def test_reading_a_checkpoint_runs_no_code(tmp_path, capsys):
    save(tmp_path, 1)
    torch.save(Bomb(), locate_checkpoint(tmp_path, 1) / "state.pt")
    with pytest.raises(pickle.UnpicklingError):
        read_state(locate_checkpoint(tmp_path, 1))
    assert capsys.readouterr().out == ""
