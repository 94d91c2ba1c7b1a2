"""What is remembered of other ledgers, for a warning."""

import json

import pytest

from tests.worlds import build_plan
from utils.ledger.charges import list_charged_events
from utils.ledger.ledger import Ledger
from utils.ledger.remembered import find_other_ledgers, locate_memory, remember_run
from utils.privacy.accounting import pld_epsilon, quote


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def charge(ledger: Ledger, source: str = "scans", steps: int = 3) -> str:
    run = ledger.reserve(build_plan(steps=steps).terms(True)).run
    remember_run(source, ledger, run, 1.25, 1e-4)
    return run


def test_another_ledger_is_named_with_what_it_stands_at(tmp_path):
    here, other = (Ledger(tmp_path / name) for name in ("z.jsonl", "a.jsonl"))
    charge(here)
    assert find_other_ledgers("scans", here) == []
    charge(other), charge(other, steps=5)
    (sentence,) = find_other_ledgers("scans", here)
    events = list_charged_events(other.records())
    assert [event["steps"] for event in events] == [3, 5]
    assert f"{other.path}, which stands at epsilon {quote(pld_epsilon(events, 1e-4))}" in sentence
    assert "at delta 0.0001." in sentence and f"--privacy_ledger {other.path}" in sentence
    (sentence,) = find_other_ledgers("scans", other)
    assert str(here.path) in sentence
    assert find_other_ledgers("other scans", here) == []


def test_what_several_ledgers_come_to_is_told(tmp_path):
    here, *others = (Ledger(tmp_path / name) for name in ("z.jsonl", "a.jsonl", "b.jsonl"))
    for ledger in others:
        charge(ledger)
    *each, together = find_other_ledgers("scans", here)
    events = [event for ledger in others for event in list_charged_events(ledger.records())]
    assert len(each) == len(events) == 2
    assert f"2 ledgers come to at most epsilon {quote(pld_epsilon(events, 1e-4))} at" in together
    other = build_plan(steps=3, unit_column="patient").terms(True)  # cannot be added to those
    remember_run("scans", last := Ledger(tmp_path / "c.jsonl"), last.reserve(other).run, 1.0, 1e-4)
    assert len(find_other_ledgers("scans", here)) == 3


def test_a_run_whose_ledger_is_gone_is_named(tmp_path):
    here, other, third = (Ledger(tmp_path / name) for name in ("m.jsonl", "a.jsonl", "z.jsonl"))
    charge(here)
    gone = [charge(other), charge(third)]
    other.path.unlink(), third.path.write_text("not a ledger\n")
    sentences = find_other_ledgers("scans", here)
    assert len(sentences) == 2
    for sentence, ledger, run in zip(sentences, (other, third), gone, strict=True):
        assert f"charged to run {run} of 20" in sentence and "is gone" in sentence
        assert f"epsilon 1.250 at delta 0.0001), whose ledger {ledger.path}" in sentence


def test_a_ledger_that_was_begun_anew_at_the_same_place_does_not_hide_the_old_one(tmp_path):
    here = Ledger(tmp_path / "ledger.jsonl")
    old = charge(here)
    here.path.unlink()
    charge(here)
    (sentence,) = find_other_ledgers("scans", here)
    assert f"run {old} of" in sentence


def test_where_the_memory_lies_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert locate_memory() == tmp_path / ".local/state/private-adapters/ledgers.json"


@pytest.mark.parametrize("content", ["", "[1, 2]", "{broken", "\xff"])
def test_a_memory_that_cannot_be_read_warns_of_nothing_and_is_written_anew(tmp_path, content):
    locate_memory().parent.mkdir(parents=True)
    locate_memory().write_bytes(content.encode("latin-1"))
    here, other = Ledger(tmp_path / "here.jsonl"), Ledger(tmp_path / "other.jsonl")
    assert find_other_ledgers("scans", here) == []
    charge(other)
    assert len(json.loads(locate_memory().read_text())["scans"]) == 1
    assert len(find_other_ledgers("scans", here)) == 1
