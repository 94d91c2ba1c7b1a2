"""What a run says beside its mechanisms: how it was made, and how to go on with it."""

import errno
from pathlib import Path

import pytest

from tests.ledger.conftest import PLAN, privacy, start, training
from tests.worlds import build_plan
from utils.arguments.training import DataArguments
from utils.errors import UsageError
from utils.files import explain_disk_errors, private_folder
from utils.ledger.ledger import Ledger
from utils.ledger.reservations import confirm, open_run
from utils.ledger.statement import UNKNOWN_BASE, Circumstances
from utils.methods.stages import collect_settings

PLAIN = Circumstances(randomness="Philox", precision="bf16")
BETTER = Circumstances(randomness="secure", precision="fp32", audit={"kind": "replay"})


def resume(folder: Path, about: Circumstances):
    run = open_run(training(folder, "latest"), privacy(), PLAN, {"model": "m"}, about)
    return confirm(run, privacy(), PLAN)


@pytest.mark.parametrize(
    "more, randomness, precision", [(0, "Philox", "bf16"), (2, "Philox; secure", "bf16, then fp32")]
)
def test_a_resumed_run_states_how_all_of_its_steps_were_made(tmp_path, more, randomness, precision):
    """Not only those of the last process, which may have taken none."""
    start(tmp_path / "run", PLAIN).save(2, dict, limit=2)
    shorter = build_plan(steps=2 + more)
    statement = resume(tmp_path / "run", BETTER).publish(lambda folder: None, shorter)
    assert statement["randomness"] == randomness and statement["precision"] == precision
    assert statement["audit"] is None  # what was audited took not all steps
    start(tmp_path / "other", BETTER).save(2, dict, limit=2)
    statement = resume(tmp_path / "other", BETTER).publish(lambda folder: None, PLAN)
    assert statement["randomness"] == "secure" and statement["audit"] == BETTER.audit


def test_a_statement_names_the_randomness_of_the_runs_that_it_builds_on(tmp_path):
    shared = str(tmp_path / "shared.jsonl")
    first = start(tmp_path / "means", PLAIN, privacy_ledger=shared)
    first.publish(lambda folder: None, PLAN)
    unknown = Ledger(shared).reserve(build_plan(steps=1).terms(True))  # by an earlier version
    unknown.release(1, "weights")
    runs = (first.branch.run, unknown.run)
    plan = build_plan(steps=4, builds_on=runs)
    run = start(tmp_path / "run", BETTER, plan, privacy_ledger=shared)
    statement = run.publish(lambda folder: None, plan)
    assert statement["randomness"] == "Philox; not stated; secure"
    assert statement["precision"] == "fp32" and statement["audit"] == BETTER.audit


def test_a_base_of_which_nobody_knows_is_not_covered(tmp_path):
    doubtful = start(tmp_path / "run", Circumstances(is_base_known=False))
    assert UNKNOWN_BASE in doubtful.publish(lambda folder: None, PLAN)["not_covered"]
    known = start(tmp_path / "known", Circumstances())
    assert UNKNOWN_BASE not in known.publish(lambda folder: None, PLAN)["not_covered"]


def test_a_run_that_lost_units_still_says_how_it_is_made(tmp_path):
    """Its plan is reserved anew, for the units that are left."""
    fewer = build_plan(steps=4, num_units=150)
    run = confirm(start(tmp_path / "run", BETTER), privacy(), fewer)
    statement = run.publish(lambda folder: None, fewer)
    assert statement["randomness"] == "secure" and statement["audit"] == BETTER.audit


def test_the_same_folder_is_the_same_however_it_is_written(tmp_path, monkeypatch):
    """Else a run could not be resumed after a slash too many; a Hub id stays as it is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scans").mkdir()

    def settle_on(**data) -> dict:
        return collect_settings("x", PLAN, DataArguments(**data), training(tmp_path))["data"]

    for name in ("train_data_dir", "dataset_name"):
        for written in ("scans", "scans/", "./scans", str(tmp_path / "scans")):
            assert settle_on(**{name: written}) == settle_on(**{name: "scans"})
        assert settle_on(**{name: "user/scans"})[name] == "user/scans"


@pytest.mark.parametrize("there", [False, True])
def test_a_disk_that_takes_no_more_says_how_to_go_on(tmp_path, there):
    """A checkpoint that is not there cannot be resumed from; where space is not what lacks, no
    room need be made."""
    if there:
        (private_folder(tmp_path) / "checkpoints" / "checkpoint-2").mkdir(parents=True)
    go_on = "resume with --resume_from_checkpoint latest" if there else "give the command again"
    for error, first in ((errno.ENOSPC, "make room"), (errno.EACCES, "mend that")):
        with pytest.raises(UsageError, match=f"Nothing is lost: {first}, and {go_on}"):
            with explain_disk_errors(tmp_path):
                raise OSError(error, "no")
