"""sample.py --reject: the least typical images are left out, by synthetic images alone."""

import json

import pytest
import torch
from PIL import Image

from tests.conftest import read_json, train_arguments, train_here
from utils.ledger.statement import STOPPED
from utils.sampling import rejection
from utils.sampling.paid_sets import read_sampling
from utils.sampling.rejection import keep_typical
from utils.sampling.shards import hash_set

PROMPTS = ["--class_names", *"0123", "--caption_template", "the digit {label}"]


def draw(base, output, *more) -> str:
    arguments = ["--pretrained_model_name_or_path", base, *PROMPTS, "--num_images", 10]
    return train_here([*arguments, "--output_dir", output, *more], "sample")


def read_pngs(folder) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.glob("0*.png"))]


def test_the_most_typical_of_each_prompt_stay_in_their_order():
    scores = torch.tensor([0.0, -9, -1, -8, -2, -7, -3, -6])  # prompts 0 and 1 in turn
    assert keep_typical(scores, 2, 4) == [0, 5, 2, 7]
    assert keep_typical(scores, 2, 3) == [0, 7, 2]


@pytest.mark.parametrize("how", ["png", "parquet"])
def test_more_are_drawn_than_are_left(tiny_base, tmp_path, monkeypatch, how):
    monkeypatch.setattr(rejection, "STEPS", 3)
    more = ["--reject", 0.5, "--output_format", how]
    assert "10 images" in draw(tiny_base, tmp_path / "set", *more)
    assert "24 images" in draw(tiny_base, tmp_path / "all", "--num_images", 24)
    assert not (tmp_path / "set" / "drawn").exists()
    settings = read_json(tmp_path / "set" / "sampling.json")
    assert settings["reject"] == 0.5 and settings["set"] == hash_set(tmp_path / "set")
    if how == "png":
        kept = read_pngs(tmp_path / "set")
        assert len(kept) == 10 and set(kept) <= set(read_pngs(tmp_path / "all"))
        lines = (tmp_path / "set" / "metadata.jsonl").read_text().splitlines()
        assert [json.loads(line)["label"] for line in lines] == [*"0123012301"]
    before = hash_set(tmp_path / "set")
    monkeypatch.setattr(rejection, "generate_folder", None)  # all is there: nothing is drawn
    assert "10 images" in draw(tiny_base, tmp_path / "set", *more)
    assert hash_set(tmp_path / "set") == before


def test_an_interrupted_set_is_drawn_on(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "STEPS", 3)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rejection, "score_images", stop)
        draw(tiny_base, tmp_path / "set", "--reject", 0.5)
    assert read_sampling(str(tmp_path / "set")).get("set") is None  # not a set that can be built on
    assert "10 images" in draw(tiny_base, tmp_path / "set", "--reject", 0.5)
    assert len(read_pngs(tmp_path / "set")) == 10


def test_a_set_that_was_killed_at_its_end_is_finished(tiny_base, tmp_path, monkeypatch):
    """All of its images are there, and so are those that it was chosen from."""
    monkeypatch.setattr(rejection, "STEPS", 3)

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rejection, "finish_folder", stop)
        draw(tiny_base, tmp_path / "set", "--reject", 0.5)
    (tmp_path / "set" / "drawn").mkdir(exist_ok=True)
    (tmp_path / "set" / "drawn" / "000000.png").write_bytes(b"left over")
    assert "10 images" in draw(tiny_base, tmp_path / "set", "--reject", 0.5)
    assert (tmp_path / "set" / "metadata.jsonl").exists()
    assert not (tmp_path / "set" / "drawn").exists()
    assert read_sampling(str(tmp_path / "set"))["set"] == hash_set(tmp_path / "set")


@pytest.mark.parametrize("more", [[], ["--reject", 0.5]])
def test_a_finished_set_with_other_images_is_not_taken_for_it(
    tiny_base, tmp_path, monkeypatch, more
):
    """Drawing it again would else note the digest of what was slipped in."""
    monkeypatch.setattr(rejection, "STEPS", 3)
    draw(tiny_base, tmp_path / "set", *more)
    digest = read_sampling(str(tmp_path / "set"))["set"]
    first, second = (tmp_path / "set" / f"00000{i}.png" for i in (0, 1))
    first.write_bytes(second.read_bytes())
    assert "holds other images than were drawn" in draw(tiny_base, tmp_path / "set", *more)
    assert read_sampling(str(tmp_path / "set"))["set"] == digest


def test_a_picture_among_those_that_are_being_drawn_is_none_of_them(tiny_base, tmp_path):
    """The digest of the whole set would else call it drawn."""
    draw(tiny_base, tmp_path / "set")
    record = tmp_path / "set" / "sampling.json"
    unfinished = {k: v for k, v in json.loads(record.read_text()).items() if k != "set"}
    record.write_text(json.dumps(unfinished))
    (tmp_path / "set" / "000003.png").unlink()
    Image.new("RGB", (16, 16)).save(tmp_path / "set" / "scan.png")
    assert "scan.png lies among the images, and was not drawn" in draw(tiny_base, tmp_path / "set")
    assert "set" not in read_sampling(str(tmp_path / "set"))
    (tmp_path / "set" / "scan.png").unlink()
    assert "10 images" in draw(tiny_base, tmp_path / "set")


def test_another_set_may_judge(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "STEPS", 3)
    draw(tiny_base, tmp_path / "other")
    by = ["--reject", 0.3, "--reject_by", tmp_path / "other"]
    assert "10 images" in draw(tiny_base, tmp_path / "set", *by)
    wrong = draw(tiny_base, tmp_path / "wrong", *by, "--class_names", "7", "8")
    assert "has no image of the prompt 'the digit 7'" in wrong


def test_a_judge_that_cost_privacy_must_be_covered(tiny_base, image_folder, tmp_path, monkeypatch):
    """Else images would be chosen by what their statement does not know of."""
    monkeypatch.setattr(rejection, "STEPS", 3)
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--release_means")
    arguments += ["--generator_steps", 1, "--num_synthetic_images", 8, "--num_frequencies", 10]
    assert "saved" in train_here([*arguments, "--warm_start_steps", 1])
    judge = ["--reject", 0.3, "--reject_by", tmp_path / "run" / "means" / "set"]
    adapter = ["--adapter", tmp_path / "run"]
    statement = tmp_path / "run" / "means" / "set" / "privacy.json"
    told = read_json(statement)
    statement.write_text(json.dumps(told | {"not_covered": [*told["not_covered"], STOPPED]}))
    assert "10 images" in draw(tiny_base, tmp_path / "good", *judge, *adapter)
    own, drawn = (read_json(tmp_path / name / "privacy.json") for name in ("run", "good"))
    assert drawn == own | {"not_covered": [*own["not_covered"], STOPPED]}
    assert "does not cover" in draw(tiny_base, tmp_path / "bad", *judge)
    private = ["--reject", 0.3, "--reject_by", image_folder]
    assert "has no privacy.json" in draw(tiny_base, tmp_path / "bad", *private, *adapter)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "more, said",
    [
        (["--reject", 1], "--reject 1.0 must be at least 0 and below 1"),
        (["--reject_by", "x"], "--reject_by needs --reject"),
        (["--reject", 0.5, "--reject_by", "/nowhere"], "--reject_by /nowhere is not a folder"),
    ],
)
def test_mistakes_get_a_sentence(tiny_base, tmp_path, more, said):
    shown = draw(tiny_base, tmp_path / "set", *more)
    assert shown.startswith("error: ") and said in shown


def test_one_prompt_is_nothing_to_compare(tiny_base, tmp_path):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--prompts", "a digit"]
    arguments += ["--reject", 0.5, "--output_dir", tmp_path / "set"]
    assert "compares prompts: give two or more" in train_here(arguments, "sample")
