"""What goes wrong at three in the morning: signals, full disks, and losses that are not numbers."""

import os
import resource
import signal
import stat
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError

from tests.conftest import ROOT, few_fast, quiet_environment, read_json, train_arguments, train_here
from tests.worlds import LinearWorld, assert_normal, build_plan, train
from utils.arguments.training import TrainingArguments
from utils.errors import StopRequest, UsageError, run_script
from utils.files import make_private, replace_file, write_durably
from utils.ledger import runs
from utils.ledger.charges import CHECKPOINT, count_charged_steps
from utils.ledger.checkpoints import (
    announce_checkpoint,
    list_steps,
    locate_checkpoint,
    read_about,
    read_state,
    save_checkpoint,
)
from utils.ledger.ledger import Ledger
from utils.ledger.reservations import settle
from utils.ledger.runs import Run, claim_output_dir
from utils.ledger.statement import Circumstances
from utils.ledger.verification import find_problems, read_source
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState

LATEST = ["--resume_from_checkpoint", "latest"]


def check_published(output, steps: int = 3) -> None:
    assert not find_problems(read_source(str(output), None))
    assert [e["steps"] for e in read_json(output / "privacy.json")["events"]] == [steps]


@pytest.mark.parametrize("number, code", few_fast([(signal.SIGTERM, 143), (signal.SIGINT, 130)]))
def test_a_signal_ends_training_at_a_checkpoint(tiny_base, image_folder, tmp_path, number, code):
    output = tmp_path / "run"
    more = ["--max_train_steps", 500, "--checkpointing_steps", 20, "--num_validation_images", 0]
    arguments = train_arguments(tiny_base, image_folder, output, *more)
    command = [sys.executable, ROOT / "train_dp_lora.py", *arguments]
    process = subprocess.Popen(
        list(map(str, command)), env=quiet_environment(), stderr=subprocess.PIPE, text=True
    )
    checkpoints = output / "private" / "checkpoints"
    while not any(list_steps(checkpoints)) and process.poll() is None:  # then it takes signals
        time.sleep(0.1)
    process.send_signal(number)
    said = process.communicate(timeout=600)[1]
    assert process.returncode == code, said
    last = list_steps(checkpoints)[-1]
    assert 20 <= last < 500 and f"stopped after step {last} of 500" in said

    records = Ledger(output / "private" / "ledger.jsonl").records()
    assert count_charged_steps(records, records[0]["run"], live=False) == last
    assert not (output / "privacy.json").exists()


def full_disk(*_, **__):
    raise OSError(28, "No space left on device")


def fail_as_safetensors() -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize(
    "save", [lambda: torch.save(torch.zeros(10**5), "/dev/full"), fail_as_safetensors, full_disk]
)
def test_a_full_disk_is_told_of_whatever_was_being_written(save, capsys):
    """Of what is public, too: torch and safetensors have errors of their own for it."""
    with pytest.raises(SystemExit) as end:
        run_script(save)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.endswith("make room, and give the command again\n")


@pytest.mark.parametrize("where", ["checkpoint", "weights", "statement"])
def test_a_full_disk_gets_a_sentence_and_nothing_is_lost(
    tiny_base, image_folder, tmp_path, monkeypatch, where
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    arguments += ["--checkpointing_steps", 1]
    with monkeypatch.context() as patch:
        if where == "checkpoint":
            whole, calls = torch.save, []
            patch.setattr(
                torch, "save", lambda *a: full_disk() if len(calls) > 1 else calls.append(whole(*a))
            )
        elif where == "weights":
            patch.setattr(runs, "hash_file", full_disk)
        else:
            patch.setattr(runs, "write_statement", full_disk)
        said = train_here(arguments)
    assert said.startswith("error: cannot write") and "No space left" in said
    assert "--resume_from_checkpoint latest" in said
    there = list_steps(tmp_path / "run" / "private" / "checkpoints")
    assert there == ([0, 1] if where == "checkpoint" else [2, 3])
    train_here([*arguments, *LATEST])
    check_published(tmp_path / "run")


@pytest.mark.slow
def test_a_file_size_limit_is_a_sentence_too(tiny_base, image_folder, tmp_path):
    """A real refusal by the operating system, not a simulated one; and then a fresh start."""
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    command = [sys.executable, ROOT / "train_dp_lora.py", *arguments]
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))  # noqa: E731
    run = subprocess.run(
        list(map(str, command)), env=quiet_environment(), capture_output=True, text=True,
        preexec_fn=limit,
    )  # fmt: skip
    assert run.returncode == 2 and "cannot write the checkpoint of step 0" in run.stderr
    train_here(arguments)
    check_published(tmp_path / "run")


def test_a_folder_in_use_is_left_alone(tiny_base, image_folder, tmp_path):

    output = tmp_path / "run"
    lock = claim_output_dir(TrainingArguments(output_dir=str(output)))
    said = train_here(train_arguments(tiny_base, image_folder, output))
    assert "in use by another process" in said
    lock.release()
    train_here(train_arguments(tiny_base, image_folder, output))
    check_published(output)


def test_an_output_folder_that_cannot_be_made_is_a_sentence(tiny_base, image_folder, tmp_path):
    (tmp_path / "file").write_text("in the way")
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "file" / "run"))
    assert said.startswith("error: cannot make --output_dir")


@pytest.mark.parametrize("damage", ["text", "newer"])
def test_a_damaged_or_newer_ledger_stops_the_run(tiny_base, image_folder, tmp_path, damage):
    ledger = tmp_path / "shared.jsonl"
    ledger.write_text("no record\n" if damage == "text" else '{"schema_version": 99}\n')
    before = ledger.read_bytes()
    more = ["--privacy_ledger", ledger]
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *more))
    assert ("damaged in line 1" if damage == "text" else "newer version") in said
    assert ledger.read_bytes() == before


def test_a_batch_of_losses_that_are_no_numbers_is_noise_and_no_more(accelerator):
    """Every unit's gradient is NaN: the step is the noise alone, and it is counted."""
    plan = build_plan(steps=2, noise_multiplier=1.5)
    world = LinearWorld(["nan"] * 200, wide=True)
    optimizer = torch.optim.SGD(world.engine.parameters, lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    before = [p.detach().clone() for p in world.engine.parameters]
    state = TrainingState(world.engine, optimizer, constant)
    train(accelerator, state, world.losses, plan, SecretRandomness(), 16)
    moves = [a - b for a, b in zip(before, world.engine.parameters, strict=True)]
    noise = torch.cat([move.detach().flatten() for move in moves])
    assert state.step == 2
    assert_normal(noise * plan.expected_batch_size, plan.noise_std * 2**0.5)


@pytest.mark.parametrize("processes, ended", [(1, [signal.SIGTERM]), (2, [])])
def test_one_of_several_processes_that_an_error_ends_is_left_to_say_so(
    monkeypatch, processes, ended
):
    """The launcher's SIGTERM may come between the error and the sentence."""
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(number))
    try:
        with pytest.raises(RuntimeError), StopRequest():
            raise RuntimeError("Connection closed by peer [127.0.0.1]")
        os.kill(os.getpid(), signal.SIGTERM)
        assert told == ended
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_broken_process_group_is_a_sentence_and_another_error_is_not(monkeypatch, capsys):
    from utils import errors

    ended = []
    monkeypatch.setattr(errors.os, "_exit", ended.append)
    monkeypatch.setenv("WORLD_SIZE", "2")

    def lost():
        raise RuntimeError("Connection closed by peer [127.0.0.1]")

    errors.run_script(lost)
    assert ended == [1] and "another process ended" in capsys.readouterr().err

    def bug():
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        errors.run_script(bug)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(RuntimeError, match="Connection"):
        errors.run_script(lost)


def test_the_state_of_training_survives_a_checkpoint(tmp_path, accelerator):
    """Weights, moments, schedule and average come back as they were; a UsageError if not there."""
    from diffusers.training_utils import EMAModel

    def fresh():
        world = LinearWorld(["ordinary"] * 200)
        optimizer = torch.optim.AdamW(world.engine.parameters, lr=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=6)
        average = EMAModel(world.engine.parameters, decay=0.9)
        return world, TrainingState(world.engine, optimizer, schedule, average)

    world, state = fresh()
    train(accelerator, state, world.losses, build_plan(steps=3), SecretRandomness(), 16)
    announce_checkpoint(tmp_path, 3)
    save_checkpoint(tmp_path, 3, state.state_dict(), {})
    _, other = fresh()
    other.load_state_dict(read_state(locate_checkpoint(tmp_path, 3)))
    first, second = state.state_dict(), other.state_dict()
    assert second["step"] == 3 and second["lr_scheduler"] == first["lr_scheduler"]
    torch.testing.assert_close(second["adapter"], first["adapter"], rtol=0, atol=0)
    torch.testing.assert_close(second["optimizer"]["state"], first["optimizer"]["state"])
    torch.testing.assert_close(
        second["average"]["shadow_params"], first["average"]["shadow_params"], rtol=0, atol=0
    )
    with pytest.raises(UsageError, match="missing or damaged"):
        read_about(locate_checkpoint(tmp_path, 4))


def test_only_a_checkpoint_that_is_still_unfinished_is_taken_back(tmp_path):
    """One that was finished and then moved away, before it was noted as written, stays charged."""
    from utils.ledger.ledger import Ledger

    branch = Ledger(tmp_path / "ledger.jsonl").reserve(build_plan(steps=5).terms(True))
    run = Run(tmp_path / "run", branch, {}, Circumstances())

    def charged() -> int:
        settle(run)
        return count_charged_steps(branch.ledger.records(), branch.run, live=False)

    announce_checkpoint(run.checkpoints, 2)
    branch.release(2, CHECKPOINT)
    save_checkpoint(run.checkpoints, 2, {}, {})
    locate_checkpoint(run.checkpoints, 2).rename(tmp_path / "elsewhere")
    assert charged() == 2
    announce_checkpoint(run.checkpoints, 3)
    branch.release(3, CHECKPOINT)
    assert charged() == 2 and not list(run.checkpoints.iterdir())


def test_a_private_folder_that_is_there_already_gets_its_mode(tmp_path):
    (tmp_path / "private").mkdir(mode=0o755)
    (tmp_path / "private").chmod(0o755)
    make_private(tmp_path / "private")
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o700


def test_a_file_that_cannot_be_finished_leaves_the_old_one(tmp_path):
    path = tmp_path / "file"
    write_durably(path, "whole")
    with pytest.raises(OSError), replace_file(path) as aside:
        aside.write_text("ha")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "whole" and [p.name for p in tmp_path.iterdir()] == ["file"]
