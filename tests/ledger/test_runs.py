"""A run's folder, checkpoints and reservation, without a model."""

import json
import stat
from pathlib import Path

import pytest
import torch

from tests.worlds import build_plan
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.errors import UsageError
from utils.files import hash_file, private_folder
from utils.ledger.charges import count_charged_steps, list_charged_events
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
from utils.ledger.ledger import Ledger
from utils.ledger.reservations import check_room_for, confirm, find_ledger, open_run, settle
from utils.ledger.runs import claim_output_dir, find_earlier_branch
from utils.ledger.statement import Circumstances
from utils.privacy.accounting import pld_both_relations, pld_epsilon

PLAN = build_plan(steps=4)


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


# The folder --------------------------------------------------------------------------------------


def training(folder: Path, checkpoint: str | None = None) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), resume_from_checkpoint=checkpoint)


def privacy(**changes) -> PrivacyArguments:
    return PrivacyArguments(**({"target_epsilon": 8.0, "target_delta": 1e-4} | changes))


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


def start(folder: Path, **changes):
    claim_output_dir(training(folder)).release()
    return open_run(training(folder), privacy(**changes), PLAN, {"model": "m"}, True)


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
        resumed = open_run(training(folder, wanted), privacy(), PLAN, {"model": "m"}, True)
        assert resumed.branch.run == run.branch.run and resumed.saved_state()["x"] == 1
        resumed = confirm(resumed, privacy(), PLAN, True)
        assert resumed.recharged == recharged
    epsilon = pld_epsilon(PLAN.events(6), PLAN.delta)
    said = capsys.readouterr().out
    assert "resuming from step 1 charges 2 steps once more" in said
    assert f"will come to epsilon {epsilon:.3f}" in said
    names = {path.name for path in run.checkpoints.iterdir()}
    assert {"set-aside-2-of-branch-1", "set-aside-3-of-branch-1", "checkpoint-1"} <= names
    for wanted, sentence in (
        ("checkpoint-7", "checkpoint-7 is missing or damaged"),
        ("elsewhere", "elsewhere: not a checkpoint of .*; it has: checkpoint-1$"),
        (str(tmp_path), "not a checkpoint of"),
    ):
        with pytest.raises(UsageError, match=sentence):
            open_run(training(folder, wanted), privacy(), PLAN, {"model": "m"}, True)


@pytest.mark.parametrize(
    "agreed, sentence",
    [
        ({"model": "other"}, "cannot resume .*checkpoint-1: model was m, is other$"),
        (dict.fromkeys("abcde", 1), "model was m, is None; a was None, is 1; b was .*and 3 more$"),
        ({"model": "m", "x": 1, "y": 2}, "x was None, is 1; y was None, is 2$"),
    ],
)
def test_another_model_is_named(tmp_path, agreed, sentence):
    run = start(tmp_path / "run")
    run.save(1, dict, limit=1)
    with pytest.raises(UsageError, match=sentence):
        open_run(training(tmp_path / "run", "latest"), privacy(), PLAN, agreed, True)


def test_what_a_crash_left_is_settled(tmp_path):
    run = start(tmp_path / "run")
    run.save(1, dict, limit=9)
    run.branch.release(2, "checkpoint")  # written, but not yet on record as written
    save(run.checkpoints, 2)
    announce_checkpoint(run.checkpoints, 3)
    run.branch.release(3, "checkpoint")  # never finished
    run.branch.release(4, "checkpoint")  # moved away: it stays charged
    settle(run)
    last = [(r["kind"], r["step"]) for r in run.branch.ledger.records()[-2:]]
    assert last == [("wrote", 2), ("void", 3)]
    assert not was_left_unfinished(run.checkpoints, 3)
    settle(run)
    assert len(run.branch.ledger.records()) == 1 + 2 + 3 + 2


def test_fewer_units_reserve_anew_before_the_first_step(tmp_path):
    run = start(tmp_path / "run")
    assert confirm(run, privacy(), PLAN, True) == run
    fewer = build_plan(steps=4, num_units=199)
    run = confirm(run, privacy(), fewer, True)
    assert run.agreed["plan"]["num_units"] == 199 and run.branch.number == 1
    events = list_charged_events(run.branch.ledger.records())
    assert events == [fewer.event()]


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


def test_room_for_two_stages_is_measured_at_the_smallest_delta(tmp_path):
    folder, shared = tmp_path / "run", tmp_path / "shared.jsonl"
    Ledger(shared).reserve(build_plan(steps=2, delta=1e-6).terms(True))
    events = [build_plan(steps=2).event(), build_plan(steps=3).event()]
    total = pld_epsilon(events, 1e-6)
    check_room_for(folder, privacy(), events)
    about = {"privacy_ledger": str(shared)}
    check_room_for(folder, privacy(total_epsilon=total + 1e-9, **about), events[1:])
    with pytest.raises(UsageError, match=f"to epsilon {total:.3f}, above --total_epsilon"):
        check_room_for(folder, privacy(total_epsilon=total - 1e-6, **about), events[1:])
    alone = pld_epsilon(events[:1], 1e-4)
    check_room_for(folder, privacy(total_epsilon=alone + 1e-9), events[:1])
    with pytest.raises(UsageError, match="both stages would bring"):
        check_room_for(folder, privacy(total_epsilon=alone - 1e-6), events[:1])


def test_a_statement_gives_what_everything_on_the_ledger_comes_to(tmp_path):
    shared = tmp_path / "shared.jsonl"
    Ledger(shared).reserve(build_plan(steps=2, delta=1e-6).terms(True))
    run = start(tmp_path / "run", privacy_ledger=str(shared))

    def export(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / "unet" / "w.bin").write_bytes(b"weights")

    statement = run.publish(export, PLAN, Circumstances())
    assert statement["events"] == [PLAN.event()]
    everything = [build_plan(steps=2).event(), PLAN.event()]
    assert statement["ledger"]["everything"] == {
        "events": everything,
        "epsilon": pld_both_relations(everything, 1e-6),
        "delta": 1e-6,
    }
    weights = tmp_path / "run" / "unet" / "w.bin"
    assert statement["files"] == {"unet/w.bin": hash_file(weights)}
    assert run.publish(export, PLAN, Circumstances())["files"] == statement["files"]
    alone = start(tmp_path / "alone").publish(export, PLAN, Circumstances())
    assert "everything" not in alone["ledger"]
