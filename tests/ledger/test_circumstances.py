"""What a run says beside its mechanisms: how it was made, and how to go on with it."""

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest

from tests.ledger.conftest import PLAN, privacy, start, state, training
from tests.worlds import build_plan
from utils.arguments.training import DataArguments, TrainingArguments
from utils.errors import UsageError
from utils.files import explain_disk_errors, private_folder
from utils.ledger.charges import compose_with_bases
from utils.ledger.checks import check_ledger
from utils.ledger.ledger import Ledger
from utils.ledger.reservations import check_new, confirm, open_run
from utils.ledger.statement import (
    STOPPED,
    UNKNOWN_BASE,
    Circumstances,
    add_base,
    begins_with,
    quote_total,
)
from utils.methods.private_run import describe_for_trackers
from utils.methods.stages import collect_settings
from utils.privacy.accounting import pld_epsilon, quote

OTHERS = "the private images, their captions or their units are others"
PLAIN = Circumstances(randomness="Philox", precision="bf16")
BETTER = Circumstances(randomness="secure", precision="fp32", audit={"kind": "replay"})


def resume(folder: Path, about: Circumstances):
    run = open_run(training(folder, "latest"), privacy(), PLAN, {"model": "m"}, about)
    return confirm(run, privacy(), PLAN, "")


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


def test_a_statement_cannot_say_that_a_run_was_made_otherwise_than_the_ledger_does(tmp_path):
    """Each of these changes what the guarantee rests on, and none an event."""
    about = Circumstances(randomness="Philox", precision="bf16", is_base_known=False)
    run = start(tmp_path / "run", about)
    statement = run.publish(lambda folder: None, build_plan(steps=2))  # of four
    records = run.branch.ledger.records()
    assert check_ledger(statement, records) == []
    covered = [doubt for doubt in statement["not_covered"] if doubt not in (STOPPED, UNKNOWN_BASE)]
    for changes, sentences in (
        ({"randomness": "secure"}, ["randomness Philox, the statement secure"]),
        ({"precision": "fp32"}, ["precision bf16, the statement fp32"]),
        ({"audit": {"result": "passed"}}, ["an audit, of which the ledger has none"]),
        ({"not_covered": covered}, [UNKNOWN_BASE, STOPPED]),
    ):
        problems = check_ledger(statement | changes, records)
        assert len(problems) == len(sentences)
        for problem, sentence in zip(problems, sentences, strict=True):
            assert sentence in problem


def test_a_run_resumes_on_the_private_set_that_it_was_trained_on(tmp_path):
    """Of as many units: else whoever was swapped out or in is in steps that nobody can tell."""
    begun = confirm(start(tmp_path / "run"), privacy(), PLAN, "of these images")
    begun.save(2, dict, limit=2)
    again = (training(tmp_path / "run", "latest"), privacy(), PLAN, {"model": "m"}, PLAIN)
    with pytest.raises(UsageError, match=OTHERS) as refused:
        confirm(open_run(*again), privacy(), PLAN, "of others")
    assert "of these images" not in str(refused.value)
    confirm(open_run(*again), privacy(), PLAN, "of these images")
    start(tmp_path / "older").save(2, dict, limit=2)  # its checkpoint knows no digest
    confirm(open_run(training(tmp_path / "older", "latest"), *again[1:]), privacy(), PLAN, "any")


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


def test_a_stop_is_told_of_all_that_builds_on_it(tmp_path):
    """If its step was chosen by looking, no epsilon of theirs holds either."""
    shared, steps = str(tmp_path / "shared.jsonl"), {"stopped": 2, "finished": 4}
    first = {name: start(tmp_path / name, PLAIN, privacy_ledger=shared) for name in steps}
    for name, run in first.items():
        run.publish(lambda folder: None, build_plan(steps=steps[name]))
    for name, builds_on in (
        ("stopped", ["finished", "stopped"]),
        ("finished", ["finished"]),
        ("nothing", []),
    ):
        plan = build_plan(steps=4, builds_on=tuple(first[run].branch.run for run in builds_on))
        run = start(tmp_path / f"on {name}", PLAIN, plan, privacy_ledger=shared)
        statement = run.publish(lambda folder: None, plan)
        assert (STOPPED in statement["not_covered"]) == (name == "stopped")


def test_what_is_charged_once_more_is_told():
    """To the screen and to trackers, as it is in the ledger."""
    plan = build_plan(steps=3)
    told = describe_for_trackers(plan, None, 2, TrainingArguments(output_dir="unused"))
    epsilon = pld_epsilon(plan.events(5), plan.delta)
    assert told["epsilon"] == pytest.approx(epsilon) and told["delta"] == plan.delta
    assert told["cost"] == f"epsilon {quote(epsilon)} at delta {plan.delta:g}"


def test_a_base_of_which_nobody_knows_is_not_covered(tmp_path):
    doubtful = start(tmp_path / "run", Circumstances(is_base_known=False))
    assert UNKNOWN_BASE in doubtful.publish(lambda folder: None, PLAN)["not_covered"]
    known = start(tmp_path / "known", Circumstances())
    assert UNKNOWN_BASE not in known.publish(lambda folder: None, PLAN)["not_covered"]


def paid_base(entry: str = "b", **changes) -> dict:
    """The statement of a base model that another ledger has paid for."""
    return state(**changes) | {"ledger": {"run": entry, "entry": entry * 64}}


def test_a_doubt_about_the_base_is_not_resumed_away(tmp_path):
    """A copy of it from the cache carries no privacy.json, and is known to carry none."""
    start(tmp_path / "run", Circumstances(is_base_known=False)).save(2, dict, limit=2)
    statement = resume(tmp_path / "run", Circumstances()).publish(lambda folder: None, PLAN)
    assert UNKNOWN_BASE in statement["not_covered"]


@pytest.mark.parametrize("step", [0, 2])
def test_a_private_base_is_not_resumed_away(tmp_path, step):
    """The weights, and so their checksum, are those of a copy without the statement."""
    base = paid_base()
    start(tmp_path / "run", Circumstances(base=base)).save(step, dict, limit=2)
    for other in (None, paid_base("c"), paid_base(steps=2)):
        with pytest.raises(UsageError, match="a private result itself"):
            resume(tmp_path / "run", Circumstances(base=other))
    run = resume(tmp_path / "run", Circumstances(base=base))
    statement = run.publish(lambda folder: None, PLAN)
    records = run.branch.ledger.records()
    assert statement["base"]["entries"] == ["b" * 64] and check_ledger(statement, records) == []
    for spoiled in (
        {k: v for k, v in statement.items() if k != "base"},
        add_base(statement, paid_base("c")),
    ):
        assert "does not count" in check_ledger(spoiled, records)[0]


def test_a_run_has_the_private_base_of_what_it_builds_on(tmp_path):
    """As a selection and the training after it, of one base."""
    shared, base = str(tmp_path / "shared.jsonl"), paid_base()
    first = start(tmp_path / "first", Circumstances(base=base), privacy_ledger=shared)
    first.publish(lambda folder: None, PLAN)
    plan = build_plan(steps=4, builds_on=(first.branch.run,))
    with pytest.raises(UsageError, match="builds on or resumes"):
        asked = privacy(privacy_ledger=shared)
        check_new(tmp_path / "second", asked, plan, Circumstances())
    with pytest.raises(UsageError, match="builds on or resumes"):
        start(tmp_path / "second", Circumstances(), plan, privacy_ledger=shared)
    deeper = add_base(paid_base("d"), base)  # a base that was itself made from that base
    for number, known in enumerate((base, deeper)):
        about = Circumstances(base=known)
        start(tmp_path / f"known{number}", about, plan, privacy_ledger=shared)
    unrelated = Circumstances()
    start(tmp_path / "other", unrelated, privacy_ledger=shared)  # builds on nothing


def test_the_cap_counts_what_the_private_bases_have_cost(tmp_path):
    """Once each, if another ledger paid; at the smallest delta of all."""
    ledger, base = Ledger(tmp_path / "ledger.jsonl"), paid_base(delta=1e-6)
    terms, about = PLAN.terms(True), Circumstances(base=base)
    alone, _ = quote_total(state(steps=4, delta=1e-6))
    statement = add_base(state(steps=4), base)
    total, delta = quote_total(statement)
    assert delta == 1e-6 and alone + 0.01 < total
    for cap, refused in ((total - 0.01, True), (total + 1e-9, False)):  # as a dry run asks
        with pytest.raises(UsageError, match="above --total") if refused else nullcontext():
            there = {"privacy_ledger": str(ledger.path), "start_ledger": True}
            check_new(tmp_path / "new", privacy(total_epsilon=cap, **there), PLAN, about)
    with pytest.raises(UsageError, match="above --total_epsilon"):
        ledger.reserve(terms, total - 0.01, made_with=about.made_with())
    assert ledger.records() == []
    ledger.reserve(terms, total + 1e-9, made_with=about.made_with())
    twice = pld_epsilon([*statement["base"]["events"], *2 * statement["events"]], 1e-6)
    with pytest.raises(UsageError, match=f"to epsilon {quote(twice)}.*comes to {quote(total)}"):
        ledger.reserve(terms, twice - 0.01, made_with=about.made_with())
    ledger.reserve(terms, twice + 1e-9, made_with=about.made_with())


def test_bases_that_no_ledger_knows_are_told_apart_by_what_they_did(tmp_path):
    """Statements without an entry, as others may write: one must not stand for another, though it
    be of the same recipe."""
    ledger, files = Ledger(tmp_path / "ledger.jsonl"), [{"unet": "a"}, {"unet": "a"}, {"unet": "b"}]
    bases = [state(steps=n) | {"files": f} for n, f in zip((2, 9, 9), files, strict=True)]
    bases = [{k: v for k, v in base.items() if k != "ledger"} for base in bases]
    for base in (*bases, bases[0]):
        about = Circumstances(base=base)
        ledger.reserve(PLAN.terms(True), made_with=about.made_with())
    events, _ = compose_with_bases(ledger.records())
    assert sorted(event["steps"] for event in events[:3]) == [2, 9, 9] and len(events) == 7
    assert begins_with(bases[1], bases[1]) and not begins_with(bases[1], bases[2])


def test_the_cap_does_not_count_a_base_twice_that_the_ledger_itself_paid_for(tmp_path):
    first = start(tmp_path / "first")
    base = first.publish(lambda folder: None, PLAN)
    ledger, made_with = first.branch.ledger, Circumstances(base=base).made_with()
    both = pld_epsilon(2 * base["events"], PLAN.delta)
    ledger.reserve(PLAN.terms(True), both + 1e-9, made_with=made_with)


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
