"""Clause 11: adapter start, schedules, bounds and plan do not look at the private images."""

import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

import train_dp_lora
import utils.methods.fine_tuning
import utils.methods.private_run
from tests.conftest import train_arguments


@pytest.fixture
def other_folder(tmp_path):
    """As many images as `image_folder`, of as many classes, and all of them unlike its own."""
    for label in range(4):
        (tmp_path / "other" / str(label)).mkdir(parents=True)
        for index in range(10):
            colour = (25 * index, 60 * label, 255 - 20 * index)
            Image.new("RGB", (16, 16), colour).save(
                tmp_path / "other" / str(label) / f"{index}.png"
            )
    return tmp_path / "other"


def choices(monkeypatch, base, images, output) -> list:
    """Everything that the script had chosen when the private loop was to begin."""
    kept = []

    def spy(accelerator, state, losses, plan, randomness, micro):
        engine, optimizer = state.engine, state.optimizer
        weights = torch.cat([p.detach().flatten() for p in engine.parameters])
        rates = []
        for step in range(plan.steps):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            state.lr_scheduler.step()
            state.step += 1
            yield step + 1
        settings = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
        kept.extend([engine.names, weights.tolist(), rates, settings, plan, micro])

    monkeypatch.setattr(utils.methods.private_run, "private_steps", spy)
    arguments = train_arguments(base, images, output, "--seed", 3, "--lr_scheduler", "cosine")
    monkeypatch.setattr(sys, "argv", ["train_dp_lora.py", *map(str, arguments)])
    train_dp_lora.main()
    return kept


def test_nothing_is_chosen_by_looking(monkeypatch, tiny_base, image_folder, other_folder, tmp_path):
    first = choices(monkeypatch, tiny_base, image_folder, tmp_path / "first")
    second = choices(monkeypatch, tiny_base, other_folder, tmp_path / "second")
    assert first == second and len(first) == 6


def test_a_bound_that_follows_the_data_is_caught(
    monkeypatch, tiny_base, image_folder, other_folder, tmp_path
):
    """Clipping at the first image's brightness, say."""
    whole = utils.methods.fine_tuning.fine_tune

    def peeks(stage, state, private_set, plan, *others):
        bright = max(private_set.rows[0]["image"].convert("L").getdata())
        return whole(stage, state, private_set, replace(plan, max_grad_norm=1.0 + bright), *others)

    monkeypatch.setattr(utils.methods.fine_tuning, "fine_tune", peeks)
    with pytest.raises(AssertionError):
        test_nothing_is_chosen_by_looking(
            monkeypatch, tiny_base, image_folder, other_folder, tmp_path
        )
