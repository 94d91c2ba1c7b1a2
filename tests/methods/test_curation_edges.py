"""curate.py: private bases, seeds, processes and small variations."""

import json
import shutil
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset
from PIL import Image
from safetensors.torch import load_file

from tests.conftest import CAPTION, ROOT, read_json, train_arguments, train_here
from tests.methods.conftest import draw
from tests.methods.test_curation import EXTRACTOR, curate
from tests.sampling.conftest import state
from tests.scripts.test_many_processes import together
from utils.arguments.means import LaterModelArguments
from utils.arguments.training import DataArguments
from utils.errors import UsageError
from utils.evaluation.features import Extractor
from utils.ledger.verification import find_problems, read_source
from utils.methods import curation as story
from utils.methods import election
from utils.methods.classes import build_nearest
from utils.methods.election import Candidates, extract_candidates, match_classes


@pytest.mark.slow
def test_a_private_base_behind_a_set_is_not_forgotten(drawn, tiny_base, image_folder, tmp_path):
    """It is carried into the statement of a vote; a warm start elsewhere, which would lose it, is
    refused."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(drawn / "adapter" / "privacy.json", base)
    adapter = tmp_path / "adapter"
    assert "saved" in train_here(train_arguments(base, image_folder, adapter))
    assert "24 images" in draw(base, tmp_path / "set", "--adapter", adapter)
    curate(tmp_path / "set", image_folder, tmp_path / "run", "--curation_epsilon", 1)
    found, before = (read_json(p / "privacy.json")["base"] for p in (tmp_path / "run", adapter))
    assert found["events"] == before["events"]
    assert found["epsilon"]["add_or_remove_one"] > before["epsilon"]["add_or_remove_one"]
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []
    ledger = ["--privacy_ledger", adapter / "private" / "ledger.jsonl", "--warm_start_steps", 1]
    for candidates in (tmp_path / "set", tmp_path / "run" / "set"):
        for start, said in ((tiny_base, "use the same base model"), (base, "saved the weights")):
            arguments = train_arguments(start, image_folder, tmp_path / "warm", "--warm_start")
            arguments[arguments.index("--target_epsilon") + 1] = 16
            assert said in train_here([*arguments, candidates, *ledger])
        shutil.rmtree(tmp_path / "warm")


def test_a_judge_from_a_private_base_must_be_covered(drawn, tiny_base, image_folder, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(drawn / "adapter" / "privacy.json", base)
    adapter = tmp_path / "adapter"
    assert "saved" in train_here(train_arguments(base, image_folder, adapter))
    assert "24 images" in draw(base, tmp_path / "set", "--adapter", adapter)
    judge = ["--reject", 0.3, "--reject_by", tmp_path / "set"]
    shown = draw(tiny_base, tmp_path / "bad", *judge)
    assert "use the same base model" in shown and not (tmp_path / "bad").exists()


def test_captions_are_not_compared_by_a_private_model(drawn, tiny_base, tmp_path):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.copy(drawn / "adapter" / "privacy.json", base)
    with pytest.raises(UsageError, match="private result itself"):
        build_nearest(LaterModelArguments(str(base)), ["a", "b"])


def test_variations_are_covered_as_the_candidates_are(public, image_folder, tmp_path, tiny_base):
    """By the model as it was then: what it is now may have cost more."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    assert "24 images" in draw(base, tmp_path / "set")
    (base / "privacy.json").write_text(json.dumps(state()))
    more = ["--target_epsilon", 3, "--rounds", 2]
    said = curate(tmp_path / "set", image_folder, tmp_path / "run", *more)
    assert "another privacy.json than it had then" in said


def test_another_seed_is_not_gone_on_with(public, image_folder, tmp_path, monkeypatch):
    """Else the votes would be counted for other variations than were voted for."""

    def stop(*_):
        raise KeyboardInterrupt

    more = ["--target_epsilon", 3, "--rounds", 2, "--seed"]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(story, "leave_set", stop)
        curate(public, image_folder, tmp_path / "run", *more, 1)
    resume = ["--resume_from_checkpoint", "latest"]
    assert "seed was 1, is 2" in curate(public, image_folder, tmp_path / "run", *more, 2, *resume)
    assert "12 images" in curate(public, image_folder, tmp_path / "run", *more, 1, *resume)


@pytest.mark.slow
def test_two_processes_count_the_votes_that_one_does(public, image_folder, tmp_path):
    arguments = ["--synthetic", public, "--train_data_dir", image_folder, *CAPTION, *EXTRACTOR]
    arguments += ["--target_delta", 1e-3, "--target_epsilon", 3, "--debug_noise_seed", 5]
    run = together(2, ROOT / "curate.py", *arguments, "--output_dir", tmp_path / "two")
    said = run.communicate()
    assert run.returncode == 0, said
    assert "12 images" in train_here([*arguments, "--output_dir", tmp_path / "one"], "curate")
    one, two = (load_file(tmp_path / n / "votes.safetensors")["votes"] for n in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("count", [200, 2])
def test_processes_share_the_candidates(monkeypatch, count):
    images = [Image.new("RGB", (8, 8), (i, 0, 0)) for i in range(count)]
    candidates = Candidates(images, [{}] * count, np.zeros(count, dtype=int))
    passed = []

    def network(pixels: torch.Tensor) -> tuple[torch.Tensor, None]:
        assert torch.is_autocast_enabled("cpu")
        passed.append(len(pixels))
        return pixels[:, 0, 0, :1].bfloat16(), None

    shares = []
    monkeypatch.setattr(election, "gather_object", lambda own: shares.extend(own) or shares)
    for place in range(3):
        state = SimpleNamespace(num_processes=3, process_index=place, is_main_process=False)
        state.device, state.autocast = "cpu", partial(torch.autocast, "cpu", torch.bfloat16)
        features = extract_candidates(candidates, Extractor("mean", "", 8, network), state)
    assert features.dtype == torch.float32 and features[:, 0].tolist() == list(range(count))
    assert sum(passed) == count and max(passed) <= 64


def test_classes_of_one_side_alone_are_told_of_before_anything_is_spent(capsys):
    rows = Dataset.from_dict({"label": [0, 1, 0]})
    rows = rows.cast_column("label", ClassLabel(names=["cat", "x_y"]))
    unnamed = Dataset.from_dict({"label": ["cat", "rare"]})  # which there are is not public

    def match(rows: Dataset, *drawn: str) -> str:
        entries = [{"text": f"a {name}", "label": name} for name in drawn]
        match_classes(entries, rows, DataArguments(label_column="label"), LaterModelArguments())
        return capsys.readouterr().err

    said = match(rows, "cat", "x y")
    assert "only the private images have the classes x_y," in said
    assert "only the images of --synthetic have the classes x y," in said
    assert match(rows, "x_y", "cat") == "" == match(unnamed, "cat", "dog")


def test_images_of_other_classes_do_not_vote_for_those_of_one(capsys):
    rows = Dataset.from_dict({"label": ["cat", "dog", "cat"]})
    data, model = DataArguments(label_column="label"), LaterModelArguments()
    entries = [{"text": "a cat", "label": "cat"}] * 4
    _, nearest, of_candidate = match_classes(entries, rows, data, model)
    assert [nearest(label) for label in rows["label"]] == [0, -1, 0]
    assert of_candidate.tolist() == [0] * 4 and "whatever" not in capsys.readouterr().err
    unnamed = [{"text": "a cat"}] * 4
    assert match_classes(unnamed, rows, data, model)[1] is None
    assert "votes for any candidate, whatever its label" in capsys.readouterr().err


def test_a_vote_states_the_precision_of_what_sees_the_images(
    public, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(story, "name_precision", lambda _: "bf16")  # a process can have but one
    curate(public, image_folder, tmp_path / "run", "--target_epsilon", 3)
    assert read_json(tmp_path / "run" / "privacy.json")["precision"] == "bf16"


@pytest.mark.parametrize("strength", [0.07, 0.3, 1.0])
def test_a_variation_takes_at_least_one_step(public, image_folder, tmp_path, strength):
    more = ["--target_epsilon", 3, "--rounds", 2, "--variation_strength", strength]
    assert "12 images" in curate(public, image_folder, tmp_path / "run", *more)
