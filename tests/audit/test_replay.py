"""The replay audit: it passes every method, and catches every mutant."""

import json
from dataclasses import replace
from functools import partial

import pytest
import torch

from tests.conftest import build_tiny_pipeline, read_json, train_arguments, train_here
from utils.arguments.audit import MUTANTS
from utils.arguments.methods import LoraArguments
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.audit import replay as module
from utils.audit.mutants import break_loop
from utils.audit.replay import SetUp, replay
from utils.audit.watched import ReplayedRandomness
from utils.data.latents import PrivateLosses
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.lora import add_lora
from utils.privacy import dp_sgd
from utils.privacy import training as loop

PATIENTS = ["--privacy_unit_column", "label"]
SETUPS = {
    "lora": ("train_dp_lora", []),
    "attention, and the text encoder": ("train_dp_ldm", ["--train_text_encoder"]),
    "lora, automatic, flips": ("train_dp_lora", ["--clipping", "automatic", "--random_flip"]),
    "lora, per layer": ("train_dp_lora", ["--clipping", "per_layer"]),
    "lora, bf16": ("train_dp_lora", ["--mixed_precision", "bf16"]),
    "lora, patients": ("train_dp_lora", [*PATIENTS, "--expected_batch_size", 2]),
    "loda": ("train_dp_loda", ["--rank", 2]),
    "attention": ("train_dp_ldm", []),
    "all": ("train_dp_ldm", ["--trainable", "all"]),
    "all, bf16, checkpointing": (
        "train_dp_ldm",
        ["--trainable", "all", "--mixed_precision", "bf16", "--gradient_checkpointing"],
    ),
}


@pytest.mark.parametrize("name", SETUPS)
def test_it_passes_every_method(name, run_script, tiny_base, image_folder, tmp_path):
    script, more = SETUPS[name]
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    arguments += ["--replay_audit", "--dry_run"]
    if "bf16" in name:  # accelerate keeps one precision for a process
        said = run_script(f"{script}.py", *arguments).stdout
    else:
        said = train_here(arguments, script)
    found = json.loads(said)["audit"]
    assert found["kind"] == "replay" and found["passed"] and found["problems"] == []
    assert 0.5 < found["largest_move"] <= 1 + 1e-5
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


@pytest.fixture(scope="module")
def world():
    """A tiny pipeline with a LoRA."""
    pipeline = build_tiny_pipeline().to("cpu")
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    add_lora(pipeline, LoraArguments(rank=2))
    for name, parameter in pipeline.unet.named_parameters():
        if "lora_B" in name:  # else A has no gradient, and does not move without noise
            torch.nn.init.normal_(parameter, std=1e-2)
    return pipeline, PerUnitGradients(pipeline.unet, 3)


def replay_here(world, accelerator, folder, mutant=None, **changes) -> dict:
    privacy = replace(PrivacyArguments(noise_multiplicity=3, max_grad_norm=0.1), **changes)
    training = TrainingArguments(output_dir=str(folder))
    return replay(
        SetUp(accelerator, *world, 16), privacy, None, training, partial(break_loop, mutant)
    )


def test_the_loop_as_it_is_passes_and_nothing_is_left_behind(world, accelerator, tmp_path):
    before = [p.detach().clone() for p in world[1].parameters]
    pieces = dict(vars(loop))
    found = replay_here(world, accelerator, tmp_path / "run")
    assert found["passed"], found
    assert all(map(torch.equal, before, world[1].parameters)) and dict(vars(loop)) == pieces
    assert not (tmp_path / "run").exists()


SAID = {
    "no_noise": "the noise has standard deviation 0.0000 sigma C",
    "copies_clipped_one_by_one": "one unit moved the sum by ",
    "double_clip_bound": "one unit moved the sum by 2 C",
    "noise_divided_by_batch": "the noise has standard deviation 0.1",
    "shuffled_batches": "adding one unit changed who was sampled",
    "noise_reused_each_step": "the noise repeats that of the step before",
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_it_catches_every_mutant_by_its_defect(world, accelerator, tmp_path, mutant):
    found = replay_here(world, accelerator, tmp_path, mutant)
    assert not found["passed"] and SAID[mutant] in " ".join(found["problems"]), found


def norms_of_the_batch(record, plan):
    """Clips by the largest norm in the micro-batch, so that a loud unit silences the others."""
    squared = record.squared_norms()
    scale = dp_sgd.clip_scales(squared.amax(0, keepdim=True).expand_as(squared), plan)
    return record.weighted_sum(scale)


def micro_batches_by_size(units, size):
    """One unit more, and the batch is cut in another way, so that everybody's draws are others."""
    return units.split(1 + len(units) % 2)


def half_the_noise(total, plan, randomness, accelerator):
    return dp_sgd.add_noise_once(
        total, replace(plan, noise_multiplier=plan.noise_multiplier / 2), randomness, accelerator
    )


MORE_MUTANTS = {
    "split_units": micro_batches_by_size,
    "clipped_sum": norms_of_the_batch,
    "add_noise_once": half_the_noise,
}


@pytest.mark.parametrize("name", MORE_MUTANTS)
def test_it_catches_others_too(world, accelerator, tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, name, MORE_MUTANTS[name])
    found = replay_here(world, accelerator, tmp_path)
    assert not found["passed"], name
    if name == "split_units":
        assert "adding one unit changed others' gradients" in " ".join(found["problems"])


def test_a_gradient_that_is_rounded_by_its_place_is_caught(
    world, accelerator, tmp_path, monkeypatch
):
    """In both runs alike, so that only a unit in front can show it."""
    whole = PrivateLosses.__call__

    def by_place(self, indices):
        losses = whole(self, indices)
        return losses * (1 + 1e-6 * torch.arange(len(losses)))

    monkeypatch.setattr(PrivateLosses, "__call__", by_place)
    found = replay_here(world, accelerator, tmp_path)
    assert found["problems"] == ["one unit in front changed others' gradients"]
    assert not found["passed"]


def test_an_added_unit_that_is_never_sampled_proves_nothing(
    world, accelerator, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "NUM_UNITS", 12)
    whole = ReplayedRandomness.uniform

    def without_the_last(self, shape):
        values = whole(self, shape)
        return torch.cat([values[:-1], torch.ones(1)]) if shape == (13,) else values

    monkeypatch.setattr(ReplayedRandomness, "uniform", without_the_last)
    found = replay_here(world, accelerator, tmp_path)
    assert not found["passed"] and "moved no sum" in found["problems"][-1]


def test_a_failed_replay_stops_a_run_before_anything_is_read(
    tiny_base, image_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "add_noise_once", half_the_noise)
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--replay_audit")
    assert "error: the replay audit failed: step 1: the noise" in train_here(arguments)
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


def test_a_selection_has_no_steps_to_replay(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--replay_audit")
    assert "a selection takes none" in train_here(arguments, "select_saliency")
    assert not (tmp_path / "run").exists()


def test_a_statement_says_what_the_replay_proved(tiny_base, image_folder, tmp_path):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", "--replay_audit")
    train_here([*arguments, "--num_validation_images", 0])
    audit = read_json(tmp_path / "run" / "privacy.json")["audit"]
    assert audit["kind"] == "replay" and audit["passed"] is True


@pytest.mark.promise
@pytest.mark.slow
def test_the_script_prints_a_verdict_for_each(run_script, tiny_base):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--replay", "--mutants", "--json"]
    run = run_script("audit_privacy.py", *arguments)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout.strip().splitlines()[-1])
    assert report["passed"] and set(report["mutants"]) == set(MUTANTS)
    assert not any(found["passed"] for found in report["mutants"].values())
    refused = run_script("audit_privacy.py", "--replay", "--train_data_dir", "scans")
    assert refused.returncode == 2 and "--replay reads no images" in refused.stderr
