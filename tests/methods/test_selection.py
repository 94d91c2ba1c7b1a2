"""DP-SAPF through the scripts: two stages, one budget, and what a selection leaves."""

import json

import numpy as np
import pytest
import torch

from tests.conftest import read_json, train_arguments, train_here
from tests.methods.test_saliency import scoring_for
from tests.worlds import LinearWorld
from utils.arguments.methods import SaliencyArguments
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.verification import find_problems, read_source
from utils.methods import choice, plots, saliency_file, selection
from utils.methods.choice import Keep
from utils.methods.saliency import (
    sum_scores,
)
from utils.methods.saliency_file import read_saliency
from utils.privacy.accounting import pld_epsilon

FEW = ["--num_validation_images", 1]
LATE = ["--train_batch_size", 8]


@pytest.fixture(scope="module")
def selected(tiny_base, image_folder, tmp_path_factory):
    """A selection at a twentieth of epsilon 8, in a ledger of its own."""
    output = tmp_path_factory.mktemp("runs") / "selection"
    arguments = train_arguments(tiny_base, image_folder, output, "--scope", "attention")
    train_here(arguments, "select_saliency")
    return output


def test_a_selection_publishes_noisy_scores_and_a_statement(selected):
    found = read_saliency(selected / "saliency.json")
    assert len(found.selected) == round(0.3 * len(found.candidates))
    assert set(found.noisy_scores) == set(found.candidates) and found.noise_std > 0
    assert min(found.noisy_scores.values()) < 0  # an un-noised squared norm never is
    assert (selected / "saliency.png").stat().st_size > 10_000
    statement = read_json(selected / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection"]
    assert statement["epsilon"]["add_or_remove_one"] <= 0.4
    assert not find_problems(read_source(str(selected), None))


def test_selection_and_training_come_to_the_target_together(
    selected, tiny_base, image_folder, tmp_path
):
    import shutil

    shutil.copytree(selected, tmp_path / "selection")
    file = tmp_path / "selection" / "saliency.json"
    output = tmp_path / "run"
    more = ["--saliency_file", file, *FEW]
    train_here(train_arguments(tiny_base, image_folder, output, *more))
    statement = read_json(output / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection", "training"]
    spent = statement["epsilon"]["add_or_remove_one"]
    assert 7.9 < spent <= 8 and spent == pld_epsilon(statement["events"], statement["delta"])
    assert "everything" not in statement["ledger"]
    assert not find_problems(read_source(str(output), None))
    from safetensors import safe_open

    with safe_open(output / "pytorch_lora_weights.safetensors", "pt") as weights:
        trained = {key.removeprefix("unet.").split(".lora")[0] for key in weights.keys()}  # noqa: SIM118
    assert trained == set(read_saliency(file).selected)

    # An edited file, another base model, and a ledger that did not pay are refused.
    edited = json.loads(file.read_text())
    edited["selected"] = edited["candidates"][:3]
    other = tmp_path / "selection" / "edited.json"
    other.write_text(json.dumps(edited))
    for path, ledger, sentence in [
        (other, [], "did not pay for"),
        (file, ["--privacy_ledger", tmp_path / "new.jsonl"], "did not pay for"),
    ]:
        more = ["--saliency_file", path, *ledger, *FEW]
        said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "no", *more))
        assert sentence in said, said
        shutil.rmtree(tmp_path / "no")
    from diffusers import StableDiffusionPipeline

    changed = StableDiffusionPipeline.from_pretrained(tiny_base, safety_checker=None)
    changed.unet.conv_in.bias.data[0] += 1e-3
    changed.save_pretrained(tmp_path / "base")
    more = ["--saliency_file", file, *FEW]
    said = train_here(train_arguments(tmp_path / "base", image_folder, tmp_path / "no", *more))
    assert "another base model" in said


@pytest.mark.parametrize(
    "script, more", [("train_dp_loda", ["--rank", 2]), ("train_dp_ldm", ["--ema_decay", 0.5])]
)
def test_the_other_methods_train_what_was_selected(
    selected, tiny_base, image_folder, tmp_path, script, more
):
    import shutil

    shutil.copytree(selected, tmp_path / "selection")
    file = tmp_path / "selection" / "saliency.json"
    more = [*more, "--saliency_file", file, *FEW]
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *more), script)
    assert "saved the weights" in said, said
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection", "training"]
    assert not find_problems(read_source(str(tmp_path / "run"), None))


def test_both_stages_with_one_command_and_an_interruption(tiny_base, image_folder, tmp_path):
    output = tmp_path / "run"
    more = ["--select_saliency", "--mechanism", "voting", "--top_count", 5, *FEW]
    arguments = train_arguments(tiny_base, image_folder, output, *more)
    assert "saved the weights" in train_here(arguments)
    statement = read_json(output / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["selection", "training"]
    assert statement["events"][0]["sensitivity"] == 5**0.5
    found = read_saliency(output / "selection" / "saliency.json")
    sigma, expected = found.event["noise_multiplier"], found.event["sampling_rate"] * 40
    assert found.noise_std == pytest.approx(sigma * 5**0.5 / expected)
    assert 7.9 < statement["epsilon"]["add_or_remove_one"] <= 8
    assert not find_problems(read_source(str(output), None))
    said = train_here([*arguments, "--resume_from_checkpoint", "latest"])
    assert "saved the weights" in said and "ranking" not in said
    assert read_json(output / "privacy.json")["epsilon"] == statement["epsilon"]
    said = train_here([*arguments, "--resume_from_checkpoint", "latest", "--top_count", 4])
    assert "other settings: top_count was 5, is 4" in said


def test_a_selection_that_was_interrupted_is_not_paid_for_twice(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    """A full disk between the release of the noisy scores and their file; then once more."""
    output = tmp_path / "run"
    arguments = train_arguments(tiny_base, image_folder, output, "--select_saliency", *FEW)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(28, "No space left on device")

        patch.setattr(plots, "plot_saliency", full)
        assert "No space left" in train_here(arguments)
        assert not (output / "selection" / "saliency.json").exists()
        assert "No space left" in train_here(arguments)
    calls = []
    whole = selection.sum_scores
    monkeypatch.setattr(selection, "sum_scores", lambda *a, **k: calls.append(1) or whole(*a, **k))
    assert "saved the weights" in train_here(arguments) and not calls
    statement = read_json(output / "privacy.json")
    assert [e["steps"] for e in statement["events"]] == [1, 3]
    assert 7.9 < statement["epsilon"]["add_or_remove_one"] <= 8
    assert not find_problems(read_source(str(output), None))


def test_nothing_is_selected_where_training_could_not_follow(tiny_base, image_folder, tmp_path):
    for more, sentence in [
        (["--total_epsilon", 7.9], "all stages would bring"),
        (["--selection_epsilon", 9], "is spent already"),
        (["--expected_batch_size", -1], "number of units"),
        (["--expected_batch_size", 0], "number of units"),
        (["--max_train_steps", 0], "at least 1"),
        (["--resume_from_checkpoint", "latest"], "holds no run to resume"),
    ]:
        output = tmp_path / sentence.split()[0]
        arguments = train_arguments(tiny_base, image_folder, output, "--select_saliency", *more)
        said = train_here(arguments)
        assert said.startswith("error: ") and sentence in said, said
        assert not (output / "private" / "ledger.jsonl").exists()


def test_a_dry_run_shows_both_plans_and_spends_nothing(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--dry_run")
    plan = json.loads(train_here(arguments, "select_saliency"))
    assert (plan["purpose"], plan["training_after_it"]["purpose"]) == ("selection", "training")
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_reproducible_noise_stamps_both_stages(tiny_base, image_folder, tmp_path):
    output = tmp_path / "run"
    more = ["--select_saliency", "--debug_noise_seed", 1, *FEW]
    assert "saved the weights" in train_here(
        train_arguments(tiny_base, image_folder, output, *more)
    )
    assert read_json(output / "privacy.json")["private"] is False
    assert read_saliency(output / "selection" / "saliency.json").private is False


def test_the_length_of_the_bar_does_not_tell_the_batch(accelerator, capsys):
    world = LinearWorld(["ordinary"] * 6)
    scoring = scoring_for(world.engine.names, "squared_norm")
    sum_scores(accelerator, world.engine, world.losses, torch.arange(6), scoring, 1)
    assert "scoring" not in capsys.readouterr().err


def test_a_selection_samples_the_batch_that_it_accounts_for(
    tiny_base, image_folder, tmp_path, monkeypatch, capsys
):
    """At rate 1/2 all 40 units are in with probability 2^-40; and no bar shows how many are."""
    sampled, whole = [], selection.sum_scores

    def spy(accelerator, engine, losses, indices, *rest, **named):
        sampled.append(indices)
        return whole(accelerator, engine, losses, indices, *rest, **named)

    monkeypatch.setattr(selection, "sum_scores", spy)
    more = ["--sampling_rate", 0.5, "--train_batch_size", 1, "--scope", "attention"]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    assert "selected" in train_here(arguments, "select_saliency")
    assert len(sampled) == 1 and len(sampled[0].unique()) == len(sampled[0]) < 40
    assert "scoring" not in capsys.readouterr().err
    event = read_json(tmp_path / "run" / "privacy.json")["events"][0]
    assert event["sampling_rate"] == 0.5 and event["steps"] == 1


def test_a_layer_used_twice_is_refused():
    layer = torch.nn.Linear(3, 3)
    engine = PerUnitGradients(layer)
    with pytest.raises(UsageError, match="used twice"):
        with engine.recording(2, norms_only=True):
            layer(layer(torch.ones(2, 3))).sum().backward()


def test_pure_noise_looks_less_stable_than_what_stands_out():
    keep, args = Keep(np.ones(50), np.ones(50)), SaliencyArguments(top_ratio="0.2")
    luck = choice.pure_noise_stability(1.0, keep, args)
    scores = np.arange(50) > 39
    again = choice.stability(20.0 * scores, 1.0, keep, args)
    assert 0.3 < luck < 0.8 and again[40:].min() > 0.999 and again[:40].max() == 0


def test_a_random_choice_reads_nothing_and_costs_nothing(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, tmp_path / "nowhere", tmp_path / "selection")
    train_here([*arguments, "--mechanism", "random", "--seed", 3], "select_saliency")
    found = read_saliency(tmp_path / "selection" / "saliency.json")
    assert found.event is None and found.noisy_scores is None and found.selected
    more = ["--saliency_file", tmp_path / "selection" / "saliency.json", *FEW]
    train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *more))
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["training"]


MISTAKES = [
    (["--sampling_rate", 0], "must be in (0, 1]"),
    (["--top_ratio", "some"], "must be auto or in (0, 1]"),
    (["--top_ratio", "auto", "--mechanism", "voting"], "reads squared norms"),
    (["--top_count", 3, "--top_mass", 0.5], "not both"),
    (["--selection_epsilon", 1, "--selection_noise_multiplier", 1], "not both"),
    (["--selection_noise_multiplier", 0.1], "must be between"),
    (["--selection_clip", "inf"], "must be positive and finite"),
    (["--select_saliency", "--saliency_file", "x"], "not both"),
    (["--saliency_file", "nowhere.json"], "cannot be read"),
]


@pytest.mark.parametrize("more, sentence", MISTAKES)
def test_mistakes_get_a_sentence(tiny_base, image_folder, tmp_path, more, sentence):
    if not any("saliency_file" in str(argument) for argument in more):
        more = [*more, "--select_saliency"]
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *more))
    assert said.startswith("error: ") and sentence in said


def test_a_damaged_file_is_a_sentence(tmp_path):
    for content, sentence in [("{", "not a selection"), ('{"schema_version": 9}', "newer version")]:
        (tmp_path / "saliency.json").write_text(content)
        with pytest.raises(UsageError, match=sentence):
            read_saliency(tmp_path / "saliency.json")
    assert saliency_file.SCHEMA_VERSION == 1
