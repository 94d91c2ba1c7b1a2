"""A statement, records and checkpoints that are not right: the sentence for each."""

import copy
import json

import pytest

from tests.worlds import build_plan
from utils.ledger.charges import list_charged_events
from utils.ledger.checkpoints import announce_checkpoint, locate_checkpoint, save_checkpoint
from utils.ledger.checks import check_checkpoints, check_ledger, check_records, check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.statement import Circumstances, add_base, build_statement, quote_total
from utils.privacy.accounting import account, membership_power, pld_both_relations


def state(steps: int = 1, **changes) -> dict:
    plan = build_plan(steps=steps, **changes)
    spent = account([plan.event()], plan.delta)
    statement = build_statement(plan, [plan.event()], spent, Circumstances())
    return json.loads(json.dumps(statement)) | {"files": {"weights.safetensors": "digest"}}


@pytest.fixture(scope="module")
def whole() -> dict:
    statement = state()
    assert check_statement(statement) == []
    return statement


def change(statement: dict, *path, value) -> dict:
    """A copy in which what stands at `path` is another."""
    changed = copy.deepcopy(statement)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value(place[path[-1]]) if callable(value) else value
    return changed


@pytest.mark.parametrize(
    "path, value, sentence",
    [
        (["schema_version"], 0, "schema version 0, none of 1 to 2"),
        (["schema_version"], 3, "schema version 3, none of 1 to 2"),
        (["private"], False, "stamped NOT PRIVATE"),
        (["private"], 1, "stamped NOT PRIVATE"),
        (["num_units"], 0, "the number of units is 0"),
        (["num_units"], 200.0, "the number of units is 200.0"),
        (["delta"], 0.0, "delta 0 is not below 1/N = 0.005"),
        (["delta"], 0.005, "delta 0.005 is not below 1/N = 0.005"),
        (["events"], [], "the statement has no events"),
        (["events", 0, "sampling_rate"], 0, "an impossible rate, noise or number"),
        (["events", 0, "sampling_rate"], 1.01, "an impossible rate, noise or number"),
        (["events", 0, "noise_multiplier"], 0, "an impossible rate, noise or number"),
        (["events", 0, "steps"], 0, "an impossible rate, noise or number"),
        (["events", 0, "steps"], 1.5, "an impossible rate, noise or number"),
        (["events", 0, "steps"], 2, "the statement says epsilon"),
        (["epsilon", "add_or_remove_one"], lambda e: e + 0.0011, "(add or remove one); its events"),
        (["epsilon", "add_or_remove_one"], lambda e: e - 0.0011, "(add or remove one); its events"),
        (["epsilon", "replace_one"], lambda e: e - 0.0011, "(replace one); its events come to"),
        (["epsilon", "replace_one"], float("nan"), "(replace one); its events come to"),
        (["accountants", "pld", "epsilon"], lambda e: e - 1e-9, "PLD accountant and its epsilon"),
        (["accountants", "prv", "epsilon"], lambda e: e * 1.002 + 0.021, "says PRV epsilon"),
        (["accountants", "prv", "epsilon"], lambda e: e * 0.998 - 0.021, "says PRV epsilon"),
        (["accountants", "prv", "epsilon"], float("nan"), "says PRV epsilon"),
        (["membership_inference", "0.01"], lambda p: p - 0.0011, "inference succeeds"),
        (["membership_inference", "0.01"], lambda p: p + 0.0011, "inference succeeds"),
        (["membership_inference"], {}, "membership inference succeeds None of the time"),
        (["num_units"], None, "the number of units is None"),
        (["events"], 7, "the statement is malformed"),
    ],
)
def test_what_is_wrong_with_a_statement_is_said(whole, path, value, sentence):
    problems = check_statement(change(whole, *path, value=value))
    assert problems and sentence in problems[0]


@pytest.mark.parametrize(
    "path, value",
    [
        (["epsilon", "replace_one"], lambda e: e + 0.0009),
        (["accountants", "prv", "epsilon"], lambda e: e + 0.019),
        (["membership_inference", "0.001"], lambda p: p + 0.0009),
        (["schema_version"], 1),
        (["num_units"], 1),
    ],
)
def test_what_another_version_of_an_accountant_may_say_passes(whole, path, value):
    assert check_statement(change(whole, *path, value=value)) == []


@pytest.mark.parametrize(
    "key",
    ["epsilon", "delta", "num_units", "privacy_unit", "events", "accountants", "files"],
)
def test_what_a_statement_lacks_is_named(whole, key):
    lacking = {name: value for name, value in whole.items() if name != key}
    assert check_statement(lacking) == [f"the statement lacks {key}"]


def test_what_came_with_schema_2_may_lack_in_schema_1(whole):
    lacking = {k: v for k, v in whole.items() if k != "membership_inference"}
    assert check_statement(lacking) == ["the statement lacks membership_inference"]
    assert check_statement(lacking | {"schema_version": 1}) == []


def test_a_total_of_the_ledger_is_checked_at_its_own_delta(whole):
    events = whole["events"] * 2
    for at, given in ((1e-4, {}), (1e-5, {"delta": 1e-5})):
        total = {"events": events, "epsilon": pld_both_relations(events, at), **given}
        assert check_statement(whole | {"ledger": {"everything": total}}) == []
        total["epsilon"]["replace_one"] -= 0.01
        (problem,) = check_statement(whole | {"ledger": {"everything": total}})
        assert problem.startswith("its ledger's total says epsilon")


def test_a_base_adds_up(whole):
    base = state(steps=3, delta=1e-5)
    both = add_base(whole, base)
    assert check_statement(both) == []
    assert [event["steps"] for event in both["base"]["events"]] == [3]
    events = [*base["events"], *whole["events"]]
    expected = pld_both_relations(events, 1e-5)
    assert both["base"]["epsilon"] == expected and both["base"]["delta"] == 1e-5
    assert both["membership_inference"] == membership_power(events)
    assert quote_total(both) == (expected["add_or_remove_one"], 1e-5)
    assert quote_total(whole) == (whole["epsilon"]["add_or_remove_one"], 1e-4)
    third = add_base(state(steps=2), both)  # a base that has a base
    assert [event["steps"] for event in third["base"]["events"]] == [3, 1]
    assert third["base"]["delta"] == 1e-5 and check_statement(third) == []
    (problem,) = check_statement(change(both, "base", "epsilon", "replace_one", value=1.0))
    assert problem.startswith("it and its base says epsilon 1.0000 (replace one)")
    larger = {"events": base["events"], "delta": 2e-4, "epsilon": pld_both_relations(events, 2e-4)}
    assert "it and its base are quoted at a larger delta than the statement" in check_statement(
        whole | {"base": larger}
    )


# The ledger --------------------------------------------------------------------------------------


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


def test_checkpoints_must_be_of_steps_that_their_run_released(tmp_path):
    for step in (1, 2, 3):
        announce_checkpoint(tmp_path, step)
        save_checkpoint(tmp_path, step, {}, {"run": "a", "agreed": {}})
    released = [record("release", step=1), record("release", run="b", step=2)]
    found = check_checkpoints([RESERVE, *released, record("wrote", step=3)], tmp_path)
    assert found == [f"the ledger did not release checkpoint-{step}" for step in (2, 3)]
    locate_checkpoint(tmp_path, 2).rename(locate_checkpoint(tmp_path, 4))
    (locate_checkpoint(tmp_path, 3) / "state.pt").unlink()
    released = [record("release", step=step) for step in (1, 2, 3, 4)]
    damaged, renamed = check_checkpoints(released, tmp_path)
    assert "checkpoint-3 is missing or damaged" in damaged
    assert renamed == "the ledger did not release checkpoint-4"


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
