"""Records and checkpoints that are not right, or not what the statement says: in sentences."""

import pytest

from tests.ledger.conftest import PLAN, change, privacy, start, training
from tests.worlds import build_plan
from utils.errors import UsageError
from utils.ledger.charges import list_charged_events
from utils.ledger.checkpoints import announce_checkpoint, locate_checkpoint, save_checkpoint
from utils.ledger.checks import check_checkpoints, check_ledger, check_records
from utils.ledger.ledger import Ledger
from utils.ledger.reservations import open_run
from utils.ledger.statement import STOPPED, Circumstances


@pytest.fixture
def recorded(tmp_path, whole) -> tuple[dict, Ledger]:
    """A statement, and the ledger that it rests on."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    branch = ledger.reserve(build_plan().terms(True))
    branch.release(1, "weights")
    entry = branch.wrote(1, "weights", whole["files"])
    return whole | {"ledger": {"run": branch.run, "entry": entry["hash"]}}, ledger


def test_a_statement_and_its_ledger_agree(recorded):
    statement, ledger = recorded
    assert check_ledger(statement, ledger.records()) == []
    assert check_records(ledger.records()) == []


@pytest.mark.parametrize(
    "path, value, sentence",
    [
        (["ledger", "entry"], "f" * 64, "does not hold the entry"),
        (["ledger", "run"], "another", "an entry that is not about its weights"),
        (["files"], {}, "the ledger paid for other files than the statement names"),
        (["events", 0, "steps"], 2, "the ledger's events are not those of the statement"),
        (["delta"], 1e-5, "the ledger says delta 0.0001, the statement 1e-05"),
        (["num_units"], 300, "the ledger says num_units 200, the statement 300"),
        (["privacy_unit"], "all", "the ledger says privacy_unit image, the statement all"),
        (["private"], False, "the ledger says private True, the statement False"),
    ],
)
def test_where_a_statement_and_its_ledger_differ_is_said(recorded, path, value, sentence):
    statement, ledger = recorded
    problems = check_ledger(change(statement, *path, value=value), ledger.records())
    assert len(problems) == 1 and sentence in problems[0]


def test_a_delta_above_that_of_an_earlier_stage_is_said(recorded):
    """Such a ledger was written before it was refused."""
    statement, ledger = recorded
    records = ledger.records()
    first = records[0] | {"run": "first", "hash": "0" * 64, "delta": 1e-6}
    records[0]["builds_on"] = ["first"]
    records = [first, *(record | {"index": record["index"] + 1} for record in records)]
    problems = check_ledger(statement, records)
    assert "its delta is above 1e-06, that of a run that it builds on" in problems


def test_an_entry_that_is_not_of_weights_is_refused(recorded):
    statement, ledger = recorded
    entry = ledger.records()[1]["hash"]  # the release
    (problem,) = check_ledger(change(statement, "ledger", "entry", value=entry), ledger.records())
    assert "not about its weights" in problem


def test_more_steps_after_a_statement_are_counted(tmp_path, whole):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    branch = ledger.reserve(build_plan(steps=4).terms(True))
    branch.release(1, "weights")
    entry = branch.wrote(1, "weights", whole["files"])
    statement = whole | {"ledger": {"run": branch.run, "entry": entry["hash"]}}
    statement["events"] = list_charged_events(ledger.records())
    statement["not_covered"] = [*whole["not_covered"], STOPPED]
    assert check_ledger(statement, ledger.records()) == []
    branch.release(3, "checkpoint")
    (problem,) = check_ledger(statement, ledger.records())
    assert problem == "the run has released 2 more steps since this statement"


def test_a_total_is_that_of_the_ledger_at_its_smallest_delta(tmp_path, whole):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.reserve(build_plan(steps=2, delta=1e-6).terms(True))
    branch = ledger.reserve(build_plan().terms(True))
    branch.release(1, "weights")
    entry = branch.wrote(1, "weights", whole["files"])
    events = list_charged_events(ledger.records())
    about = {"run": branch.run, "entry": entry["hash"]}
    right = {"events": events, "delta": 1e-6, "epsilon": {}}

    def check(total: dict | None) -> list[str]:
        more = {} if total is None else {"everything": total}
        return check_ledger(whole | {"ledger": about | more}, ledger.records())

    assert check(right) == []
    assert check(right | {"delta": 1e-4}) == [
        "the statement's total is not quoted at the ledger's smallest delta"
    ]
    assert check(right | {"events": events[1:]}) == [
        "the statement's total is not that of the ledger"
    ]
    assert check(None) == ["the statement's total is not that of the ledger"]


@pytest.mark.parametrize("checkpoints", [1, 2])
def test_a_total_counts_all_that_is_on_record_before_the_entry(tmp_path, whole, checkpoints):
    """Another run hands its rest back just before; what it spends afterwards is not counted."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    other = ledger.reserve(build_plan(steps=7).terms(True))
    for step in range(checkpoints):
        other.release(step + 1, "checkpoint")
    branch = ledger.reserve(build_plan().terms(True))
    branch.release(1, "weights")
    other.give_up()
    entry = branch.wrote(1, "weights", whole["files"])
    events = [build_plan(steps=checkpoints).event(), build_plan().event()]
    total = {"events": events, "delta": 1e-4}
    about = {"run": branch.run, "entry": entry["hash"], "everything": total}
    ledger.reserve(build_plan(steps=3, delta=1e-6).terms(True))
    assert check_ledger(whole | {"ledger": about}, ledger.records()) == []


def test_checkpoints_must_be_of_steps_that_their_run_released(tmp_path):
    for step in (1, 2, 3):
        announce_checkpoint(tmp_path, step)
        save_checkpoint(tmp_path, step, {}, {"run": "a", "agreed": {}})
    released = [record("release", step=1), record("release", run="b", step=2)]
    found = check_checkpoints([RESERVE, *released, record("wrote", step=3)], tmp_path)
    assert found == [f"the ledger did not release checkpoint-{step}" for step in (2, 3)]
    taken_back = [RESERVE, record("release", step=1), record("void", step=1)]
    assert "the ledger did not release checkpoint-1" in check_checkpoints(taken_back, tmp_path)
    locate_checkpoint(tmp_path, 2).rename(locate_checkpoint(tmp_path, 4))
    (locate_checkpoint(tmp_path, 3) / "state.pt").unlink()
    released = [record("release", step=step) for step in (1, 2, 3, 4)]
    damaged, renamed = check_checkpoints(released, tmp_path)
    assert "checkpoint-3 is missing or damaged" in damaged
    assert renamed == "checkpoint-4 is of another step"


def test_a_checkpoint_must_be_of_the_branch_that_it_names(tmp_path):
    announce_checkpoint(tmp_path, 1)
    save_checkpoint(tmp_path, 1, {}, {"run": "a", "branch": 0, "agreed": {}})
    later = [record("release", step=1), record("void", step=1), record("release", 1, step=1)]
    assert check_checkpoints(later, tmp_path) == ["the ledger did not release checkpoint-1"]
    assert check_checkpoints([*later, record("wrote", step=1)], tmp_path) == []


def test_a_ledger_from_a_backup_counts_for_no_run_that_went_on(tmp_path):
    """What it lacks was released: neither resuming nor verifying may pass over that."""
    folder, again = tmp_path / "run", (privacy(), PLAN, {"model": "m"}, Circumstances())
    run = start(folder)
    run.save(1, dict, limit=5)
    backup = run.branch.ledger.path.read_bytes()
    run.save(2, dict, limit=5)
    run.branch.ledger.path.write_bytes(backup)
    with pytest.raises(UsageError, match="did not release checkpoint-2, so .* is older than this"):
        open_run(training(folder, "checkpoint-1"), *again)
    locate_checkpoint(run.checkpoints, 2).rename(run.checkpoints / "set-aside-2-of-branch-0")
    with pytest.raises(UsageError, match="did not release set-aside-2-of-branch-0"):
        open_run(training(folder, "checkpoint-1"), *again)
    found = check_checkpoints(run.branch.ledger.records(), run.checkpoints)
    assert found == ["the ledger did not release set-aside-2-of-branch-0"]


def record(kind: str, branch: int = 0, run: str = "a", **fields) -> dict:
    return {"kind": kind, "run": run, "branch": branch, "output": "checkpoint", **fields}


RESERVE = record("reserve", from_step=0, event={"steps": 5})


@pytest.mark.parametrize(
    "records, problems",
    [
        ([RESERVE, record("release", step=0), record("release", step=5)], []),
        ([RESERVE, record("release", step=2), record("wrote", step=2)], []),
        ([RESERVE, record("release", step=2), record("void", step=2)], []),
        ([RESERVE, record("give_up")], []),
        ([RESERVE, {**RESERVE, "run": "b"}], []),
        ([RESERVE, record("release", step=2), {**RESERVE, "branch": 1, "from_step": 2}], []),
        ([RESERVE, {**RESERVE, "branch": 1}], []),
        ([{**RESERVE, "branch": 1}], ["record 1 opens branch 1 out of turn"]),
        ([RESERVE, RESERVE], ["record 2 opens branch 0 out of turn"]),
        ([RESERVE, {**RESERVE, "branch": 2}], ["record 2 opens branch 2 out of turn"]),
        (
            [RESERVE, {**RESERVE, "branch": 1, "from_step": 2}],
            ["record 2 resumes from a step that was never released"],
        ),
        (
            [RESERVE, record("release", step=2), {**RESERVE, "run": "b", "from_step": 2}],
            ["record 3 resumes from a step that was never released"],
        ),
        ([record("release", step=1)], ["record 1 belongs to no open branch"]),
        ([RESERVE, record("release", 1, step=1)], ["record 2 belongs to no open branch"]),
        (
            [RESERVE, {**RESERVE, "branch": 1}, record("release", step=1)],
            ["record 3 belongs to no open branch"],
        ),
        (
            [RESERVE, record("release", step=6)],
            ["record 2 releases a step that was not reserved"],
        ),
        (
            [RESERVE, record("release", step=-1)],
            ["record 2 releases a step that was not reserved"],
        ),
        (
            [RESERVE, record("wrote", step=2)],
            ["record 2 is about a release that is not on record"],
        ),
        (
            [RESERVE, record("release", step=2), record("void", step=3)],
            ["record 3 is about a release that is not on record"],
        ),
        (
            [RESERVE, record("release", step=2), record("wrote", step=2, output="weights")],
            ["record 3 is about a release that is not on record"],
        ),
    ],
)
def test_records_that_no_run_writes_are_found(records, problems):
    numbered = [entry | {"index": index} for index, entry in enumerate(records)]
    assert check_records(numbered) == problems
