"""A run's folder, reservation and statement, without a model."""

import shutil
import stat
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.ledger.conftest import PLAN, privacy, start, training
from tests.worlds import build_plan
from utils.errors import UsageError
from utils.files import hash_file, private_folder
from utils.ledger.charges import count_charged_steps
from utils.ledger.checkpoints import (
    announce_checkpoint,
    list_steps,
    save_checkpoint,
    was_left_unfinished,
)
from utils.ledger.ledger import Branch, Ledger
from utils.ledger.reservations import (
    check_new,
    check_room_for,
    confirm,
    find_ledger,
    open_run,
    settle,
)
from utils.ledger.runs import claim_output_dir, find_earlier_branch
from utils.ledger.statement import Circumstances
from utils.privacy.accounting import pld_both_relations, pld_epsilon, quote


def test_a_folder_is_claimed_once_and_only_its_owner_may_enter(tmp_path):
    folder = tmp_path / "run"
    private_folder(folder).mkdir(parents=True, mode=0o755)
    lock = claim_output_dir(training(folder))
    assert stat.S_IMODE(private_folder(folder).stat().st_mode) == 0o700
    with pytest.raises(UsageError, match="is in use by another process"):
        claim_output_dir(training(folder))
    lock.release()
    claim_output_dir(training(folder)).release()


@pytest.mark.parametrize("name", ["notes.txt", "private/mine.txt", "unet/weights.safetensors"])
def test_a_folder_with_files_of_others_is_left_alone(tmp_path, name):
    folder = tmp_path / "run"
    (folder / name).parent.mkdir(parents=True)
    (folder / name).write_text("mine")
    with pytest.raises(UsageError, match="already holds files; name a new folder"):
        claim_output_dir(training(folder))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="already holds files"):
        claim_output_dir(training(tmp_path / "file"))


def test_there_must_be_something_to_resume(tmp_path):
    with pytest.raises(UsageError, match="holds no run to resume"):
        claim_output_dir(training(tmp_path / "run", "latest"))


def test_a_folder_is_free_until_its_run_releases_something(tmp_path):
    run = start(tmp_path / "run")
    assert find_earlier_branch(tmp_path / "run").run == run.branch.run
    again = start(tmp_path / "run")  # the first is handed back
    records = again.branch.ledger.records()
    assert [r["kind"] for r in records] == ["reserve", "give_up", "reserve"]
    assert count_charged_steps(records, run.branch.run) == 0
    again.save(1, dict, limit=2)
    with pytest.raises(UsageError, match="already holds files"):
        claim_output_dir(training(tmp_path / "run"))
    assert find_earlier_branch(tmp_path / "other") is None


def test_a_run_resumes_where_it_was_and_pays_twice_for_an_older_checkpoint(tmp_path, capsys):
    folder = tmp_path / "run"
    run = start(folder)
    for step in (1, 2, 3):
        run.save(step, lambda: {"x": torch.ones(1)}, limit=5)
    assert list_steps(run.checkpoints) == [1, 2, 3]
    for wanted, recharged in (("latest", 0), ("checkpoint-1", 2)):
        resumed = open_run(
            training(folder, wanted), privacy(), PLAN, {"model": "m"}, Circumstances()
        )
        assert resumed.branch.run == run.branch.run and resumed.saved_state()["x"] == 1
        resumed = confirm(resumed, privacy(), PLAN, "")
        assert resumed.recharged == recharged
    epsilon = pld_epsilon(PLAN.events(6), PLAN.delta)
    said = capsys.readouterr().out
    assert "resuming from step 1 charges 2 steps once more" in said
    assert f"will come to epsilon {quote(epsilon)}" in said
    names = {path.name for path in run.checkpoints.iterdir()}
    assert {"set-aside-2-of-branch-1", "set-aside-3-of-branch-1", "checkpoint-1"} <= names
    for wanted, sentence in (
        ("checkpoint-7", "checkpoint-7 is missing or damaged"),
        ("elsewhere", "elsewhere: not a checkpoint of .*; it has: checkpoint-1$"),
        (str(tmp_path), "not a checkpoint of"),
    ):
        with pytest.raises(UsageError, match=sentence):
            open_run(training(folder, wanted), privacy(), PLAN, {"model": "m"}, Circumstances())


@pytest.mark.parametrize(
    "agreed, sentence",
    [
        ({"model": "other"}, "cannot resume .*checkpoint-1: model was m, is other$"),
        (
            dict.fromkeys("abcde", 1),
            "model was m, is None; a was None, is 1; b was None, is 1, and 3 more$",
        ),
        ({"model": "m", "x": 1, "y": 2}, "x was None, is 1; y was None, is 2$"),
        ({"model": "m", "x": 1, "y": 2, "z": 3}, "y was None, is 2; z was None, is 3$"),
    ],
)
def test_another_model_is_named(tmp_path, agreed, sentence):
    run = start(tmp_path / "run")
    run.save(1, dict, limit=1)
    with pytest.raises(UsageError, match=sentence):
        open_run(training(tmp_path / "run", "latest"), privacy(), PLAN, agreed, Circumstances())


def test_what_a_crash_left_is_settled(tmp_path):
    run = start(tmp_path / "run")
    run.save(1, dict, limit=9)
    announce_checkpoint(run.checkpoints, 2)
    run.branch.release(2, "checkpoint")  # written, but not yet on record as written
    save_checkpoint(run.checkpoints, 2, {}, {"run": run.branch.run, "agreed": {}})
    announce_checkpoint(run.checkpoints, 3)
    run.branch.release(3, "checkpoint")  # never finished
    run.branch.release(4, "checkpoint")  # moved away: it stays charged
    settle(run)
    last = [(r["kind"], r["step"]) for r in run.branch.ledger.records()[-2:]]
    assert last == [("wrote", 2), ("void", 3)]
    assert not was_left_unfinished(run.checkpoints, 3)
    settle(run)
    assert len(run.branch.ledger.records()) == 1 + 2 + 3 + 2


def test_what_a_copy_left_unfinished_stays_charged(tmp_path):
    """The original may hold what was written to it."""
    run = start(tmp_path / "run")
    run.branch.release(2, "checkpoint", announce_checkpoint(run.checkpoints, 2))
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    settle(replace(run, output_dir=tmp_path / "copy"))
    assert run.branch.ledger.records()[-1]["kind"] == "release"
    settle(run)
    assert run.branch.ledger.records()[-1]["kind"] == "void"


# Ledgers -----------------------------------------------------------------------------------------


def test_which_ledger_a_run_is_charged_to(tmp_path, capsys):
    folder, shared = tmp_path / "run", tmp_path / "shared.jsonl"
    private_folder(folder).mkdir(parents=True)
    here = private_folder(folder) / "ledger.jsonl"
    assert find_ledger(folder, privacy()).path == here
    assert find_ledger(folder, privacy(privacy_ledger=str(here))).path == here
    assert find_ledger(folder, privacy(privacy_ledger=str(shared))).path == shared
    assert not here.is_symlink()
    with pytest.raises(UsageError, match="its folder does not exist"):
        find_ledger(folder, privacy(privacy_ledger=str(tmp_path / "none" / "x.jsonl")))
    capped = privacy(privacy_ledger=str(shared), total_epsilon=9.0)
    with pytest.raises(UsageError, match="is not there, so nothing that was spent before"):
        find_ledger(folder, capped)
    find_ledger(folder, privacy(privacy_ledger=str(shared), total_epsilon=9.0, start_ledger=True))
    run = start(folder, privacy_ledger=str(shared))
    assert f"starting a new ledger, {shared}" in capsys.readouterr().out
    assert here.is_symlink() and here.resolve() == shared == run.branch.ledger.path
    find_ledger(folder, capped)
    with pytest.raises(UsageError, match="is recorded in .*shared.jsonl, not in .*other.jsonl"):
        find_ledger(folder, privacy(privacy_ledger=str(tmp_path / "other.jsonl")))


def test_a_shared_ledger_that_is_gone_is_not_taken_for_an_empty_one(tmp_path):
    """As of a share that is not mounted: what was spent would count no more, and a checkpoint that
    it paid for would be cleared away."""
    folder, shared = tmp_path / "run", tmp_path / "share" / "ledger.jsonl"
    shared.parent.mkdir()
    start(folder, privacy_ledger=str(shared)).save(2, dict, limit=2)
    shared.parent.rename(tmp_path / "moved")
    for asked in (privacy(), privacy(total_epsilon=9.0)):
        with pytest.raises(UsageError, match=f"{shared}, is not there: bring it back"):
            find_ledger(folder, asked)
    with pytest.raises(UsageError, match="its folder does not exist"):
        find_ledger(folder, privacy(privacy_ledger=str(shared)))
    shared.parent.mkdir()  # where it would be mounted
    with pytest.raises(UsageError, match="is not there, so nothing that was spent before"):
        find_ledger(folder, privacy(privacy_ledger=str(shared), total_epsilon=9.0))
    with pytest.raises(UsageError, match="already holds files"):
        claim_output_dir(training(folder))
    moved = str(tmp_path / "moved" / "ledger.jsonl")
    asked, about = privacy(privacy_ledger=moved), Circumstances()
    resumed = open_run(training(folder, "latest"), asked, PLAN, {"model": "m"}, about)
    assert str(resumed.branch.ledger.path) == moved and find_ledger(folder, privacy()).path


def test_room_for_two_stages_is_measured_at_the_smallest_delta(tmp_path):
    folder, shared = tmp_path / "run", tmp_path / "shared.jsonl"
    Ledger(shared).reserve(build_plan(steps=2, delta=1e-6).terms(True))
    events = [build_plan(steps=2).event(), build_plan(steps=3).event()]
    total = pld_epsilon(events, 1e-6)
    check_room_for(folder, privacy(), events, Circumstances())
    about = {"privacy_ledger": str(shared)}
    check_room_for(
        folder, privacy(total_epsilon=total + 1e-9, **about), events[1:], Circumstances()
    )
    with pytest.raises(UsageError, match=f"to epsilon {quote(total)}, above --total_epsilon"):
        check_room_for(
            folder, privacy(total_epsilon=total - 1e-6, **about), events[1:], Circumstances()
        )
    alone = pld_epsilon(events[:1], 1e-4)
    check_room_for(folder, privacy(total_epsilon=alone + 1e-9), events[:1], Circumstances())
    with pytest.raises(UsageError, match="all stages would bring"):
        check_room_for(folder, privacy(total_epsilon=alone - 1e-6), events[:1], Circumstances())


def test_what_an_attempt_left_reserved_takes_no_room_from_the_next(tmp_path):
    """A kill before anything was released: the next attempt hands it back, so all who ask whether
    there is room must count without it. What was released stays charged."""
    folder, plan = tmp_path / "run", build_plan(steps=3)
    asked = privacy(total_epsilon=pld_epsilon([plan.event()], plan.delta) + 1e-6)
    run = start(folder, plan=plan)
    for _ in range(2):
        check_new(folder, asked, plan, Circumstances())
        check_room_for(folder, asked, [plan.event()], Circumstances())
        run = open_run(training(folder), asked, plan, {}, Circumstances())
    elsewhere = replace(asked, privacy_ledger=str(run.branch.ledger.path))
    with pytest.raises(UsageError, match="above --total_epsilon"):
        check_new(tmp_path / "other", elsewhere, plan, Circumstances())
    run.branch.release(1, "checkpoint")
    with pytest.raises(UsageError, match="above --total_epsilon"):
        check_new(folder, asked, plan, Circumstances())
    with pytest.raises(UsageError, match="all stages would bring"):
        check_room_for(folder, asked, [plan.event()], Circumstances())


def test_a_statement_gives_what_everything_on_the_ledger_comes_to(tmp_path):
    shared = tmp_path / "shared.jsonl"
    Ledger(shared).reserve(build_plan(steps=2, delta=1e-6).terms(True))
    run = start(tmp_path / "run", privacy_ledger=str(shared))

    def export(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "w.bin").write_bytes(b"weights")

    statement = run.publish(export, PLAN)
    assert statement["events"] == [PLAN.event()]
    everything = [build_plan(steps=2).event(), PLAN.event()]
    assert statement["ledger"]["everything"] == {
        "events": everything,
        "epsilon": pld_both_relations(everything, 1e-6),
        "delta": 1e-6,
    }
    weights = tmp_path / "run" / "unet" / "w.bin"
    assert statement["files"] == {"unet/w.bin": hash_file(weights)}
    assert run.publish(export, PLAN)["files"] == statement["files"]
    alone = start(tmp_path / "alone").publish(export, PLAN)
    assert "everything" not in alone["ledger"]


def test_a_statement_counts_all_that_is_on_record_before_its_weights(tmp_path):
    """Another run hands its rest back while the weights are written."""
    shared = tmp_path / "shared.jsonl"
    other = Ledger(shared).reserve(build_plan(steps=7).terms(True))
    other.release(1, "checkpoint")
    run = start(tmp_path / "run", privacy_ledger=str(shared))
    statement = run.publish(lambda folder: other.give_up(), PLAN)
    everything = statement["ledger"]["everything"]["events"]
    assert [event["steps"] for event in everything] == [1, PLAN.steps]


def test_a_statement_counts_nothing_that_came_after_its_weights(tmp_path, monkeypatch):
    shared, wrote = tmp_path / "shared.jsonl", Branch.wrote

    def and_another_run_starts(branch, *arguments) -> dict:
        entry = wrote(branch, *arguments)
        Ledger(shared).reserve(build_plan(steps=7).terms(True))
        return entry

    monkeypatch.setattr(Branch, "wrote", and_another_run_starts)
    run = start(tmp_path / "run", privacy_ledger=str(shared))
    assert "everything" not in run.publish(lambda folder: None, PLAN)["ledger"]
