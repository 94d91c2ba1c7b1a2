"""Clause 8: the ledger is ahead of the release, whenever the run dies."""

import json
import subprocess

import pytest

from tests.conftest import (
    ROOT,
    quiet_environment,
    read_json,
    train_arguments,
    train_here,
)
from tests.forks import run_in_fork
from tests.killed_runs import POINTS
from utils.errors import UsageError
from utils.ledger.checkpoints import list_steps, locate_checkpoint, read_about, read_state
from utils.ledger.ledger import Ledger
from utils.ledger.verification import find_problems, read_source
from utils.privacy.accounting import pld_epsilon

FEW = ["--rank", 2, "--checkpointing_steps", 1, "--num_validation_images", 1]


def kill(module, *arguments):
    """Run `tests/killed_runs.py` or `tests/killed_stages.py`."""
    return run_in_fork(["-m", f"tests.{module}", *arguments], ROOT, quiet_environment())


@pytest.mark.parametrize(
    "random", [0, pytest.param(10, marks=(pytest.mark.slow, pytest.mark.promise))]
)
def test_kill_9_at_any_moment_loses_nothing_and_hides_nothing(
    tiny_base, image_folder, tmp_path, random
):
    """At 19 chosen moments, or at 10 random ones; see `tests/killed_runs.py`."""
    run = kill("killed_runs", tiny_base, image_folder, tmp_path, "--random", random)
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.splitlines()[-1]
    print(summary)
    counts = json.loads(summary)
    assert counts["killed"] == (random or len(POINTS)) <= counts["trials"]
    assert random or counts["resumed"] >= len(POINTS) // 2


def test_a_checkpoint_before_its_release_is_caught(tiny_base, image_folder, tmp_path):
    run = kill("killed_runs", tiny_base, image_folder, tmp_path, "--random", 0, "--late_release")
    assert run.returncode != 0 and "that the ledger does not know" in run.stderr


@pytest.fixture(scope="module")
def finished(tiny_base, image_folder, tmp_path_factory):
    """A run of three steps, each with its checkpoint; and how to go on with a copy of it."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    more = [*FEW, "--checkpoints_total_limit", 9, "--freeze_lora_a", "--ema_decay", 0.5]
    start(tiny_base, image_folder, output, *more)
    return output, more


def start(base, images, output, *more) -> str:
    """Train; returns what was said."""
    return train_here(train_arguments(base, images, output, *more))


def copy_folder(folder, target):
    subprocess.run(["cp", "-r", folder, target], check=True)
    return target


def spent_on(output) -> float:
    statement = read_json(output / "privacy.json")
    assert not find_problems(read_source(str(output), None))
    return statement["epsilon"]["add_or_remove_one"]


def test_going_on_from_the_last_checkpoint_costs_nothing(
    finished, tiny_base, image_folder, tmp_path
):
    output = copy_folder(finished[0], tmp_path / "run")
    before = (output / "pytorch_lora_weights.safetensors").read_bytes()
    planned = spent_on(output)
    start(tiny_base, image_folder, output, *finished[1], "--resume_from_checkpoint", "latest")
    assert spent_on(output) == planned
    assert len((output / "pytorch_lora_weights.safetensors").read_bytes()) == len(before)


def test_going_on_from_an_older_one_charges_the_difference(
    finished, tiny_base, image_folder, tmp_path
):
    output = copy_folder(finished[0], tmp_path / "run")
    more = [*finished[1], "--resume_from_checkpoint", "checkpoint-1"]
    said = start(tiny_base, image_folder, output, *more)
    assert "charges 2 steps once more" in said
    statement = read_json(output / "privacy.json")
    assert [event["steps"] for event in statement["events"]] == [5]  # 3, and 2 of them again
    assert spent_on(output) == pld_epsilon(statement["events"], statement["delta"])
    assert spent_on(output) > spent_on(finished[0]) + 0.1


def test_a_damaged_checkpoint_falls_back_and_is_charged(
    finished, tiny_base, image_folder, tmp_path
):
    output = copy_folder(finished[0], tmp_path / "run")
    state = output / "private" / "checkpoints" / "checkpoint-3" / "state.pt"
    state.write_bytes(state.read_bytes()[:-100])
    more = [*finished[1], "--resume_from_checkpoint", "latest"]
    said = start(tiny_base, image_folder, output, *more)
    assert "checkpoint-3 is missing or damaged" in said and "resuming from the one before" in said
    assert [event["steps"] for event in read_json(output / "privacy.json")["events"]] == [4]
    assert spent_on(output) > spent_on(finished[0])


def test_latest_without_a_checkpoint_is_an_error(tiny_base, image_folder, tmp_path):
    latest = ["--resume_from_checkpoint", "latest"]
    assert "holds no run" in start(tiny_base, image_folder, tmp_path / "none", *latest)
    (tmp_path / "empty" / "private").mkdir(parents=True)
    said = start(tiny_base, image_folder, tmp_path / "empty", *latest)
    assert "there is no checkpoint" in said and "start a new run" in said


CHANGES = [
    (["--noise_multiplier", 2.0], "noise_multiplier was"),
    (["--max_train_steps", 9], "steps was 3, is 9"),
    (["--max_grad_norm", 0.5], "max_grad_norm was 1.0, is 0.5"),
    (["--rank", 3], "rank was 2, is 3"),
    (["--lora_alpha", 7], "lora_alpha was None, is 7"),
    (["--learning_rate", 5e-2], "learning_rate was 0.065, is 0.05"),
    (["--caption_template", "a {label}"], "caption_template was"),
    (["--optimizer", "sgd"], "optimizer was adamw, is sgd"),
]


@pytest.mark.parametrize("change, difference", CHANGES)
def test_a_changed_plan_or_adapter_is_refused_naming_it(
    finished, tiny_base, image_folder, tmp_path, change, difference
):
    output = copy_folder(finished[0], tmp_path / "run")
    arguments = train_arguments(tiny_base, image_folder, output, *finished[1])
    if change[0] == "--noise_multiplier":
        at = arguments.index("--target_epsilon")
        del arguments[at : at + 2]
    arguments += [*change, "--resume_from_checkpoint", "latest"]
    said = train_here(arguments)
    assert said.startswith("error: cannot resume") and difference in said
    assert spent_on(output) == spent_on(finished[0])


def test_another_base_model_or_set_is_refused_naming_it(
    finished, tiny_base, image_folder, tmp_path
):
    latest = [*finished[1], "--resume_from_checkpoint", "latest"]
    images, output = copy_folder(image_folder, tmp_path / "images"), tmp_path / "own"
    start(tiny_base, images, output, *finished[1])
    (images / "0" / "0.png").write_bytes(b"damaged since")
    assert "are others than it was trained on" in start(tiny_base, images, output, *latest)
    (images / "0" / "0.png").unlink()
    assert "num_units was 40, is 39" in start(tiny_base, images, output, *latest)
    output = copy_folder(finished[0], tmp_path / "run")
    assert "train_data_dir was" in start(tiny_base, images, output, *latest)

    from diffusers import StableDiffusionPipeline

    other = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    other.unet.conv_in.bias.data[0] += 1e-3
    other.save_pretrained(tmp_path / "other")
    said = start(tmp_path / "other", image_folder, output, *latest)
    assert "base_model_checksum was" in said


def test_nothing_secret_is_in_a_checkpoint_or_the_ledger(finished):
    """Adapter, optimizer, schedule, average and step: no generator, and no seed in either."""

    private = finished[0] / "private"
    checkpoint = locate_checkpoint(private / "checkpoints", 3)
    state = read_state(checkpoint)
    assert set(state) == {"adapter", "optimizer", "lr_scheduler", "average", "step"}
    known = {"schema_version", "step", "run", "branch", "agreed", "sha256"}
    assert set(read_about(checkpoint)) == known
    assert {path.name for path in checkpoint.iterdir()} == {"state.pt", "about.json"}
    assert sum("lora_A" in name for name in state["adapter"])  # frozen, at its random start
    text = (private / "ledger.jsonl").read_text().lower()
    assert not any(word in text for word in ("seed", "rng", "generator", ".png"))
    known = {"schema_version", "index", "time", "kind", "run", "branch", "from_step", "event"}
    known |= {
        "delta",
        "num_units",
        "privacy_unit",
        "private",
        "step",
        "output",
        "files",
        "builds_on",
        "place",
    }
    for record in Ledger(private / "ledger.jsonl").records():
        assert set(record) <= known | {"previous", "hash", "made_with"}
        made_with = record.get("made_with", {})
        assert set(made_with) <= {"randomness", "precision", "is_audited", "base", "is_base_known"}


def test_old_checkpoints_go_and_the_newest_stay(finished, tiny_base, image_folder, tmp_path):
    assert list_steps(finished[0] / "private" / "checkpoints") == [0, 1, 2, 3]
    start(tiny_base, image_folder, tmp_path / "run", *FEW, "--checkpoints_total_limit", 2)
    assert list_steps(tmp_path / "run" / "private" / "checkpoints") == [2, 3]


def test_a_process_whose_run_went_on_elsewhere_releases_nothing_more(tmp_path):
    from tests.worlds import build_plan

    ledger, terms = Ledger(tmp_path / "ledger.jsonl"), build_plan(steps=5).terms(True)
    first = ledger.reserve(terms)
    first.release(2, "checkpoint")
    first.wrote(2, "checkpoint")
    second = ledger.reserve(terms, run=first.run, step=2)
    with pytest.raises(UsageError, match="resumed or given up elsewhere"):
        first.release(3, "checkpoint")
    second.release(3, "checkpoint")


@pytest.mark.promise
@pytest.mark.slow
@pytest.mark.parametrize("stages, points", [("first", 16), ("last", 12)])
def test_kill_9_in_every_stage_loses_nothing_and_charges_once(
    tiny_base, image_folder, tmp_path, stages, points
):
    """At chosen moments of means, selection, warm start and training, one after the other; or of
    curation and relabelling."""
    run = kill("killed_stages", tiny_base, image_folder, tmp_path, stages)
    assert run.returncode == 0, run.stdout + run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == {"killed": points}
