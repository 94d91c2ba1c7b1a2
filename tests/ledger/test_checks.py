"""A statement that is not right: the sentence for each."""

import json

import pytest

from tests.ledger.conftest import change, state
from tests.worlds import build_plan
from utils.ledger.checks import check_statement
from utils.ledger.statement import add_base, quote_total, write_statement
from utils.privacy.accounting import membership_power, pld_both_relations


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
        (["delta"], 9e-10, "or is so small, below 1e-09, that no accountant is exact"),
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


def test_a_total_is_no_less_than_what_it_is_the_total_of(whole):
    """Nor may a small epsilon be stated at half of what it is, or at a larger delta."""
    for events, at in ((whole["events"], 1e-3), (build_plan(noise_multiplier=50).events(), 1e-4)):
        total = {"events": events, "epsilon": pld_both_relations(events, at), "delta": at}
        (problem,) = check_statement(whole | {"ledger": {"everything": total}})
        assert problem == "its ledger's total is less than its own, or at a larger delta"
    tiny = state(noise_multiplier=2000.0)
    half = {relation: epsilon / 2 for relation, epsilon in tiny["epsilon"].items()}
    assert check_statement(tiny) == [] and half["add_or_remove_one"] < 1e-3
    assert "the statement says epsilon" in check_statement(tiny | {"epsilon": half})[0]


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


def test_the_file_is_laid_out_for_people(whole, tmp_path):
    write_statement(whole, tmp_path)
    text = (tmp_path / "privacy.json").read_text()
    assert json.loads(text) == whole and text.startswith('{\n  "schema_version": 2,\n')
    assert text.endswith("\n}\n")
