"""Images are not called public that are known to come from private ones, wherever that is asked."""

import json

import pytest
import torch

from tests.worlds import build_plan
from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.rehearsal import RehearsalArguments
from utils.arguments.training import DataArguments, ModelArguments
from utils.errors import UsageError
from utils.evaluation.features import build_extractor
from utils.ledger.ledger import Ledger
from utils.ledger.public_sets import refuse_private_set
from utils.ledger.remembered import remember_run
from utils.methods.stand_in import load_stand_in

REFUSED = "called public and lose that epsilon"


@pytest.fixture
def images(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


@pytest.mark.parametrize(
    "name, content, warns",
    [
        ("sampling.json", {"is_public": False}, True),
        ("sampling.json", [], True),
        ("sampling.json", {"is_public": True}, False),
        ("sampling.json", {"steps": 8}, False),
        ("metadata.jsonl", {}, False),
    ],
)
def test_a_doubt_about_images_is_told(images, capsys, name, content, warns):
    """Whoever calls them public may know, as on a machine that does not reach the Hub."""
    (images / name).write_text(json.dumps(content))
    refuse_private_set("--stand_in", str(images))
    said = capsys.readouterr().err
    assert said.count("drawn by what nobody could tell") == warns and bool(said) == warns


def test_private_images_that_are_called_public_are_told_of(images, tmp_path, capsys):
    ledger = Ledger(tmp_path / "ledger.jsonl")
    run = ledger.reserve(build_plan().terms(True)).run
    remember_run(str(images.resolve()), ledger, run, 1.0, 1e-4)
    refuse_private_set("--public_data", str(images))
    said = capsys.readouterr().err
    assert f"charged to the ledger {ledger.path} as private images" in said
    refuse_private_set("--public_data", None)
    assert capsys.readouterr().err == ""


def test_public_inputs_of_every_kind_are_asked(images, tmp_path, run_script):
    (images / "privacy.json").write_text("{}")
    extracting = ExtractorArguments(
        "classifier", classifier_weights=str(tmp_path / "weights"), public_data=[str(images)]
    )
    with pytest.raises(UsageError, match=f"--public_data .*{REFUSED}"):
        build_extractor(extracting, torch.device("cpu"))
    rehearsing = RehearsalArguments(stand_in=str(images))
    base = ModelArguments(pretrained_model_name_or_path="base")
    with pytest.raises(UsageError, match=f"--stand_in .*{REFUSED}"):
        load_stand_in(base, DataArguments(), rehearsing, tmp_path, None, 9)
    more = ["--resolution", 32, "--label_column", "label", "--output_dir", tmp_path / "base"]
    run = run_script("pretrain_ldm.py", "--dataset_name", images, *more)
    assert run.returncode == 2 and REFUSED in run.stderr and not (tmp_path / "base").exists()
