"""What can be seen of a run before its end, and an end before it was planned."""

import shutil
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from tests.conftest import read_json, train_arguments, train_here
from utils.hub.upload import list_files_to_publish
from utils.ledger.charges import summarise_runs
from utils.ledger.ledger import Ledger
from utils.ledger.remembered import locate_memory
from utils.ledger.statement import STOPPED
from utils.ledger.verification import find_problems, read_source
from utils.methods import private_run
from utils.methods.film import list_sheets
from utils.models.placement import halve_frozen, ready_to_draw
from utils.privacy.accounting import pld_epsilon

PROMPTS = ["--validation_prompt", "the digit 0", "the digit 1"]


def test_images_are_drawn_from_weights_that_are_paid_for(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    """When a sheet is drawn, its step is on record in the ledger; the film has them all."""
    output, released = tmp_path / "run", []
    whole = private_run.draw_sheet

    def draw(accelerator, pipeline, state, *rest):
        (run,) = summarise_runs(Ledger(output / "private" / "ledger.jsonl").records())
        released.append((state.step, run["released"]))
        whole(accelerator, pipeline, state, *rest)

    monkeypatch.setattr(private_run, "draw_sheet", draw)
    told, track = [], Accelerator.init_trackers
    monkeypatch.setattr(
        Accelerator, "init_trackers", lambda self, *a: told.append(a) or track(self, *a)
    )
    more = ["--validation_steps", 2, "--max_train_steps", 5, "--ema_decay", 0.9, *PROMPTS]
    more += ["--report_to", "tensorboard", "--num_validation_images", 4]
    assert "saved" in train_here(train_arguments(tiny_base, image_folder, output, *more))
    assert released == [(0, 0), (2, 2), (4, 4)]
    sheets = list_sheets(output / "samples")
    assert [p.name for p in sheets] == [f"step_00000{step}.png" for step in (0, 2, 4)]
    first, last = (np.asarray(Image.open(path)) for path in (sheets[0], sheets[-1]))
    assert first.shape == (64, 256, 3) and (first != last).any()
    assert Image.open(output / "samples" / "film.png").height == 3 * 64
    assert not find_problems(read_source(str(output), None))
    names = list_files_to_publish(output)
    assert "samples/film.png" in names and not any("step_" in name for name in names)
    logged = [path for path in (output / "private").rglob("*tfevents*") if path.stat().st_size]
    assert any(b"samples" in path.read_bytes() for path in logged)
    ((_, _, options),) = told
    assert options["wandb"]["dir"] == str(output / "private" / "logs")
    quiet = {"console": "off", "x_disable_stats": True, "x_disable_meta": True}
    assert quiet.items() <= options["wandb"]["settings"].items()


def test_an_interrupted_run_is_published_at_what_it_spent(stopped, tiny_base):
    output, resume = stopped
    said = train_here([*resume, "--publish_now"])
    assert "after step 2 of 6: epsilon" in said, said
    statement = read_json(output / "privacy.json")
    (event,) = statement["events"]
    assert event["steps"] == 2
    epsilon = pld_epsilon([event], statement["delta"])
    assert statement["epsilon"]["add_or_remove_one"] == pytest.approx(epsilon, abs=1e-9)
    assert epsilon < 6  # of the 8 that were planned
    assert STOPPED in statement["not_covered"]
    (run,) = summarise_runs(Ledger(output / "private" / "ledger.jsonl").records())
    assert (run["released"], run["planned"], run["state"]) == (2, 6, "finished")
    assert not find_problems(read_source(str(output), None))


def test_a_ledger_that_is_resumed_from_is_remembered(stopped, tmp_path, monkeypatch):
    """The folder may be a copy, whose ledger no run was begun in."""
    output, resume = stopped
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    for _ in range(2):
        train_here([*resume, "--publish_now"])
        ((entry,),) = read_json(locate_memory()).values()
        assert entry["ledger"] == str(output / "private" / "ledger.jsonl")


def test_what_was_published_early_can_still_be_finished(stopped):
    output, resume = stopped
    train_here([*resume, "--publish_now"])
    early = (output / "pytorch_lora_weights.safetensors").read_bytes()
    assert "saved the weights" in train_here(resume)
    assert early != (output / "pytorch_lora_weights.safetensors").read_bytes()
    statement = read_json(output / "privacy.json")
    assert [event["steps"] for event in statement["events"]] == [6]
    assert STOPPED not in statement["not_covered"]
    assert 7.9 < statement["epsilon"]["add_or_remove_one"] <= 8
    assert not find_problems(read_source(str(output), None))


def test_nothing_is_published_of_a_run_without_a_step(stopped):
    output, resume = stopped
    shutil.rmtree(output / "private" / "checkpoints" / "checkpoint-2")
    said = train_here([*resume, "--publish_now"])
    assert said.startswith("error: ") and "no private step" in said, said
    assert not (output / "privacy.json").exists()
    assert "resume" in train_here([*resume[:-2], "--publish_now"])


def test_half_the_base_trains_and_is_drawn_whole(run_script, tiny_base, image_folder, tmp_path):
    output = tmp_path / "run"
    more = ["--base_precision", "bf16", "--mixed_precision", "bf16", "--validation_steps", 3]
    arguments = train_arguments(tiny_base, image_folder, output, *more, *PROMPTS)
    run = run_script("train_dp_lora.py", *arguments)
    assert run.returncode == 0 and "saved the weights" in run.stdout, run.stderr
    assert not find_problems(read_source(str(output), None))
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "x", *more[:2]))
    assert "needs --mixed_precision bf16" in said


def test_only_what_is_public_and_frozen_is_halved():
    from tests.models.test_devices import METHODS, build_adapted

    pipeline = build_adapted(METHODS["frozen A"])
    unet = pipeline.unet
    halve_frozen(pipeline, [p for n, p in unet.named_parameters() if "lora" not in n])
    kinds = {n: p.dtype for n, p in unet.named_parameters()}
    assert {kinds[n] for n in kinds if "lora" in n or "norm" in n} == {torch.float32}
    assert kinds["conv_in.weight"] == kinds["mid_block.resnets.0.conv1.weight"] == torch.bfloat16
    before = unet.conv_in.weight.clone()
    with ready_to_draw(pipeline):
        assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert torch.equal(unet.conv_in.weight, before)


@pytest.mark.parametrize("variable", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_launches_that_share_out_the_weights_are_refused(
    tiny_base, image_folder, tmp_path, monkeypatch, variable
):
    monkeypatch.setenv(f"ACCELERATE_USE_{variable}", "true")
    said = train_here(train_arguments(tiny_base, image_folder, tmp_path / "run"))
    assert said.startswith("error: ") and "shares the weights out" in said


@pytest.mark.parametrize(
    "where, what, error",
    [
        ("accelerate.Accelerator.init_trackers", Exception("No API key configured"), None),
        ("utils.methods.planning.show_private_set", KeyboardInterrupt(), KeyboardInterrupt),
        ("utils.methods.planning.load_private_set", ValueError("of a library"), ValueError),
        ("utils.methods.private_run.prepare_losses", MemoryError(), MemoryError),
    ],
)
def test_what_ends_before_the_first_step_holds_no_budget(
    tiny_base, image_folder, tmp_path, monkeypatch, where, what, error
):
    def end(*_, **__):
        raise what

    monkeypatch.setattr(where, end)
    shared = tmp_path / "ledger.jsonl"
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--report_to")
    with nullcontext() if error is None else pytest.raises(error):
        said = train_here([*arguments, "tensorboard", "--privacy_ledger", shared])
        assert "--report_to tensorboard does not start: No API key configured" in said
    assert Ledger(shared).records()[-1]["kind"] == "give_up"
    assert not list((tmp_path / "run").glob("private/latents/*"))  # before hours of encoding


def test_a_run_does_not_go_on_with_another_image_in_place_of_one(tiny_base, image_folder, tmp_path):
    """As many as before: every number of the plan is the same."""
    images = shutil.copytree(image_folder, tmp_path / "images")
    arguments = train_arguments(tiny_base, images, tmp_path / "run", "--checkpointing_steps", 1)
    assert "saved" in train_here([*arguments, "--num_validation_images", 0])
    before = Ledger(tmp_path / "run" / "private" / "ledger.jsonl").records()
    Image.new("RGB", (16, 16), "red").save(images / "0" / "3.png")
    again = [*arguments, "--resume_from_checkpoint", "latest"]
    assert "their captions or their units are others than it was trained on" in train_here(again)
    assert Ledger(tmp_path / "run" / "private" / "ledger.jsonl").records() == before
