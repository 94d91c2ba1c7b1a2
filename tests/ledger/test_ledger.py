"""The ledger file: chained, append-only, and charged by branches."""

import json
from datetime import UTC, datetime

import pytest

from tests.worlds import build_plan
from utils.errors import UsageError
from utils.ledger import ledger as ledger_module
from utils.ledger.charges import count_charged_steps, is_live, list_charged_events
from utils.ledger.ledger import Ledger, find_branch, hash_record, make_run_name
from utils.ledger.verification import check_records

TERMS = build_plan(steps=10).terms(True)


@pytest.fixture
def ledger(tmp_path):
    return Ledger(tmp_path / "ledger.jsonl")


def checkpoint(branch, step: int) -> None:
    branch.release(step, "checkpoint")
    branch.wrote(step, "checkpoint")


def charge(ledger, branch) -> tuple[int, int]:
    """What a run is charged for: released, and with what it holds in reserve."""
    records = ledger.records()
    assert check_records(records) == []
    return count_charged_steps(records, branch.run, live=False), count_charged_steps(
        records, branch.run
    )


def test_a_straight_run_is_charged_as_it_releases(ledger):
    branch = ledger.reserve(TERMS)
    assert charge(ledger, branch) == (0, 10)
    for step in (0, 4, 8, 10):
        checkpoint(branch, step)
        assert charge(ledger, branch) == (step, 10)
    assert not is_live(ledger.records(), branch.run)


def test_going_on_from_the_last_release_charges_no_more(ledger):
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 4)
    again = ledger.reserve(TERMS, run=branch.run, step=4)
    assert charge(ledger, again) == (4, 10)
    checkpoint(again, 10)
    assert charge(ledger, again) == (10, 10)


def test_going_on_from_an_older_release_charges_the_steps_in_between_again(ledger):
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 4)
    checkpoint(branch, 7)
    again = ledger.reserve(TERMS, run=branch.run, step=4)
    assert charge(ledger, again) == (7, 7 + 6)
    checkpoint(again, 6)
    third = ledger.reserve(TERMS, run=branch.run, step=4)
    checkpoint(third, 10)
    assert charge(ledger, third) == (7 + 2 + 6, 7 + 2 + 6)


def test_a_checkpoint_that_never_came_to_be_is_taken_back_and_others_are_not(ledger):
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 4)
    branch.release(6, "checkpoint")
    assert charge(ledger, branch)[0] == 6
    branch.void(6)
    assert charge(ledger, branch)[0] == 4
    branch.void(4)  # it was written: it stays charged
    assert charge(ledger, branch)[0] == 4


def test_a_run_resumes_only_from_what_it_released_and_on_the_same_terms(ledger):
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 4)
    for step, terms, message in [
        (5, TERMS, "no checkpoint of step 5"),
        (4, TERMS | {"num_units": 3}, "another num_units"),
        (4, build_plan(steps=10, noise_multiplier=2.0).terms(True), "another event"),
    ]:
        with pytest.raises(UsageError, match=message):
            ledger.reserve(terms, run=branch.run, step=step)
    with pytest.raises(UsageError, match="no run"):
        ledger.reserve(TERMS, run="unknown", step=4)
    branch.release(6, "checkpoint")
    branch.void(6)
    with pytest.raises(UsageError, match="no checkpoint of step 6"):
        ledger.reserve(TERMS, run=branch.run, step=6)
    with pytest.raises(UsageError, match="has a run"):
        ledger.reserve(TERMS, run=branch.run)
    with pytest.raises(UsageError, match="no run"):
        find_branch(ledger, "unknown")


def test_a_plan_may_change_before_anything_is_released(ledger):
    """Some images could not be read: fewer units, another rate."""
    branch = ledger.reserve(TERMS)
    fewer = build_plan(steps=10, num_units=190).terms(True)
    branch = ledger.reserve(fewer, run=branch.run, step=0)
    assert charge(ledger, branch) == (0, 10)
    event = list_charged_events(ledger.records())[0]
    assert event["sampling_rate"] == fewer["event"]["sampling_rate"]


def read_lines(ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize(
    "damage", ["cut", "changed", "removed", "swapped", "garbage", "inserted", "carriage return"]
)
def test_damage_is_found_and_nothing_is_appended_to_it(ledger, damage):
    branch = ledger.reserve(TERMS)
    for step in (2, 4, 6):
        checkpoint(branch, step)
    lines = read_lines(ledger)
    if damage == "cut":
        lines[2] = lines[2][:40] + b"\n"
    elif damage == "changed":
        lines[3] = lines[3].replace(b'"step": 4', b'"step": 3')
    elif damage == "removed":
        del lines[3]
    elif damage == "swapped":
        lines[2], lines[3] = lines[3], lines[2]
    elif damage == "garbage":
        lines[2] = b"\x00\xff\n"
    elif damage == "carriage return":
        lines[2] = lines[2].replace(b"wrote", b"wro\rte")
    else:
        lines.insert(3, lines[2])
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(UsageError, match="damaged in line"):
        ledger.records()
    with pytest.raises(UsageError, match="damaged in line"):
        branch.release(8, "checkpoint")
    assert ledger.path.read_bytes() == b"".join(lines)


@pytest.mark.parametrize("changes", [{"previous": "0" * 64}, {"previous": "f" * 64}, {"index": 0}])
@pytest.mark.parametrize("line", [1, 2])
def test_a_forged_record_does_not_fit_its_place(ledger, changes, line):
    """Its own hash is right; what it says of those before it is not."""
    ledger.reserve(TERMS).release(10, "weights"), ledger.reserve(TERMS)
    lines = ledger.path.read_text().splitlines()
    forged = json.loads(lines[line]) | changes
    forged["hash"] = hash_record(forged)
    ledger.path.write_text("\n".join([*lines[:line], json.dumps(forged)]) + "\n")
    with pytest.raises(UsageError, match=f"damaged in line {line + 1}: a record was changed"):
        ledger.records()


def test_an_append_that_was_cut_off_never_happened(ledger):
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 2)
    whole = ledger.path.read_bytes()
    branch.release(4, "checkpoint")
    torn = ledger.path.read_bytes()[:-20]
    ledger.path.write_bytes(torn)
    assert charge(ledger, branch)[0] == 2
    branch.release(4, "checkpoint")
    assert ledger.path.read_bytes().startswith(whole) and charge(ledger, branch)[0] == 4


def test_a_newer_version_is_refused(ledger):
    ledger.reserve(TERMS)
    record = json.loads(read_lines(ledger)[0]) | {"schema_version": 2}
    record["hash"] = ledger_module.hash_record(record)
    ledger.path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UsageError, match="newer version"):
        ledger.reserve(TERMS)


def test_a_clock_that_goes_backwards_changes_nothing(ledger, monkeypatch):
    branch = ledger.reserve(TERMS)

    class Backwards(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime(1999, 1, 1, tzinfo=UTC)

    monkeypatch.setattr(ledger_module, "datetime", Backwards)
    checkpoint(branch, 4)
    assert ledger.records()[-1]["time"].startswith("1999")
    assert charge(ledger, branch) == (4, 10)


def test_a_full_disk_leaves_the_ledger_as_it_was(ledger, monkeypatch):
    branch = ledger.reserve(TERMS)
    before = ledger.path.read_bytes()

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger_module.os, "fsync", full)
    with pytest.raises(UsageError, match="No space left"):
        branch.release(4, "checkpoint")
    assert ledger.path.read_bytes() == before


def test_each_append_is_on_disk_before_it_returns(ledger, monkeypatch):
    synced = []
    whole = ledger_module.os.fsync
    monkeypatch.setattr(ledger_module.os, "fsync", lambda h: (synced.append(h), whole(h)))
    branch = ledger.reserve(TERMS)
    count = len(synced)
    branch.release(1, "checkpoint")
    assert count >= 1 and len(synced) > count


# A ledger as version 0.9.0 wrote it; later versions must go on reading it.
WRITTEN = {
    "schema_version": 1,
    "index": 0,
    "time": "2026-11-26T00:00:00+00:00",
    "kind": "reserve",
    "run": "00aa",
    "branch": 0,
    "from_step": 0,
    "event": {"mechanism": "poisson_subsampled_gaussian", "steps": 3},
    "delta": 1e-05,
    "num_units": 200,
    "privacy_unit": "image",
    "private": True,
    "builds_on": [],
    "previous": "0" * 64,
    "hash": "ffca4f83992fec24e418a7380135f7a167a07e014fb3cf9d42778526bb142b00",
}


def test_a_ledger_of_an_earlier_version_is_read(ledger):
    ledger.path.write_text(json.dumps(WRITTEN) + "\n")
    assert ledger.records() == [WRITTEN]
    assert [event["steps"] for event in list_charged_events(ledger.records())] == [3]


def test_only_the_last_branch_can_hand_back_what_is_reserved(ledger):
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 4)
    branch.give_up()
    assert charge(ledger, branch) == (4, 4)
    again = ledger.reserve(TERMS, run=branch.run, step=4)
    assert charge(ledger, again) == (4, 10)  # what the first one handed back is taken again
    checkpoint(again, 6)
    again.give_up()
    assert charge(ledger, again) == (6, 6)


def test_a_later_reservation_of_fewer_steps_takes_nothing_back(ledger):
    """No run writes that; who edits a ledger might."""
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 8)
    ledger.reserve(TERMS, run=branch.run, step=8)
    *others, last = ledger.records()
    last["event"] = last["event"] | {"steps": 3}
    assert count_charged_steps([*others, last], branch.run) == 8


def test_a_ledger_that_was_taken_away_takes_no_more(ledger):
    branch = ledger.reserve(TERMS)
    ledger.path.unlink()
    with pytest.raises(UsageError, match="has lost run"):
        branch.release(4, "checkpoint")


def test_the_last_branch_of_a_run_is_found(ledger):
    branch = ledger.reserve(TERMS)
    checkpoint(branch, 4)
    ledger.reserve(TERMS, run=branch.run, step=4)
    assert (branch.number, find_branch(ledger, branch.run).number) == (0, 1)


def test_a_run_has_a_random_name():
    names = {make_run_name() for _ in range(100)}
    assert len(names) == 100 and all(len(bytes.fromhex(name)) == 8 for name in names)
