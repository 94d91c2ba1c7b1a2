"""What the records of a ledger come to, number by number."""

import pytest

from tests.ledger.conftest import state
from tests.worlds import build_plan
from utils.errors import UsageError
from utils.files import private_folder
from utils.hub.privacy_words import describe_formally
from utils.ledger.charges import (
    compose_with_bases,
    find_smallest_delta,
    list_charged_events,
    list_released_steps,
    summarise_runs,
)
from utils.ledger.checks import check_entry
from utils.ledger.ledger import Ledger
from utils.ledger.remembered import find_other_ledgers, remember_run
from utils.ledger.runs import Run
from utils.ledger.statement import Circumstances
from utils.ledger.verification import find_problems, read_source
from utils.privacy.accounting import pld_epsilon, quote


def terms(steps: int, **changes) -> dict:
    return build_plan(steps=steps).terms(True) | changes


@pytest.fixture
def ledger(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.jsonl")


def test_only_the_runs_that_are_asked_for_and_only_those_that_spent(ledger):
    first, second, third = (ledger.reserve(terms(steps)) for steps in (3, 5, 7))
    third.give_up()  # before it released anything
    first.release(3, "weights")
    second.release(2, "checkpoint")
    records = ledger.records()
    assert [event["steps"] for event in list_charged_events(records)] == [3, 5]
    assert [e["steps"] for e in list_charged_events(records, [second.run])] == [5]
    assert list_charged_events(records, [third.run]) == []
    assert list_charged_events(records, []) == []
    unfinished = {"run": second.run, "released": 2, "planned": 5, "state": "unfinished"}
    assert summarise_runs(records)[1] == unfinished
    second.give_up()
    assert summarise_runs(ledger.records()) == [
        {"run": first.run, "released": 3, "planned": 3, "state": "finished"},
        {"run": second.run, "released": 2, "planned": 5, "state": "given up"},
        {"run": third.run, "released": 0, "planned": 7, "state": "given up"},
    ]


def test_the_smallest_delta_is_of_runs_that_spent(ledger):
    idle = ledger.reserve(terms(3, delta=1e-9))
    ledger.reserve(terms(3, delta=1e-4)), ledger.reserve(terms(3, delta=1e-5))
    assert find_smallest_delta(ledger.records()) == 1e-9
    idle.give_up()
    assert find_smallest_delta(ledger.records()) == 1e-5


def test_a_cap_says_what_is_held_and_who_holds_it(ledger):
    live = ledger.reserve(terms(3))
    done = ledger.reserve(terms(4))
    done.release(4, "weights")
    held = pld_epsilon(list_charged_events(ledger.records()), 1e-4)
    total = pld_epsilon([build_plan(steps=steps).event() for steps in (3, 4, 2)], 1e-4)
    with pytest.raises(UsageError) as refused:
        ledger.reserve(terms(2), total_epsilon=total - 1e-6)
    text = str(refused.value)
    assert f"to epsilon {quote(total)}, above --total_epsilon {total - 1e-6:g}" in text
    assert f"comes to {quote(held)} at delta 0.0001, the smallest on record" in text
    assert f"(unfinished: {live.run}; resume them" in text and done.run not in text
    ledger.reserve(terms(2), total_epsilon=total + 1e-9)


def test_a_fresh_ledger_holds_nothing(ledger):
    with pytest.raises(UsageError, match=r"comes to 0\.000 at delta 0\.0001, the smallest on rec"):
        ledger.reserve(terms(3), total_epsilon=0.01)


def test_other_units_and_reproducible_noise_do_not_mix(ledger):
    public = ledger.reserve(terms(3, private=False))
    with pytest.raises(UsageError, match="holds a run with reproducible noise"):
        ledger.reserve(terms(3))
    with pytest.raises(UsageError, match="a run with reproducible noise has no epsilon: give it"):
        ledger.reserve(terms(3, private=False))
    ledger.reserve(terms(3, private=False, builds_on=[public.run]))
    with pytest.raises(UsageError, match="about another privacy unit than 'all images of one p'"):
        ledger.reserve(terms(3, private=False, privacy_unit="all images of one p"))


def test_no_run_is_quoted_at_a_larger_delta_than_those_that_it_builds_on(ledger):
    """Fewer images allow a larger delta, at which what was spent on all of them looks small."""
    first = ledger.reserve(terms(3, delta=1e-6))
    with pytest.raises(UsageError, match="--target_delta 0.001 is above the 1e-06 of what"):
        ledger.reserve(terms(3, delta=1e-3, num_units=20, builds_on=[first.run]))
    ledger.reserve(terms(3, delta=1e-6, builds_on=[first.run]))
    ledger.reserve(terms(3, delta=1e-3))  # builds on none
    assert len(ledger.records()) == 3


def test_every_run_that_spent_counts_whichever_came_first(ledger):
    ledger.reserve(terms(3)).give_up()
    ledger.reserve(terms(3, privacy_unit="all images of one p"))
    with pytest.raises(UsageError, match="about another privacy unit than 'image'"):
        ledger.reserve(terms(3))


def test_a_run_with_reproducible_noise_takes_no_cap(ledger):
    with pytest.raises(UsageError, match="no --total_epsilon"):
        ledger.reserve(terms(3, private=False), total_epsilon=5.0)


def test_a_run_that_gave_up_before_its_first_step_binds_nobody(ledger):
    ledger.reserve(terms(3, privacy_unit="all images of one p", private=False)).give_up()
    ledger.reserve(terms(3))


def test_a_release_that_was_taken_back_shows_nothing_unless_it_was_written():
    def entry(kind: str, step: int) -> dict:
        return {"kind": kind, "branch": 0, "step": step}

    records = [entry("release", 1), entry("release", 2), entry("release", 3)]
    records += [entry("void", 2), entry("wrote", 3), entry("void", 3), entry("void", 9)]
    assert list_released_steps(records) == {1, 3}


def test_a_checkpoint_that_was_taken_back_is_not_that_of_a_later_branch(ledger):
    """Of the same step: a copy of it would be resumed, and its steps never charged."""
    first = ledger.reserve(terms(4))
    first.release(2, "checkpoint")
    first.void(2)
    second = ledger.reserve(terms(4), run=first.run, step=0)
    second.release(2, "checkpoint")
    second.wrote(2, "checkpoint")
    about = {"run": first.run, "step": 2, "branch": 0}
    with pytest.raises(UsageError, match="no checkpoint of step 2"):
        ledger.check_resuming(about, None)
    with pytest.raises(UsageError, match="no checkpoint of step 2"):
        ledger.reserve(terms(4), run=first.run, step=2, of_branch=0)
    for known in ({"branch": 1}, {"branch": None}):
        ledger.check_resuming(about | known, None)
    assert ledger.reserve(terms(4), run=first.run, step=2, of_branch=1).number == 2


def test_the_total_counts_the_private_bases_of_other_runs(ledger, tmp_path):
    """Whoever asks: a statement, its card, the ledger by itself, the memory of other ledgers."""
    base = state(3, delta=1e-5) | {"ledger": {"run": "elsewhere", "entry": "e" * 64}}
    plan, statements = build_plan(), {}
    for name, behind in (("first", base), ("second", None)):
        about = Circumstances(base=behind)
        branch = ledger.reserve(plan.terms(True), None, name, made_with=about.made_with())
        private_folder(tmp_path / name).mkdir(parents=True)
        export = lambda folder: (folder / "w.safetensors").write_bytes(b"w")  # noqa: E731
        statements[name] = Run(tmp_path / name, branch, {}, about).publish(export, plan)
    spent = pld_epsilon([*base["events"], plan.event(), plan.event()], 1e-5)
    assert pld_epsilon(*compose_with_bases(ledger.records())) == spent
    assert "everything" not in statements["first"]["ledger"]  # its own base and itself
    total = statements["second"]["ledger"]["everything"]
    assert total["delta"] == 1e-5 and total["epsilon"]["add_or_remove_one"] == spent
    assert f"epsilon = {quote(spent)} (" in describe_formally(statements["second"])
    alone = read_source(str(ledger.path), None)
    assert pld_epsilon(alone.events(), alone.delta()) == spent
    for name in statements:
        (private_folder(tmp_path / name) / "ledger.jsonl").symlink_to(ledger.path)
        assert find_problems(read_source(str(tmp_path / name), None)) == []
    remember_run("scans", ledger, "first", 1.0, 1e-4)
    (said,) = find_other_ledgers("scans", Ledger(tmp_path / "other.jsonl"))
    assert f"stands at epsilon {quote(spent)} at delta 1e-05" in said


def test_a_run_that_is_not_private_has_no_total(ledger, tmp_path):
    base = state(3) | {"ledger": {"run": "elsewhere", "entry": "e" * 64}}
    plan, about = build_plan(), Circumstances(is_private=False, base=base)
    branch = ledger.reserve(plan.terms(False), None, "debugged", made_with=about.made_with())
    private_folder(tmp_path).mkdir(exist_ok=True)
    export = lambda folder: (folder / "w.safetensors").write_bytes(b"w")  # noqa: E731
    assert "everything" not in Run(tmp_path, branch, {}, about).publish(export, plan)["ledger"]


def test_a_total_without_a_base_of_the_ledger_does_not_verify(ledger, tmp_path):
    base = state(3) | {"ledger": {"run": "elsewhere", "entry": "e" * 64}}
    plan, about = build_plan(), Circumstances(base=base)
    ledger.reserve(plan.terms(True), None, "first", made_with=about.made_with()).release(1, "w")
    branch = ledger.reserve(plan.terms(True), None, "second", made_with=Circumstances().made_with())
    private = private_folder(tmp_path)
    private.mkdir(exist_ok=True)
    export = lambda folder: (folder / "w.safetensors").write_bytes(b"w")  # noqa: E731
    statement = Run(tmp_path, branch, {}, Circumstances()).publish(export, plan)
    assert check_entry(statement, ledger.records()) == []
    events = statement["ledger"]["everything"]["events"]
    statement["ledger"]["everything"]["events"] = events[len(base["events"]) :]
    assert "the statement's total is not that of the ledger" in check_entry(
        statement, ledger.records()
    )


def test_a_base_that_only_the_statement_knows_is_counted_once(ledger):
    """As of a ledger from before such bases were noted there."""
    base = state(3) | {"ledger": {"run": "elsewhere", "entry": "e" * 64}}
    ledger.reserve(terms(2)).release(2, "weights")
    charged = list_charged_events(ledger.records())
    assert compose_with_bases(ledger.records(), base)[0] == [*base["events"], *charged]
    paid_here = base | {"ledger": {"entry": ledger.records()[0]["hash"]}}
    assert compose_with_bases(ledger.records(), paid_here)[0] == charged
