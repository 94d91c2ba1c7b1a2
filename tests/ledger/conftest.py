"""A statement that holds, without a run, and ways to spoil it."""

import copy
import json

import pytest

from tests.worlds import build_plan
from utils.ledger.checks import check_statement
from utils.ledger.statement import Circumstances, build_statement
from utils.privacy.accounting import account


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
