"""What is said of a run before it spends anything: its verdict, hours, memory and disk."""

import json
import math
import shutil

import pytest
import torch

from tests.conftest import BUDGET, CAPTION, train_arguments, train_here
from utils import memory
from utils.errors import UsageError
from utils.memory import images_at_once, measure_memory
from utils.methods import forecast
from utils.models.shapes import build_from_configs, load_shape
from utils.models.text import AT_ONCE


def read_plan(said: str) -> dict:
    """The last JSON document of what a dry run printed: the plan of training."""
    lines = "\n" + said
    return json.loads(lines[lines.rindex("\n{") :])


def test_a_stranger_gets_a_plan_with_its_reasons(tiny_base, image_folder, tmp_path, capsys):
    """Base, folder, labels and a budget: nothing else."""
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--train_data_dir", image_folder]
    arguments += [*CAPTION, *BUDGET, "--output_dir", tmp_path / "run", "--dry_run"]
    plan, shown = read_plan(train_here(arguments)), capsys.readouterr().err
    assert plan["clipping"] == "automatic" and plan["expected_batch_size"] == 40
    assert len(plan["chosen"]) == 4 and all(f"chosen: {r}" in shown for r in plan["chosen"])
    assert plan["verdict"]["grade"] == "noise will win" and "verdict: noise will win" in shown
    found = plan["forecast"]
    assert found["passes"] == 40 * plan["steps"] * plan["noise_multiplicity"]
    assert found["hours"] * 3600 > plan["steps"] * found["seconds_per_step"] > 0
    assert found["cache"] > 40 * 4 * 4 * 8 * 8  # latents in fp32
    assert found["memory"] is None or found["memory"]["peak"] > found["memory"]["weights"]
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_a_plan_needs_no_images(tiny_base, tmp_path):
    arguments = train_arguments(tiny_base, tmp_path / "nowhere", tmp_path / "run")
    at = arguments.index("--expected_batch_size")
    arguments[at + 1] = 3000  # more than there are
    only = ["--dry_run", "--num_units", 500, "--secure_noise"]
    plan = read_plan(train_here([*arguments, *only]))
    assert (plan["num_units"], plan["expected_batch_size"]) == (500, 500)
    assert "--num_units is for --dry_run" in train_here([*arguments, "--num_units", 500])
    assert "at least 1" in train_here([*arguments, "--dry_run", "--num_units", 0])


def test_whether_an_image_can_be_read_changes_nothing_that_is_published(
    tiny_base, image_folder, tmp_path, capsys
):
    """Neither N, nor what is chosen by it: the batch, the steps, the draws, the rate."""
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    (images / "0" / "0.png").write_bytes(b"this is no image")
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--train_data_dir", images]
    arguments += [*CAPTION, *BUDGET, "--output_dir", tmp_path / "run", "--dry_run"]
    plan = read_plan(train_here([*arguments, "--num_validation_images", 0]))
    assert plan.pop("images_left_out") == {"unreadable": 1} and plan.pop("forecast")
    assert capsys.readouterr().err.count("verdict: noise will win") == 1
    (images / "0" / "0.png").write_bytes((images / "0" / "1.png").read_bytes())
    whole = read_plan(train_here([*arguments, "--num_validation_images", 0]))
    assert whole.pop("images_left_out") == {} and whole.pop("forecast")
    assert plan == whole and plan["num_units"] == 40


@pytest.mark.slow
def test_plan_of_a_config_times_the_run(tiny_base, tmp_path, run_script):
    config = tmp_path / "dp_loda.yaml"
    config.write_text(
        f"pretrained_model_name_or_path: {tiny_base}\ntrain_data_dir: nowhere\n"
        "label_column: label\ntarget_epsilon: 8\ntarget_delta: 1e-5\noutput_dir: runs/x\n"
        "rank: 2\nnum_validation_images: 1\n"
    )
    plan = ["plan", "--config", config, "--num_units", 20_000, "--json"]
    run = run_script("privacy_report.py", *plan, "--plot", tmp_path / "plan.png")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["run"]["num_units"] == 20_000 and found["run"]["forecast"]["hours"] > 0
    assert found["plan"]["steps"] == found["run"]["steps"]
    assert "verdict: will learn" in run.stderr and "of memory" in run.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("limit", [10**9, 10])
def test_hours_are_those_of_the_work_that_is_repeated(monkeypatch, tiny_base, tmp_path, limit):
    """All takes two seconds here; what is done once, such as to hash the encoders, is not counted
    for every image. Captions that cannot be kept are embedded by every micro-batch."""

    def take(work) -> float:
        work()
        return 2.0

    monkeypatch.setattr(forecast, "_time", take)
    monkeypatch.setattr(forecast, "TEXT_LIMIT", limit)
    arguments = train_arguments(tiny_base, tmp_path / "nowhere", tmp_path / "run")
    more = ["--dry_run", "--num_units", 500, "--num_validation_images", 0]
    plan = read_plan(train_here([*arguments, *more, "--train_batch_size", 4]))
    found, steps = plan["forecast"], plan["steps"]
    image, caption = 2 / images_at_once(16), 2 / AT_ONCE
    micro_batch = 2 + (0 if limit > 10 else 4 * caption)
    per_step = math.ceil(plan["expected_batch_size"] / 4) * micro_batch + 2
    assert found["seconds_per_step"] == pytest.approx(per_step)
    once = 500 * (image + (caption if limit > 10 else 0))
    assert found["hours"] * 3600 == pytest.approx(steps * per_step + once)
    assert found["keeps_text"] == (limit > 10)
    warm = ["--release_means", "--warm_start_steps", 3, "--warm_start_batch_size", 8]
    later = read_plan(train_here([*arguments, *more, "--train_batch_size", 4, *warm]))["forecast"]
    each = 2 / 4 / plan["noise_multiplicity"]  # seconds of an image
    assert later["warm_start_hours"] * 3600 == pytest.approx(3 * 8 * each)
    assert later["hours"] - found["hours"] == pytest.approx(later["warm_start_hours"])
    latents = 500 * 4 * 4 * 8 * 8  # fp32
    assert found["cache"] > latents if limit > 10 else found["cache"] == latents


def test_memory_is_that_of_what_runs():
    with measure_memory(torch.device("cpu")) as found:
        held = torch.ones(64, 2**20)  # 256 MiB, then let go
        del held
    assert found.peak is None or 200 * 2**20 < found.added < 400 * 2**20


def test_memory_that_cannot_be_measured_is_not_invented(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "RESET", tmp_path / "nowhere" / "clear_refs")
    with measure_memory(torch.device("cpu")) as found:
        pass
    assert found.peak is None and found.added is None


def test_a_shape_is_built_from_configurations_alone(tiny_base, tmp_path):
    for path in tiny_base.rglob("*"):
        if path.suffix in (".json", ".txt") and path.is_file():
            target = tmp_path / path.relative_to(tiny_base)
            target.parent.mkdir(exist_ok=True)
            target.write_bytes(path.read_bytes())
    assert not list(tmp_path.rglob("*.safetensors"))
    shape, whole = build_from_configs(tmp_path), load_shape(str(tiny_base))
    for part in ("unet", "vae", "text_encoder"):
        sizes = [
            {n: p.shape for n, p in getattr(pipeline, part).named_parameters()}
            for pipeline in (shape, whole)
        ]
        assert sizes[0] == sizes[1]
    assert shape.unet.dtype == torch.float32


def test_what_can_neither_be_reached_nor_guessed_is_refused():
    with pytest.raises(UsageError, match="cannot load a pipeline from 'someone/something'"):
        load_shape("someone/something")
