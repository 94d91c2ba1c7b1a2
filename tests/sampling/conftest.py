"""An adapter, a private base model, and statements that hold by themselves."""

import json
import shutil

import pytest

from tests.conftest import train_arguments, train_here
from tests.worlds import build_plan
from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.files import STATEMENT
from utils.ledger.statement import Circumstances, build_statement
from utils.privacy.accounting import account
from utils.sampling.sources import find_source


@pytest.fixture(scope="module")
def adapter(tiny_base, image_folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("adapter") / "run"
    assert "saved" in train_here(train_arguments(tiny_base, image_folder, output))
    return output


@pytest.fixture
def copied(adapter, tmp_path):
    return shutil.copytree(adapter, tmp_path / "adapter")


def state(**changes) -> dict:
    """A statement that holds by itself."""
    plan = build_plan(**{"num_units": 500, "steps": 3, "delta": 1e-3} | changes)
    about = Circumstances(randomness="a test")
    made = build_statement(plan, plan.events(), account(plan.events(), plan.delta), about)
    return json.loads(json.dumps(made | {"files": {}}))


@pytest.fixture
def private_base(tiny_base, tmp_path):
    """A base model that is a private result itself."""
    base = shutil.copytree(tiny_base, tmp_path / "private_base")
    (base / STATEMENT).write_text(json.dumps(state()))
    return base


def find(base, adapter=None):
    model = ModelArguments(pretrained_model_name_or_path=str(base))
    return find_source(model, SamplingArguments(adapter=adapter and str(adapter)))
