"""What a path stands for, and whether what it holds is what was paid for."""

import json
import re
from pathlib import Path

import pytest

from tests.ledger.conftest import PUBLISHED, state
from tests.worlds import build_plan
from utils.errors import UsageError
from utils.files import SAMPLE, private_folder
from utils.ledger.bases import read_base_statement
from utils.ledger.ledger import Ledger
from utils.ledger.statement import add_base, list_all_events, quote_total
from utils.ledger.verification import (
    HARMLESS,
    Source,
    check_card,
    describe_verified,
    fetch_statement,
    find_problems,
    read_source,
    summarise_spending,
)
from utils.privacy.accounting import quote

PLAN = PUBLISHED


def problems_of(path: Path) -> list[str]:
    return find_problems(read_source(str(path), None))


def test_a_published_run_verifies_in_words(published):
    source = read_source(str(published), None)
    assert find_problems(source) == []
    epsilon, files, ledger = describe_verified(source)
    stated = source.statement["epsilon"]
    assert f"ok: epsilon {quote(stated['add_or_remove_one'])} at delta 0.0001" in epsilon
    assert f"(replace one: {quote(stated['replace_one'])})" in epsilon
    assert files == "ok: the 2 published file(s) are those paid for"
    assert ledger == "ok: the ledger is whole, and agrees with the statement and checkpoints"


def test_a_statement_and_a_ledger_may_come_alone(published):
    statement = read_source(str(published / "privacy.json"), None)
    assert statement.folder is statement.ledger is None and find_problems(statement) == []
    assert describe_verified(statement)[1:] == [
        "no ledger lies here, so none was checked as a whole"
    ]
    ledger = read_source(str(private_folder(published) / "ledger.jsonl"), None)
    assert ledger.folder is ledger.statement is None and find_problems(ledger) == []
    (sentence,) = describe_verified(ledger)
    assert "the ledger is whole; there is no statement here" in sentence
    for source in (statement, ledger, read_source(str(published), None)):
        assert source.events() == [PLAN.event()] and source.delta() == 1e-4


def test_a_ledger_is_quoted_at_its_smallest_delta(published):
    path = private_folder(published) / "ledger.jsonl"
    Ledger(path).reserve(build_plan(delta=1e-6).terms(True))
    assert read_source(str(path), None).delta() == 1e-6
    empty = published / "empty.jsonl"
    empty.touch()
    assert read_source(str(empty), None).delta() == 0
    statement = json.loads((published / "privacy.json").read_text())
    assert Source(None, statement, Ledger(empty)).delta() == 1e-4


def test_files_that_are_missing_changed_or_not_accounted_for(published):
    (published / "a.safetensors").write_bytes(b"other")
    (published / "b.safetensors").unlink()
    (published / "unet").mkdir()
    (published / "unet" / "more.BIN").write_bytes(b"")
    (private_folder(published) / "more.bin").write_bytes(b"")  # what is private is no claim
    assert problems_of(published) == [
        "a.safetensors is not the file that was paid for",
        "b.safetensors is missing",
        "unet/more.BIN: the statement does not account for it",
    ]


def test_the_film_of_a_run_needs_no_account_in_a_repository():
    """As hub/upload sends it, with `--validation_steps`; other pictures are somebody else's."""
    for name in ("film.png", "grid.png", "0012.png"):
        assert HARMLESS.fullmatch(f"samples/{name}") and re.fullmatch(SAMPLE, name)
    assert not HARMLESS.fullmatch("samples/patient.png") and not HARMLESS.fullmatch("film.png")


def test_a_ledger_that_was_taken_away_is_missed(published):
    (private_folder(published) / "ledger.jsonl").unlink()
    assert problems_of(published) == ["the ledger is missing from private/"]


def test_weights_without_a_statement_are_not_accounted_for(published):
    (published / "privacy.json").unlink()
    assert problems_of(published) == [
        f"{name}.safetensors: the statement does not account for it" for name in "ab"
    ]


@pytest.mark.parametrize(
    "content, sentence",
    [("{broken", "is not valid JSON"), ("[1]", "is not a privacy statement"), ("", "valid JSON")],
)
def test_a_statement_that_cannot_be_read_gets_a_sentence(published, content, sentence):
    (published / "privacy.json").write_text(content)
    for name in (published, published / "privacy.json"):
        with pytest.raises(UsageError, match=sentence):
            read_source(str(name), None)
    with pytest.raises(UsageError, match=sentence):
        fetch_statement(str(published))


def test_a_folder_without_either_is_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no privacy.json and no ledger"):
        read_source(str(tmp_path), None)
    with pytest.raises(UsageError, match="is not a file, folder or Hub id"):
        read_source(str(tmp_path / "none.json"), None)


def test_damage_in_either_is_a_problem_not_a_traceback(published):
    ledger = private_folder(published) / "ledger.jsonl"
    whole = ledger.read_text()
    ledger.write_text("broken\n" + whole)
    (problem,) = problems_of(published)
    assert "is damaged in line 1" in problem
    ledger.write_text(whole)
    statement = json.loads((published / "privacy.json").read_text())
    (published / "privacy.json").write_text(json.dumps(statement | {"ledger": None}))
    assert any("malformed" in problem for problem in problems_of(published))


def test_a_private_base_is_counted_wherever_a_number_is_told(published):
    """`verify`, `show` and the front matter of the card say what both come to together."""
    path = published / "privacy.json"
    statement = add_base(json.loads(path.read_text()), state(steps=3, delta=1e-5))
    path.write_text(json.dumps(statement))
    together, events = quote_total(statement)[0], list_all_events(statement)
    assert together > statement["epsilon"]["add_or_remove_one"] + 1e-3
    for source in (read_source(str(path), None), read_source(str(published), None)):
        assert source.events() == events and source.delta() == 1e-5
        said = describe_verified(source)
        assert any(f"together epsilon {quote(together)} at delta 1e-05" in line for line in said)
        spent = summarise_spending(source)
        assert spent["epsilon"]["pld"] == statement["base"]["epsilon"]
        assert spent["membership_inference"] == statement["membership_inference"]
    own, card = statement["epsilon"]["add_or_remove_one"], published / "README.md"
    card.write_text(CARD.format(value=together, text=own))
    assert check_card(statement, published) == []
    card.write_text(CARD.format(value=own, text=own))
    (problem,) = check_card(statement, published)
    assert problem.startswith("README.md says epsilon")


def test_a_base_brings_its_statement_if_that_holds(published, tmp_path):
    statement = json.loads((published / "privacy.json").read_text())
    assert fetch_statement(str(published)) == (statement, True)
    assert read_base_statement(str(published)) == (statement, True)
    (tmp_path / "public").mkdir()
    assert read_base_statement(str(tmp_path / "public")) == (None, True)
    weights = published / "a.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(b"of a run that cost more")
    with pytest.raises(UsageError, match="a.safetensors is not the file that was paid for"):
        read_base_statement(str(published))
    weights.write_bytes(whole)
    changed = statement | {"delta": 1e-5}
    (published / "privacy.json").write_text(json.dumps(changed))
    with pytest.raises(UsageError, match="the privacy.json of the base model .*: the statement"):
        read_base_statement(str(published))
    (published / "privacy.json").write_text(json.dumps(changed | {"private": False}))
    assert read_base_statement(str(published)) == (changed | {"private": False}, True)


def test_a_base_of_which_nobody_can_tell_is_taken_as_public_with_a_warning(capsys):
    """Offline, as the tests are; once a name."""
    for _ in range(2):
        assert read_base_statement("someone/unheard-of") == (None, False)
    assert capsys.readouterr().err.count("whether someone/unheard-of is a private result") == 1


CARD = """---
model-index:
- name: run
  results:
  - task: {{type: text-to-image}}
    dataset: {{type: x, name: x}}
    metrics:
    - {{type: epsilon, value: {value}}}
---
**epsilon = {text}**
"""


@pytest.mark.parametrize("value, text, wrong", [(0, 0, 0), (0.002, 0, 1), (0, -0.01, 1), (1, 1, 2)])
def test_the_card_says_what_the_statement_says(published, value, text, wrong):
    stated = read_source(str(published), None).statement["epsilon"]["add_or_remove_one"]
    card = CARD.format(value=round(stated + value, 4), text=f"{stated + text:.4f}")
    (published / "README.md").write_text(card)
    problems = problems_of(published)
    assert len(problems) == wrong
    assert all(f"the statement {stated:.4f}" in problem for problem in problems)


def test_a_card_that_cannot_be_read_is_a_problem(published):
    (published / "README.md").write_text("---\na: [\n---\n")
    (problem,) = problems_of(published)
    assert problem.startswith("the front matter of README.md cannot be read")
