"""Means, then a selection, then training: one command, one ledger, one budget."""

import json

import pytest

from tests.conftest import BUDGET, read_json, train_arguments, train_here
from utils.files import hash_file
from utils.ledger.charges import list_charged_events
from utils.ledger.ledger import Ledger
from utils.ledger.verification import find_problems, read_source
from utils.sampling.shards import hash_set

SMALL = ["--generator_steps", 2, "--num_synthetic_images", 40, "--num_frequencies", 50]
STAGES = ["--release_means", "--select_saliency", "--warm_start_steps", 2, "--top_ratio", "0.5"]


def test_all_three_compose_to_the_target(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL, *STAGES)
    shown = train_here(arguments)
    assert "saved the weights" in shown, shown
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["means", "selection", "training"]
    target = float(BUDGET[BUDGET.index("--target_epsilon") + 1])
    assert target - 0.02 < statement["epsilon"]["add_or_remove_one"] <= target
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []
    records = Ledger(tmp_path / "run" / "private" / "ledger.jsonl").records()
    assert list_charged_events(records) == statement["events"]
    for stage in ("means", "selection"):
        assert find_problems(read_source(str(tmp_path / "run" / stage), None)) == []


def test_only_the_means_of_a_valid_statement_lie_beside_the_weights(tmp_path):
    """A statement that someone wrote accounts for nothing, nor does one anywhere else."""
    statement = {"files": {"means.safetensors": None}, "private": True}
    for folder in ("means", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "means.safetensors").write_bytes(b"x")
        statement["files"]["means.safetensors"] = hash_file(tmp_path / folder / "means.safetensors")
        (tmp_path / folder / "privacy.json").write_text(json.dumps(statement))
    (tmp_path / "privacy.json").write_text("{}")
    extras = set(read_source(str(tmp_path), None).extras)
    assert extras == {"means/means.safetensors", "other/means.safetensors"}


@pytest.mark.parametrize(
    "added", ["001.jpg", "metadata.csv", "sub/grid.png", "000003.txt", "x.arrow", "train.parquet"]
)
def test_a_file_of_any_kind_that_joins_a_set_changes_its_digest(tmp_path, added):
    """Else private images could be slipped in, and trained on for nothing."""
    (tmp_path / "000000.png").write_bytes(b"an image")
    before = hash_set(tmp_path)
    for beside in ("grid.png", "metrics.json", "report.html", "privacy.json"):
        (tmp_path / beside).write_bytes(b"left by a script")
    assert hash_set(tmp_path) == before
    (tmp_path / added).parent.mkdir(exist_ok=True)
    (tmp_path / added).write_bytes(b"private")
    assert hash_set(tmp_path) != before


def test_a_private_result_is_not_made_free(tiny_base, image_folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "privacy.json").write_text("{}")
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    shown = train_here([*arguments, "--warm_start", tmp_path / "set", "--warm_start_is_public"])
    assert "--warm_start_is_public" in shown and "called public and lose that epsilon" in shown


def test_a_stage_of_other_settings_is_not_taken_over(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL)
    arguments += ["--release_means", "--warm_start_steps", 2]
    wrong = train_here([*arguments, "--target_modules", "nothing"])
    assert wrong.startswith("error: ")  # after the means were released, and before training
    again = train_here([*arguments, "--length_scale", 7])
    assert "was made with other settings: length_scale was 20.0, is 7.0" in again
    assert "saved the weights" in train_here(arguments)
    records = Ledger(tmp_path / "run" / "private" / "ledger.jsonl").records()
    events = list_charged_events(records)
    assert [(e["purpose"], e["steps"]) for e in events] == [("means", 1), ("training", 3)]


def test_what_cannot_be_trained_afterwards_is_refused_first(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL)
    shown = train_here([*arguments, "--release_means", "--release_epsilon", 9])
    assert shown.startswith("error: ")
    ledger = tmp_path / "run" / "private" / "ledger.jsonl"
    assert not ledger.exists() or list_charged_events(Ledger(ledger).records()) == []
    assert "not both" in train_here([*arguments, "--release_means", "--warm_start", "x"])
