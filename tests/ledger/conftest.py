"""A statement that holds, without a run, and ways to spoil it."""

import copy
import json
from pathlib import Path

import pytest

from tests.worlds import build_plan
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.ledger.checks import check_statement
from utils.ledger.reservations import open_run
from utils.ledger.runs import claim_output_dir
from utils.ledger.statement import Circumstances, build_statement
from utils.privacy.accounting import account

PLAN, PUBLISHED = build_plan(steps=4), build_plan(steps=2)


def state(steps: int = 1, **changes) -> dict:
    plan = build_plan(steps=steps, **changes)
    spent = account([plan.event()], plan.delta)
    statement = build_statement(plan, [plan.event()], spent, Circumstances())
    return json.loads(json.dumps(statement)) | {"files": {"weights.safetensors": "digest"}}


@pytest.fixture(scope="session")
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


def training(folder: Path, checkpoint: str | None = None) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), resume_from_checkpoint=checkpoint)


def privacy(**changes) -> PrivacyArguments:
    return PrivacyArguments(**({"target_epsilon": 8.0, "target_delta": 1e-4} | changes))


def start(folder: Path, about=None, plan=PLAN, **changes):
    claim_output_dir(training(folder)).release()
    about = about or Circumstances()
    return open_run(training(folder), privacy(**changes), plan, {"model": "m"}, about)


@pytest.fixture
def published(tmp_path) -> Path:
    """The folder of a run that published two files of weights."""
    run = start(tmp_path / "run", plan=PUBLISHED)

    def export(folder: Path) -> None:
        for name in ("a.safetensors", "b.safetensors"):
            (folder / name).write_bytes(name.encode())

    run.publish(export, PUBLISHED)
    return tmp_path / "run"
