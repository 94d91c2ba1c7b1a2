"""privacy_report.py: what it shows is right, and nothing that was tampered with verifies."""

import json
import subprocess

import pytest

from tests.conftest import read_json, train_arguments, train_here
from tests.worlds import build_plan
from utils.errors import run_script
from utils.ledger.ledger import START, TERMS, Ledger, hash_record
from utils.privacy.accounting import pld_epsilon, quote

LEDGER = "private/ledger.jsonl"
WEIGHTS = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def published(tiny_base, image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "adapter"
    more = ["--checkpointing_steps", 1, "--num_validation_images", 1]
    train_here(train_arguments(tiny_base, image_folder, output, *more))
    return output


@pytest.fixture
def report(tmp_path, monkeypatch, capsys):
    """Run privacy_report.py in this process; returns its exit code and what it printed."""
    import sys

    import privacy_report

    def run(*arguments):
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["privacy_report.py", *map(str, arguments)])
        try:
            run_script(privacy_report.main)
            code = 0
        except SystemExit as end:
            code = end.code
        shown = capsys.readouterr()
        return code, shown.err + shown.out

    return run


def rewrite(output, change, rechain: bool) -> None:
    """Change the ledger's records; with `rechain`, make the hashes fit again."""
    records = [json.loads(line) for line in (output / LEDGER).read_text().splitlines()]
    change(records)
    previous = START
    for index, record in enumerate(records if rechain else []):
        record |= {"index": index, "previous": previous}
        record["hash"] = previous = hash_record(record)
    (output / LEDGER).write_text("".join(json.dumps(record) + "\n" for record in records))


def in_ledger(change, rechain: bool):
    return lambda output: rewrite(output, change, rechain)


def in_statement(change):
    def tamper(output):
        statement = read_json(output / "privacy.json")
        change(statement)
        (output / "privacy.json").write_text(json.dumps(statement))

    return tamper


def set_event(key, value):
    return lambda records: records[0]["event"].__setitem__(key, value)


def lower_everything(output):
    """The statement consistently rewritten for twice the noise, and only the ledger not."""

    def change(statement):
        event = statement["events"][0]
        event["noise_multiplier"] *= 2
        spent = pld_epsilon([event], statement["delta"])
        statement["epsilon"]["add_or_remove_one"] = spent
        statement["accountants"]["pld"]["epsilon"] = spent

    in_statement(change)(output)


def swap_adapter(output):
    data = bytearray((output / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (output / WEIGHTS).write_bytes(data)


def set_deep(*keys, value):
    def change(statement):
        for key in keys[:-1]:
            statement = statement[key]
        statement[keys[-1]] = value

    return change


def foreign_checkpoint(output):
    checkpoints = output / "private" / "checkpoints"
    (checkpoints / "checkpoint-2").rename(checkpoints / "checkpoint-9")


def no_checkpoint_records(records):
    kept = [r for r in records if r.get("output") != "checkpoint" or r["step"] != 2]
    records[:] = kept


def no_statement(output):
    (output / "privacy.json").unlink()


def hide_the_total(output):
    """Another run in the ledger, of which the statement says nothing."""
    from tests.worlds import build_plan

    records = [json.loads(line) for line in (output / LEDGER).read_text().splitlines()]
    (output / LEDGER).unlink()
    ledger = Ledger(output / LEDGER)
    branch = ledger.reserve(build_plan(steps=2, delta=1e-3).terms(True))
    branch.release(2, "weights")
    entry = branch.wrote(2, "weights", {})
    earlier = ledger.records()
    previous = entry["hash"]
    for record in records:
        record |= {"index": len(earlier), "previous": previous}
        record["hash"] = previous = hash_record(record)
        earlier.append(record)
    (output / LEDGER).write_text("".join(json.dumps(record) + "\n" for record in earlier))
    in_statement(set_deep("ledger", "entry", value=previous))(output)


def go_on_in_secret(output):
    """The run was gone on with from an older checkpoint, and nothing was published since."""

    ledger = Ledger(output / LEDGER)
    first = ledger.records()[0]
    branch = ledger.reserve({key: first[key] for key in TERMS}, run=first["run"], step=1)
    branch.release(3, "checkpoint")


TAMPERINGS = {
    "an event removed from the chain": in_ledger(lambda records: records.pop(3), False),
    "the last record removed": in_ledger(lambda records: records.pop(), False),
    "the last two records removed": in_ledger(lambda r: (r.pop(), r.pop()), False),
    "sigma edited": in_ledger(set_event("noise_multiplier", 5.0), False),
    "sigma edited and the chain redone": in_ledger(set_event("noise_multiplier", 5.0), True),
    "steps edited and the chain redone": in_ledger(set_event("steps", 2), True),
    "the rate edited and the chain redone": in_ledger(set_event("sampling_rate", 0.01), True),
    "releases removed and the chain redone": in_ledger(no_checkpoint_records, True),
    "two records swapped": in_ledger(lambda r: r.insert(2, r.pop(3)), False),
    "a hash changed": in_ledger(lambda r: r[2].__setitem__("hash", "0" * 64), False),
    "the ledger deleted": lambda output: (output / LEDGER).unlink(),
    "the ledger of a newer version": in_ledger(
        lambda r: [record.__setitem__("schema_version", 2) for record in r], True
    ),
    "sigma edited in the statement": in_statement(
        set_deep("events", 0, "noise_multiplier", value=5.0)
    ),
    "steps edited in the statement": in_statement(set_deep("events", 0, "steps", value=1)),
    "epsilon edited": in_statement(set_deep("epsilon", "add_or_remove_one", value=1.0)),
    "the other epsilon edited": in_statement(set_deep("epsilon", "replace_one", value=1.0)),
    "the second accountant edited": in_statement(
        set_deep("accountants", "prv", "epsilon", value=1.0)
    ),
    "delta edited": in_statement(set_deep("delta", value=2e-2)),
    "the number of units edited": in_statement(set_deep("num_units", value=400)),
    "an event removed from the statement": in_statement(set_deep("events", value=[])),
    "a negative event": in_statement(set_deep("events", 0, "noise_multiplier", value=-1.0)),
    "noise doubled throughout the statement": lower_everything,
    "stamped not private": in_statement(set_deep("private", value=False)),
    "half a statement": in_statement(lambda statement: statement.pop("events")),
    "an event without steps": in_statement(lambda s: s["events"][0].pop("steps")),
    "the adapter swapped": swap_adapter,
    "the adapter removed": lambda output: (output / WEIGHTS).unlink(),
    "another adapter added": lambda o: (o / "more.safetensors").write_bytes(b"weights"),
    "a checkpoint that nobody paid for": foreign_checkpoint,
    "weights without their statement": no_statement,
    "the ledger's total left out": hide_the_total,
    "more released since": go_on_in_secret,
}


def copy_folder(folder, target):
    subprocess.run(["cp", "-r", folder, target], check=True)
    return target


def test_what_was_published_verifies_here_and_after_a_download(published, report, tmp_path):
    code, shown = report("verify", published)
    assert code == 0 and "the ledger is whole" in shown, shown
    import shutil

    copy = copy_folder(published, tmp_path / "download")
    shutil.rmtree(copy / "private")
    code, shown = report("verify", copy)
    assert code == 0 and "no ledger lies here" in shown
    assert report("verify", published / "privacy.json")[0] == 0


@pytest.mark.parametrize("tampering", TAMPERINGS)
def test_a_tampered_copy_is_rejected(published, report, tmp_path, tampering):
    copy = copy_folder(published, tmp_path / "copy")
    TAMPERINGS[tampering](copy)
    code, shown = report("verify", copy)
    assert code == 1 and "does not verify" in shown and "\n- " in shown, shown


def test_show_lists_every_event_and_composes_them(published, report, tmp_path):
    code, shown = report("show", published, "--json")
    found = json.loads(shown.splitlines()[-1])
    statement = read_json(published / "privacy.json")
    assert code == 0 and found["delta"] == statement["delta"]
    assert found["epsilon"]["pld"] == statement["epsilon"]
    assert [event["steps"] for event in found["events"]] == [3]
    assert found["events"][0]["adds"] == found["events"][0]["epsilon"]
    assert abs(found["epsilon"]["prv"]["replace_one"] - statement["epsilon"]["replace_one"]) < 0.03
    assert found["runs"][0]["state"] == "finished"
    assert (tmp_path / "privacy_report.png").stat().st_size > 10_000
    assert report("show", published / "private" / "ledger.jsonl")[0] == 0


def test_plan_answers_both_questions(report):
    question = ["plan", "--num_units", 5000, "--expected_batch_size", 250]
    question += ["--max_train_steps", 40, "--target_delta", 1e-5, "--json"]
    code, shown = report(*question, "--target_epsilon", 3)
    forth = json.loads(shown.splitlines()[-1])
    assert code == 0 and 2.99 < forth["epsilon"]["add_or_remove_one"] <= 3
    code, shown = report(*question, "--noise_multiplier", forth["plan"]["noise_multiplier"])
    back = json.loads(shown.splitlines()[-1])
    assert code == 0 and back["epsilon"] == forth["epsilon"]


def test_a_dead_run_is_given_up(report, tmp_path):
    branch = Ledger(tmp_path / "ledger.jsonl").reserve(build_plan(steps=9).terms(False))
    branch.release(2, "checkpoint")
    shown = report("show", tmp_path / "ledger.jsonl")[1]
    assert "NOT PRIVATE: the noise can be made again" in shown and "unfinished" in shown
    code, shown = report("give_up", tmp_path / "ledger.jsonl", branch.run)
    assert code == 0 and "2 steps" in shown
    assert "given up" in report("show", tmp_path / "ledger.jsonl")[1]


@pytest.mark.parametrize("arguments, sentence", [
    (["show", "nowhere"], "not a file, folder or Hub id"),
    (["verify", "."], "no privacy.json and no ledger"),
    (["give_up", "nothing.jsonl", "x"], "there is no ledger"),
    (["plan", "--num_units", 10, "--expected_batch_size", 5, "--max_train_steps", 1,
      "--target_delta", 0.5, "--target_epsilon", 1], "below 1/N"),
])  # fmt: skip
def test_mistakes_get_a_sentence(report, arguments, sentence):
    code, shown = report(*arguments)
    assert code == 2 and sentence in shown


def test_a_config_without_numbers_gets_a_sentence(report, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("max_train_steps: [3]\ntarget_delta: small\nexpected_batch_size: 5\n")
    code, shown = report("plan", "--num_units", 10, "--config", config, "--noise_multiplier", 1)
    assert code == 2 and "is not a number" in shown and str(config) in shown


def test_the_officers_page_answers_for_one_adapter(published, report, tmp_path):
    code, shown = report("officer", published)
    assert code == 0 and "see officer.html" in shown
    text = (tmp_path / "officer.html").read_text()
    statement = read_json(published / "privacy.json")
    epsilon = statement["epsilon"]["add_or_remove_one"]
    for fact in (quote(epsilon), "One image, with its caption", "Against everybody who sees"):
        assert fact in text, fact
    assert f"4 times epsilon, {quote(4 * epsilon)}" in text
    assert all(point[1:] in text for point in statement["not_covered"])
    assert "follows from the events" in text and "Name, date, signature" in text
    assert "<script" not in text and "http" not in text


@pytest.mark.parametrize("tampering", ["the ledger's total left out", "more released since"])
def test_the_officers_page_says_do_not_sign(published, report, tmp_path, tampering):
    copy = copy_folder(published, tmp_path / "copy")
    TAMPERINGS[tampering](copy)
    code, _ = report("officer", copy)
    text = (tmp_path / "officer.html").read_text()
    assert code == 1 and "Do not sign" in text and "Name, date, signature" not in text


def test_without_a_statement_there_is_nothing_to_sign(published, report):
    code, shown = report("officer", published / LEDGER)
    assert code == 2 and "nothing to sign" in shown


@pytest.mark.parametrize("command, option", [("officer", "output_file"), ("show", "plot")])
@pytest.mark.parametrize("place, said", [("no/it", "no such folder"), (".", "is a folder")])
def test_a_file_in_no_folder_is_a_sentence(report, command, option, place, said):
    code, shown = report(command, ".", f"--{option}", place)
    assert code == 2 and f"--{option} {place}" in shown and said in shown
    assert "must end in one of .png" in report("show", ".", "--plot", "it.txt")[1]
