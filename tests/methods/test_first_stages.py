"""Means, then a selection, then training: one command, one ledger, one budget."""

import json
from dataclasses import replace

import pytest
import yaml

from tests.conftest import BUDGET, CAPTION, read_json, train_arguments, train_here
from tests.families import build_family
from utils.errors import UsageError
from utils.files import hash_file
from utils.ledger.charges import list_charged_events
from utils.ledger.ledger import Ledger, find_branch
from utils.ledger.verification import find_problems, read_source
from utils.methods.saliency_file import read_saliency
from utils.privacy.accounting import quote
from utils.sampling.shards import hash_set

SMALL = ["--generator_steps", 2, "--num_synthetic_images", 40, "--num_frequencies", 50]
PICK = ["--select_saliency"]
STAGES = ["--release_means", "--select_saliency", "--warm_start_steps", 2, "--top_ratio", "0.5"]


def read_plans(shown: str) -> list[dict]:
    """Every JSON document of what a dry run printed."""
    decoder, plans = json.JSONDecoder(), []
    while "{" in shown:
        plan, end = decoder.raw_decode(shown := shown[shown.index("{") :])
        plans.append(plan)
        shown = shown[end:]
    return plans


def charged(run):
    return list_charged_events(Ledger(run / "private" / "ledger.jsonl").records())


def test_all_three_compose_to_the_target(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL, *STAGES)
    shown = train_here(arguments)
    assert "saved the weights" in shown, shown
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert [e["purpose"] for e in statement["events"]] == ["means", "selection", "training"]
    target = float(BUDGET[BUDGET.index("--target_epsilon") + 1])
    assert target - 0.02 < statement["epsilon"]["add_or_remove_one"] <= target
    assert find_problems(read_source(str(tmp_path / "run"), None)) == []
    assert charged(tmp_path / "run") == statement["events"]
    for stage in ("means", "selection"):
        assert find_problems(read_source(str(tmp_path / "run" / stage), None)) == []


def test_only_the_means_of_a_valid_statement_lie_beside_the_weights(tmp_path):
    """A statement that someone wrote accounts for nothing, nor does one anywhere else."""
    statement = {"files": {"means.safetensors": None}, "private": True}
    for folder in ("means", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "means.safetensors").write_bytes(b"x")
        statement["files"]["means.safetensors"] = hash_file(tmp_path / folder / "means.safetensors")
        (tmp_path / folder / "privacy.json").write_text(json.dumps(statement))
    (tmp_path / "privacy.json").write_text("{}")
    extras = set(read_source(str(tmp_path), None).extras)
    assert extras == {"means/means.safetensors", "other/means.safetensors"}


@pytest.mark.parametrize(
    "added", ["001.jpg", "metadata.csv", "sub/grid.png", "000003.txt", "x.arrow", "train.parquet"]
)
def test_a_file_of_any_kind_that_joins_a_set_changes_its_digest(tmp_path, added):
    """Else private images could be slipped in, and trained on for nothing."""
    (tmp_path / "000000.png").write_bytes(b"an image")
    before = hash_set(tmp_path)
    for beside in ("grid.png", "metrics.json", "report.html", "privacy.json"):
        (tmp_path / beside).write_bytes(b"left by a script")
    assert hash_set(tmp_path) == before
    (tmp_path / added).parent.mkdir(exist_ok=True)
    (tmp_path / added).write_bytes(b"private")
    assert hash_set(tmp_path) != before


def test_a_private_result_is_not_made_free(tiny_base, image_folder, tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "privacy.json").write_text("{}")
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    shown = train_here([*arguments, "--warm_start", tmp_path / "set", "--warm_start_is_public"])
    assert "--warm_start_is_public" in shown and "called public and lose that epsilon" in shown


@pytest.mark.parametrize("stage", ["--release_means", "--select_saliency"])
@pytest.mark.parametrize(
    "mistake",
    [
        ["--target_modules", "nothing"],
        ["--rank", 0],
        ["--resolution", 17],
        ["--pretrained_model_name_or_path", "nowhere"],
    ],
    ids=str,
)
def test_what_could_not_be_trained_is_refused_before_a_stage_is_paid_for(
    tiny_base, image_folder, tmp_path, stage, mistake
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL, stage)
    assert train_here([*arguments, *mistake]).startswith("error: ")
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_a_layer_that_the_model_never_uses_is_refused_before_a_stage_is_paid_for(
    image_folder, tmp_path
):
    build_family("sd3").save_pretrained(tmp_path / "base")
    arguments = train_arguments(tmp_path / "base", image_folder, tmp_path / "run", *SMALL)
    arguments += ["--release_means", "--target_modules", "transformer_blocks.1.attn.add_q_proj"]
    assert "uses none of what is to train" in train_here(arguments)
    assert not list(tmp_path.rglob("ledger.jsonl"))


def test_a_stage_of_other_settings_is_not_taken_over(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL)
    arguments += ["--release_means", "--warm_start_steps", 2]

    def stop(*_):
        raise UsageError("after the means were released, and before training")

    with monkeypatch.context() as patched:
        patched.setattr("utils.methods.fine_tuning.run_method", stop)
        assert train_here(arguments).startswith("error: after the means")
    again = train_here([*arguments, "--length_scale", 7])
    assert "was made with other settings: length_scale was 20.0, is 7.0" in again
    assert "saved the weights" in train_here(arguments)
    events = charged(tmp_path / "run")
    assert [(e["purpose"], e["steps"]) for e in events] == [("means", 1), ("training", 3)]


@pytest.mark.parametrize(
    "more, sentence",
    [
        (["--release_epsilon", 9], "is spent already"),
        (["--total_epsilon", 7.9], "all stages would bring"),
        (["--total_epsilon", 7.9, *PICK, "--selection_epsilon", 6], "all stages would bring"),
        ([*PICK, "--release_epsilon", 7, "--selection_epsilon", 6], "spent already"),
    ],
)
def test_no_means_are_released_where_training_could_not_follow(
    tiny_base, image_folder, tmp_path, more, sentence
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL)
    for dry in (["--dry_run"], []):
        said = train_here([*arguments, "--release_means", *more, *dry])
        assert said.startswith("error: ") and sentence in said, said
    assert charged(tmp_path / "run") == []
    assert "not both" in train_here([*arguments, "--release_means", "--warm_start", "x"])


def test_three_stages_fit_into_a_cap_that_is_their_target(tiny_base, image_folder, tmp_path):
    """What was released before a selection is paid for: it is not counted twice."""
    words = [*SMALL, *STAGES, "--total_epsilon", 8]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *words)
    plans = read_plans(train_here([*arguments, "--dry_run"]))
    assert [plan["purpose"] for plan in plans] == ["means", "selection", "training"]
    assert charged(tmp_path / "run") == []
    assert "saved the weights" in train_here(arguments)
    events = charged(tmp_path / "run")
    assert [e["purpose"] for e in events] == ["means", "selection", "training"]
    assert plans[-1]["prior"] == events[:-1]
    assert plans[-1]["noise_multiplier"] == events[-1]["noise_multiplier"]


def test_a_dry_run_judges_the_training_after_means(tiny_base, image_folder, tmp_path, capsys):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--train_data_dir", image_folder]
    arguments += [*CAPTION, *BUDGET, "--output_dir", tmp_path / "run", *SMALL, "--dry_run"]
    alone = read_plans(train_here(arguments))[-1]
    assert "a warm start: --release_means" in capsys.readouterr().err
    means, after = read_plans(train_here([*arguments, "--release_means"]))
    said = capsys.readouterr().err
    assert "verdict: " in said and "a warm start" not in said.split("verdict: ")[1]
    assert "less after a warm start" in said and "of them for the warm start" in said
    assert after["epsilon"]["add_or_remove_one"] > means["epsilon"]["add_or_remove_one"]
    assert after["verdict"]["in_all"] > alone["verdict"]["in_all"]  # of what the means leave
    assert after["trainable_parameters"] == alone["trainable_parameters"]
    plans = read_plans(train_here([*arguments, *STAGES]))  # of draws that are not chosen yet
    assert [plan["purpose"] for plan in plans] == ["means", "selection", "training"]
    assert len(list((tmp_path / "run").rglob("ledger.jsonl"))) == 0


@pytest.mark.parametrize("keep", [["--top_count", 3], ["--top_ratio", "0.2"], ["--top_mass", 0.2]])
def test_a_plan_does_not_follow_from_what_was_selected(
    tiny_base, image_folder, tmp_path, capsys, keep
):
    """Composed mechanisms are worth what is stated only if their sizes were fixed beforehand."""
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--train_data_dir", image_folder]
    arguments += [*CAPTION, *BUDGET, "--output_dir", tmp_path / "run", *PICK, "--dry_run"]
    trained, plans = set(), []
    for seed in range(4):  # which decides what stands for the selection
        plan = read_plans(train_here([*arguments, *keep, "--seed", seed]))[-1]
        trained.add(plan.pop("trainable_parameters"))
        plans.append(read_plan(plan, capsys))
    assert len(trained) > 1 and plans[1:] == plans[:-1] and len(plans[0][-1]) == 4


def read_plan(plan: dict, capsys) -> tuple:
    chosen = [line for line in capsys.readouterr().err.splitlines() if "chosen: " in line]
    return plan["steps"], plan["noise_multiplier"], plan["sampling_rate"], chosen


@pytest.mark.parametrize("method", ["dp_lora", "dp_loda", "dp_ldm"])
def test_no_method_plans_by_what_a_file_selected(tiny_base, image_folder, tmp_path, capsys, method):
    run = tmp_path / "run"
    data = ["--pretrained_model_name_or_path", tiny_base, "--train_data_dir", image_folder]
    data += [*CAPTION, "--target_delta", 1e-3]
    select = ["--selection_epsilon", 1, "--top_count", 3, "--output_dir", run]
    assert "selected 3 of" in train_here([*data, *select], "select_saliency")
    saliency, plans = read_saliency(run / "saliency.json"), []
    others = sorted(set(saliency.candidates) - set(saliency.selected))
    again = ["--privacy_ledger", run / "private" / "ledger.jsonl", "--target_epsilon", 8]
    again += [
        "--saliency_file",
        tmp_path / "file.json",
        "--dry_run",
        "--output_dir",
        tmp_path / "r",
    ]
    ledger = Ledger(run / "private" / "ledger.jsonl")
    for selected in (saliency.selected, others[:3], others[-3:]):
        (tmp_path / "file.json").write_text(replace(saliency, selected=selected).to_json())
        find_branch(ledger, saliency.run).wrote(  # as if noise had come out otherwise
            1, "weights", {"saliency.json": hash_file(tmp_path / "file.json")}
        )
        (plan,) = read_plans(train_here([*data, *again, "--dry_run"], f"train_{method}"))
        plans.append((plan["trainable_parameters"], *read_plan(plan, capsys)))
    assert len({plan[0] for plan in plans}) > 1
    assert len({str(plan[1:]) for plan in plans}) == 1


def test_a_dry_run_judges_as_many_matrices_as_will_be_selected(
    tiny_base, image_folder, tmp_path, capsys
):
    more = [*PICK, "--top_count", 2]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *SMALL, *more)
    planned = read_plans(train_here([*arguments, "--dry_run"]))[-1]
    said = capsys.readouterr().err
    assert "would select 2 of " in said and "as many at random" in said
    assert "saved the weights" in train_here(arguments)
    assert len(read_saliency(tmp_path / "run" / "selection" / "saliency.json").selected) == 2
    assert planned["noise_multiplier"] == charged(tmp_path / "run")[-1]["noise_multiplier"]
    arguments[-1] = 9
    more = read_plans(train_here([*arguments, "--output_dir", tmp_path / "other", "--dry_run"]))[-1]
    assert planned["trainable_parameters"] < more["trainable_parameters"]


def test_first_stages_are_planned_without_images(tiny_base, tmp_path):
    arguments = train_arguments(tiny_base, tmp_path / "nowhere", tmp_path / "run", *SMALL, *STAGES)
    plans = read_plans(train_here([*arguments, "--dry_run", "--num_units", 500]))
    assert [plan["purpose"] for plan in plans] == ["means", "selection", "training"]
    assert [plan["num_units"] for plan in plans] == [500] * 3


def test_the_plan_of_a_config_counts_what_was_paid_before(
    tiny_base, image_folder, tmp_path, capsys
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "first", *SMALL)
    assert "grid.png" in train_here([*arguments, "--target_epsilon", 5], "release_means")
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--warm_start_steps", 2)
    arguments += ["--warm_start", tmp_path / "first" / "set"]
    (planned,) = read_plans(train_here([*arguments, "--dry_run"]))
    named = zip(arguments[::2], map(str, arguments[1::2]), strict=True)
    config = {name.removeprefix("--"): value for name, value in named} | {"warm_start_steps": 2}
    config |= {"target_epsilon": 8, "target_delta": 0.001, "expected_batch_size": 10}
    config |= {"max_train_steps": 3, "num_validation_images": 2, "noise_multiplicity": 2}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
    plan = ["plan", "--config", tmp_path / "c.yaml", "--num_units", 40, "--json"]
    shown = train_here([*plan, "--plot", tmp_path / "plan.png"], "privacy_report")
    epsilon, noise = planned["epsilon"]["add_or_remove_one"], planned["noise_multiplier"]
    assert f"noise multiplier {noise:.4f} after means is epsilon {quote(epsilon)} " in shown
    capsys.readouterr()
    for more in (["--noise_multiplier", 1], []):  # of another budget; of a base that is not here
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))
        alone = train_here([*plan, *more, "--plot", tmp_path / "plan.png"], "privacy_report")
        assert " after means" not in alone and "is epsilon" in alone
        assert "without what --warm_start cost" in capsys.readouterr().err
        config["pretrained_model_name_or_path"] = "no/such/model"


def test_a_selection_after_a_warm_start_shares_its_ledger(tiny_base, image_folder, tmp_path):
    """Or is refused before it is paid for, if both leave nothing to train with."""
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "first", *SMALL)
    assert "grid.png" in train_here([*arguments, "--target_epsilon", 5], "release_means")
    words = ["--warm_start", tmp_path / "first", *STAGES[1:], "--total_epsilon", 8]
    shown = train_here(train_arguments(tiny_base, image_folder, tmp_path / "run", *words))
    assert f"its images are in {tmp_path / 'first' / 'set'}: name that" in shown
    words[1] = tmp_path / "first" / "set"
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *words)
    said = train_here([*arguments, "--selection_epsilon", 7])
    assert "spent already" in said, said
    assert len(charged(tmp_path / "first")) == 1
    assert "saved the weights" in train_here(arguments)
    assert [e["purpose"] for e in charged(tmp_path / "first")] == ["means", "selection", "training"]
    assert read_json(tmp_path / "run" / "privacy.json")["epsilon"]["add_or_remove_one"] <= 8
