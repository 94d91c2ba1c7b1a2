"""Clause 9: all that is done with the same data is composed, and stays within one budget."""

import contextlib
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace

import pytest

from tests.conftest import ROOT, quiet_environment, read_json, train_arguments, train_here
from tests.worlds import build_plan
from utils.arguments.training import PrivacyArguments
from utils.errors import UsageError
from utils.ledger import ledger as ledger_module
from utils.ledger.charges import find_smallest_delta, list_charged_events
from utils.ledger.checks import check_ledger, check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.remembered import find_other_ledgers, remember_run
from utils.ledger.reservations import check_room_for
from utils.ledger.runs import Run
from utils.ledger.statement import Circumstances
from utils.ledger.verification import find_problems, read_source
from utils.privacy.accounting import pld_both_relations, pld_epsilon


def terms(steps: int = 5, **changes) -> dict:
    return build_plan(steps=steps).terms(True) | changes


def epsilon_after(*steps: int) -> float:
    return pld_epsilon([build_plan(steps=count).event() for count in steps], 1e-4)


def test_runs_on_one_ledger_are_composed(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    for steps in (5, 7):
        branch = ledger.reserve(terms(steps), total_epsilon=epsilon_after(5, 7) + 1e-6)
        branch.release(steps, "weights")
    events = list_charged_events(ledger.records())
    assert [event["steps"] for event in events] == [5, 7]
    assert pld_epsilon(events, 1e-4) == epsilon_after(5, 7)
    with pytest.raises(UsageError, match="above --total_epsilon"):
        ledger.reserve(terms(1), total_epsilon=epsilon_after(5, 7) + 1e-6)


def test_what_a_live_run_reserved_counts_until_it_is_handed_back(tmp_path):
    ledger, cap = Ledger(tmp_path / "ledger.jsonl"), epsilon_after(8) + 1e-3
    live = ledger.reserve(terms(8), cap)
    live.release(3, "checkpoint")
    with pytest.raises(UsageError, match=f"unfinished: {live.run}"):
        ledger.reserve(terms(5), cap)
    live.give_up()
    assert list_charged_events(ledger.records())[0]["steps"] == 3
    ledger.reserve(terms(5), cap)
    with pytest.raises(UsageError, match="above --total_epsilon"):
        ledger.reserve(terms(1), cap)


@pytest.mark.parametrize("first, second", [(1e-4, 5e-4), (5e-4, 1e-4)])
def test_the_cap_is_measured_at_the_smallest_delta_on_record(tmp_path, first, second):
    """A larger delta of the newcomer, or of what is there, makes nothing cheaper."""
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.reserve(terms(5, delta=first)).release(5, "weights")
    cheap = pld_epsilon([build_plan(steps=n).event() for n in (5, 7)], 5e-4)
    assert cheap + 0.1 < epsilon_after(5, 7)
    with pytest.raises(UsageError, match="at delta 0.0001, the smallest on record"):
        ledger.reserve(terms(7, delta=second), total_epsilon=cheap + 0.1)
    ledger.reserve(terms(7, delta=second), total_epsilon=epsilon_after(5, 7) + 1e-6)
    assert find_smallest_delta(ledger.records()) == 1e-4


def test_both_stages_to_come_are_measured_at_the_smallest_delta_on_record(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path).reserve(terms(5, delta=1e-4)).release(5, "weights")
    later = [build_plan(steps=7).event()]
    cheap = pld_epsilon([build_plan(steps=n).event() for n in (5, 7)], 5e-4)
    privacy = PrivacyArguments(target_delta=5e-4, privacy_ledger=str(path))
    enough = replace(privacy, total_epsilon=epsilon_after(5, 7) + 1e-6)
    check_room_for(tmp_path, enough, later, Circumstances())
    with pytest.raises(UsageError, match="all stages"):
        check_room_for(
            tmp_path, replace(privacy, total_epsilon=cheap + 0.1), later, Circumstances()
        )


def test_a_statement_quotes_everything_at_the_smallest_delta_on_record(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.reserve(terms(5, delta=1e-4)).release(5, "weights")
    plan = build_plan(steps=7, delta=5e-4)
    (tmp_path / "run" / "private").mkdir(parents=True)
    run = Run(tmp_path / "run", ledger.reserve(plan.terms(True)), {}, Circumstances())
    statement = run.publish(lambda folder: (folder / "a.bin").write_bytes(b"a"), plan)
    together = statement["ledger"]["everything"]
    assert together["delta"] == 1e-4
    assert together["epsilon"]["add_or_remove_one"] == epsilon_after(5, 7)
    assert check_statement(statement) == [] and check_ledger(statement, ledger.records()) == []
    cheap = pld_epsilon(together["events"], 5e-4)
    for wrong in ({"delta": 5e-4}, {"epsilon": together["epsilon"] | {"add_or_remove_one": cheap}}):
        statement["ledger"]["everything"] = together | wrong
        assert check_statement(statement) + check_ledger(statement, ledger.records())
    consistent = {"delta": 5e-4, "epsilon": pld_both_relations(together["events"], 5e-4)}
    statement["ledger"]["everything"] = together | consistent
    assert check_statement(statement) == []
    assert "smallest delta" in check_ledger(statement, ledger.records())[0]
    del statement["ledger"]["everything"]["delta"]  # then that of the statement itself is meant
    assert "smallest delta" in check_ledger(statement, ledger.records())[0]


def test_a_run_that_would_exceed_the_budget_is_refused_before_an_image_is_read(tiny_base, tmp_path):
    """No image of this set can be read; what is said is about the budget."""
    for index in range(40):
        (tmp_path / "images" / str(index % 4)).mkdir(parents=True, exist_ok=True)
        (tmp_path / "images" / str(index % 4) / f"{index}.png").write_bytes(b"no image")
    arguments = train_arguments(tiny_base, tmp_path / "images", tmp_path / "run")
    assert "none of the 40 images" in train_here([*arguments, "--total_epsilon", 8])
    assert "above --total_epsilon 7.9" in train_here([*arguments, "--total_epsilon", 7.9])


def test_a_dry_run_is_refused_too_and_reserves_nothing(tiny_base, image_folder, tmp_path):
    shared = ["--privacy_ledger", tmp_path / "shared.jsonl", "--dry_run"]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *shared)
    assert '"noise_multiplier"' in train_here(arguments)
    assert not (tmp_path / "shared.jsonl").exists()
    capped = [*arguments, "--total_epsilon", 1, "--start_ledger"]
    assert "above --total_epsilon" in train_here(capped)


def test_a_shared_ledger_that_is_not_there_is_no_fresh_budget(tiny_base, image_folder, tmp_path):
    """A mistyped name, or a disk that is not mounted, would forget all that was spent."""
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--dry_run")
    capped = [*arguments, "--total_epsilon", 9, "--privacy_ledger"]
    assert "correct its name, or start it" in train_here([*capped, tmp_path / "shared.jsonl"])
    nowhere = tmp_path / "not_mounted" / "shared.jsonl"
    for more in ([], ["--start_ledger"]):
        assert "its folder does not exist" in train_here([*capped, nowhere, *more])
    assert not nowhere.parent.exists()
    started = [*capped, tmp_path / "shared.jsonl", "--start_ledger"]
    assert '"noise_multiplier"' in train_here(started)


def test_runs_on_the_same_images_in_other_ledgers_are_named(
    tiny_base, image_folder, tmp_path, monkeypatch, capsys
):
    """Five runs in five folders are five cards of epsilon 8, and five times the harm."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def warnings(name: str, *more) -> list[str]:
        capsys.readouterr()
        train_here(train_arguments(tiny_base, image_folder, tmp_path / name, *more))
        return [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]

    warnings("debugging", "--debug_noise_seed", 1)  # has no epsilon that could add up
    assert warnings("planned", "--dry_run") == [] == warnings("first")
    ledgers = [tmp_path / name / "private" / "ledger.jsonl" for name in ("first", "second")]
    for name in ("second", "third"):
        for more in (["--dry_run"], []):
            found = warnings(name, *more)
            assert re.search(f"{ledgers[0]}, which stands at epsilon (7.9|8.0)", found[0])
            assert len(found) == (1 if name == "second" else 3)
    assert str(ledgers[1]) in found[1]
    assert "those 2 ledgers come to at most epsilon 1" in found[2]  # less than 16, by composition

    shared = ["--privacy_ledger", ledgers[0]]
    assert all(str(ledgers[0]) not in line for line in warnings("fourth", *shared))
    # A ledger that was deleted spent what it spent, also if the same folder is used anew.
    shutil.rmtree(tmp_path / "second")
    found = warnings("second")
    gone = [line for line in found if "is gone" in line]
    assert len(gone) == 1
    assert re.search(f"planned epsilon (7.9|8.0).* whose ledger {ledgers[1]} is gone", gone[0])
    memory = tmp_path / "state" / "private-adapters"
    assert memory.stat().st_mode & 0o777 == 0o700 and not (tmp_path / "second" / "state").exists()


def test_a_home_that_cannot_be_written_stops_no_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "state").write_text("a file, where a folder should be")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    ledger = Ledger(tmp_path / "ledger.jsonl")
    remember_run("scans", ledger, "a run", 8.0, 1e-5)
    assert "cannot be warned" in capsys.readouterr().err
    assert find_other_ledgers("scans", ledger) == []


def test_two_runs_at_once_cannot_both_take_the_last_of_the_budget(
    tiny_base, image_folder, tmp_path
):
    """Two real processes, started together, on a ledger that has room for one."""
    shared = ["--privacy_ledger", tmp_path / "shared.jsonl", "--total_epsilon", 9]
    shared += ["--start_ledger"]
    runs = []
    for name in ("first", "second"):
        arguments = train_arguments(tiny_base, image_folder, tmp_path / name, *shared)
        command = [sys.executable, ROOT / "train_dp_lora.py", *arguments]
        runs.append(
            subprocess.Popen(
                list(map(str, command)), env=quiet_environment(), stderr=subprocess.PIPE, text=True
            )
        )
    said = [run.communicate()[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 2], said
    refused = 0 if runs[0].returncode else 1
    assert "above --total_epsilon 9" in said[refused]
    winner = tmp_path / ("second", "first")[refused]
    assert not find_problems(read_source(str(winner), None))

    # A third, later run is told of, in the statement of the one after it.
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "third", *shared[:2])
    train_here(arguments)
    statement = read_json(tmp_path / "third" / "privacy.json")
    assert statement["epsilon"]["add_or_remove_one"] <= 8
    together = statement["ledger"]["everything"]
    assert [event["steps"] for event in together["events"]] == [3, 3]
    assert together["epsilon"]["add_or_remove_one"] > 9
    assert not find_problems(read_source(str(tmp_path / "third"), None))


def admitted(tmp_path, monkeypatch) -> int:
    """How many of two threads get in that both try to look before either writes."""
    ledger, cap = Ledger(tmp_path / "ledger.jsonl"), epsilon_after(5)
    both, whole, got = threading.Barrier(2), ledger_module.check_admissible, []

    def looks(*arguments):
        whole(*arguments)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(timeout=1)

    monkeypatch.setattr(ledger_module, "check_admissible", looks)

    def attempt():
        with contextlib.suppress(UsageError):
            got.append(ledger.reserve(terms(5), cap))

    threads = [threading.Thread(target=attempt) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return len(got)


def test_looking_and_reserving_is_one_act(tmp_path, monkeypatch):
    assert admitted(tmp_path, monkeypatch) == 1


def test_a_ledger_without_its_lock_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "FileLock", lambda path: contextlib.nullcontext())
    assert admitted(tmp_path, monkeypatch) == 2


def test_one_ledger_protects_one_kind_of_unit(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    ledger.reserve(terms())
    with pytest.raises(UsageError, match="another privacy unit"):
        ledger.reserve(terms(privacy_unit="all images of one patient"))


def test_reproducible_noise_neither_joins_a_ledger_nor_is_capped(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    with pytest.raises(UsageError, match="reproducible noise"):
        ledger.reserve(terms(private=False), total_epsilon=100.0)
    ledger.reserve(terms(private=False))
    with pytest.raises(UsageError, match="reproducible noise"):
        ledger.reserve(terms())
