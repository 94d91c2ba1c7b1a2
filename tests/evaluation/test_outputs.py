"""What an evaluation leaves is read as part of no set: it holds pictures of private images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from tests.data.test_folders import draw, load
from utils.arguments.evaluation import EvaluateArguments
from utils.data.images import read_synthetic
from utils.errors import UsageError
from utils.evaluation.outputs import choose_output
from utils.files import SAMPLING_SETTINGS
from utils.sampling.shards import hash_set


def choose(synthetic: Path, **more) -> Path:
    return choose_output(EvaluateArguments(synthetic=str(synthetic), **more))


def test_a_set_of_another_kind_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    draw(tmp_path / "peer" / "a.png")
    draw(tmp_path / "runs" / "peer" / "a.png")
    assert choose(tmp_path / "peer") == Path("runs/peer/metrics.json")
    assert choose(Path("runs/peer")) == Path("runs/peer-evaluation/metrics.json")


@pytest.mark.parametrize("option", ["synthetic", "test_data_dir", "private_data_dir"])
def test_nothing_is_written_among_images(tmp_path, option):
    folders = {}
    for name in ("synthetic", "test_data_dir", "private_data_dir"):
        folders[name] = str(draw(tmp_path / name / "a.png").parent)
    inside = tmp_path / option / "results" / "metrics.json"
    with pytest.raises(UsageError, match=f"lies in .*{option}, whose images are read"):
        choose_output(EvaluateArguments(**folders, output_file=str(inside)))
    assert not inside.parent.exists()


def test_beside_a_set_of_ours_it_is_no_part_of_that(tmp_path):
    """Nor are images that somebody puts there, which no epsilon would cover."""
    folder = tmp_path / "set"
    draw(folder / "a.png")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "a.png", "text": "x"}))
    (folder / SAMPLING_SETTINGS).write_text("{}")
    assert choose(folder) == folder / "metrics.json"
    with pytest.raises(UsageError, match="whose images are read"):  # any other name is one of it
        choose(folder, output_file=str(folder / "second.json"))
    digest = hash_set(folder)
    named = draw(folder / "private" / "patient.png").name
    (folder / "private" / "metadata.jsonl").write_text(
        json.dumps({"file_name": named, "text": "secret"})
    )
    assert hash_set(folder) == digest
    assert load(folder)["text"] == ["x"] and len(read_synthetic(str(folder), "--set")) == 1


def test_what_lies_behind_a_link_changes_a_sets_digest(tmp_path):
    elsewhere = draw(tmp_path / "elsewhere" / "b.png").parent
    folder = draw(tmp_path / "set" / "a.png").parent
    digest = hash_set(folder)
    (folder / "more").symlink_to(elsewhere)
    assert len(load(folder)) == 2 and hash_set(folder) != digest
    more = hash_set(folder)
    Image.new("RGB", (8, 8), "red").save(elsewhere / "b.png")
    assert hash_set(folder) != more


def test_a_class_called_private_is_one(tmp_path):
    draw(tmp_path / "private" / "a.png")
    draw(tmp_path / "public" / "b.png")
    assert len(load(tmp_path)) == 2
