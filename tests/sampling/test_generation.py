"""A set that is gone on with is of the prompts, settings and weights that it was begun with."""

import json
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline

from tests.conftest import train_here
from utils.errors import UsageError
from utils.ledger.ledger import Ledger
from utils.sampling.paid_sets import find_paid_set
from utils.sampling.synthetic_sets import read_privacy


def draw(base, output, prompts, *more) -> str:
    arguments = ["--pretrained_model_name_or_path", base, "--prompts_file", prompts, *more]
    return train_here([*arguments, "--num_images", 4, "--output_dir", output], "sample")


@pytest.fixture
def drawn(tiny_base, tmp_path):
    base, prompts = shutil.copytree(tiny_base, tmp_path / "base"), tmp_path / "prompts.txt"
    prompts.write_text("a red cat\u2028asleep\r\n\n a blue dog \n")
    assert "4 images" in draw(base, tmp_path / "set", prompts)
    return base, tmp_path / "set", prompts


def read_all(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_line_is_a_prompt_whatever_else_unicode_calls_a_line(drawn):
    base, folder, _ = drawn
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == 2 * ["a red cat\u2028asleep", "a blue dog"]


@pytest.mark.parametrize("is_begun", [True, False])
def test_other_prompts_in_the_same_file_are_other_images(drawn, is_begun):
    base, folder, prompts = drawn
    if is_begun:  # as after an interruption
        (folder / "000001.png").unlink()
    before = read_all(folder)
    prompts.write_text("a green bird\na black fox\n")
    assert "images of other settings, prompts or weights" in draw(base, folder, prompts)
    assert read_all(folder) == before


def test_another_model_at_the_same_place_draws_other_images(drawn):
    base, folder, prompts = drawn
    pipeline = DiffusionPipeline.from_pretrained(base)
    with torch.no_grad():
        next(pipeline.unet.parameters()).mul_(1.5)
    pipeline.save_pretrained(base)
    (folder / "000001.png").unlink()
    assert "images of other settings, prompts or weights" in draw(base, folder, prompts)
    assert not (folder / "000001.png").exists()


def test_what_was_added_to_a_set_is_not_written_over(drawn, tmp_path):
    base, folder, prompts = drawn
    (folder / "000002.png").write_bytes((folder / "000001.png").read_bytes())
    (folder / "metadata.jsonl").write_text("{}")
    before = read_all(folder)
    assert "holds other images than were drawn" in draw(base, folder, prompts)
    assert read_all(folder) == before
    with pytest.raises(UsageError, match="remove what was added, or draw it anew"):
        find_paid_set(str(folder), Ledger(tmp_path / "ledger.jsonl"), "--synthetic", "")


def test_what_a_desktop_leaves_in_a_set_is_no_part_of_it(drawn):
    """No reader of it takes a hidden file for an image; any other that is added is named."""
    base, folder, prompts = drawn
    (folder / ".DS_Store").write_bytes(b"Bud1")
    (folder / "Thumbs.db").write_bytes(b"\xd0\xcf")
    copy = folder / ".ipynb_checkpoints" / "000001-checkpoint.png"
    copy.parent.mkdir()
    copy.write_bytes((folder / "000001.png").read_bytes())
    assert read_privacy(str(folder), None)[1]["epsilon"]["value"] == 0
    assert "4 images" in draw(base, folder, prompts)
    copy.rename(folder / "000001-copy.png")
    assert "000001-copy.png lies among the images, and" in draw(base, folder, prompts)


@pytest.mark.parametrize("form", ["png", "parquet"])
def test_what_a_power_cut_emptied_is_drawn_again(tiny_base, tmp_path, form):
    """Pieces are not synced one by one."""
    prompts, folder = tmp_path / "prompts.txt", tmp_path / "set"
    prompts.write_text("a red cat\n")
    assert "4 images" in draw(tiny_base, folder, prompts, "--output_format", form)
    (piece,) = [*folder.glob("000001.png"), *folder.glob("data/*.parquet")]
    whole = piece.read_bytes()
    for left in (b"", whole[: len(whole) // 2]):
        piece.write_bytes(left)
        assert "4 images" in draw(tiny_base, folder, prompts, "--output_format", form)
        assert piece.read_bytes() == whole


def test_a_folder_that_cannot_be_taken_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red cat")
    for folder, said in (
        (prompts, "is a file: name a folder"),
        (tmp_path, "already holds other files; name a new folder"),
    ):
        assert said in draw("nowhere", folder, prompts)
    monkeypatch.setattr("os.access", lambda *_: False)  # which root always has
    said = draw("nowhere", tmp_path / "a" / "set", prompts)
    assert f"cannot be written: {tmp_path} is read-only" in said


def test_a_damaged_record_of_a_set_gets_a_sentence(drawn):
    base, folder, prompts = drawn
    (folder / "sampling.json").write_text('{"num')
    assert "sampling.json is not valid JSON" in draw(base, folder, prompts)
    with pytest.raises(UsageError, match="sampling.json is not valid JSON"):
        read_privacy(str(folder), None)
