"""Clause 7: nothing that depends on the data leaves but through the ledger."""

import io
import json
import logging
import shutil

import diffusers
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import read_json, train_arguments, train_here
from tests.families import build_family
from tests.worlds import LinearWorld, build_plan, train
from utils.data.images import open_image
from utils.errors import UsageError
from utils.files import hash_file
from utils.hub.upload import list_files_to_publish
from utils.methods.classes import embed_text
from utils.models.families import find_family
from utils.models.text import embed_captions
from utils.privacy import training
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import TrainingState


def test_no_loss_norm_or_batch_size_is_shown(trained):
    shown = trained[1].lower()
    for word in ("loss", "norm ", "clipped", "batch of"):
        assert word not in shown, word


def test_nothing_private_is_published(trained, image_folder):
    """No file outside private/ names the data's folder, its files or a seed."""
    output, shown = trained
    for path in output.rglob("*"):
        if path.is_file() and "private" not in path.relative_to(output).parts[:1]:
            # The card's code starts the first sample from seed 0, which is no secret.
            content = path.read_bytes().replace(b"torch.Generator().manual_seed(0)", b"")
            assert str(image_folder).encode() not in content
            assert path.suffix not in (".json", ".md") or b"seed" not in content


def test_trackers_see_nothing_that_depends_on_the_data(trained):
    logs = trained[0] / "private" / "logs"
    tags = set()
    for folder in {path.parent for path in logs.rglob("events.out.tfevents.*")}:
        tags |= set(EventAccumulator(str(folder)).Reload().Tags()["scalars"])
    assert {"learning_rate", "epsilon"} <= tags
    assert tags <= {"learning_rate", "epsilon", "noise_multiplier"}


def told(accelerator, monkeypatch, kind: str) -> list:
    """All that six steps on 200 units of one kind tell the trackers and the progress bar."""
    heard = []
    with monkeypatch.context() as patch:
        patch.setattr(accelerator, "trackers", ["somebody"])
        patch.setattr(accelerator, "log", lambda values, step: heard.append(values))

        class Bar(training.tqdm):
            def set_postfix_str(self, text, *rest):
                heard.append(text.split(",")[0])  # without the images per second

        patch.setattr(training, "tqdm", Bar)
        world = LinearWorld([kind] * 200)
        optimizer = torch.optim.SGD(world.engine.parameters, lr=1.0)
        constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
        state = TrainingState(world.engine, optimizer, constant)
        train(accelerator, state, world.losses, build_plan(steps=6), SecretRandomness(), 64)
    return heard


def test_what_is_shown_is_the_same_whatever_the_data(accelerator, monkeypatch):
    first, second = (told(accelerator, monkeypatch, kind) for kind in ("ordinary", "huge"))
    assert first == second and len(first) == 6


def test_a_loop_that_shows_its_batch_size_is_caught(accelerator, monkeypatch):
    whole = training.clipped_gradient_sum

    def talkative(accelerator, engine, losses, indices, plan, micro):
        accelerator.log({"batch_size": len(indices)}, step=0)
        return whole(accelerator, engine, losses, indices, plan, micro)

    monkeypatch.setattr(training, "clipped_gradient_sum", talkative)
    with pytest.raises(AssertionError):
        for _ in range(5):  # two batch sizes coincide now and then
            test_what_is_shown_is_the_same_whatever_the_data(accelerator, monkeypatch)


def test_the_bar_moves_at_the_rhythm_of_the_trackers(accelerator, monkeypatch):
    """Ten times a run or so: the time of a single step would give the size of its batch away."""
    moves = []

    class Bar(training.tqdm):
        def update(self, n=1):
            moves.append(n)
            return super().update(n)

    monkeypatch.setattr(training, "tqdm", Bar)
    world = LinearWorld(["ordinary"] * 50)
    optimizer = torch.optim.SGD(world.engine.parameters, lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    state = TrainingState(world.engine, optimizer, constant)
    plan = build_plan(steps=60, num_units=50, expected_batch_size=10)
    train(accelerator, state, world.losses, plan, SecretRandomness(), 16)
    assert sum(moves) == 60 and len(moves) <= 12


def test_what_is_cut_off_a_caption_is_not_shown(caplog):
    """Pipelines warn of it, and quote it: `encode_prompt` by itself does, here too."""
    pipeline = build_family("sd3")
    caption = "the digit 3 " * 100 + "of smith"
    logger = logging.getLogger("diffusers")
    diffusers.utils.logging.set_verbosity_warning()
    logger.addHandler(caplog.handler)
    try:
        embed_captions(pipeline, [caption], 32)
        embed_text(pipeline, caption)
        assert "smith" not in caplog.text
        find_family(pipeline).encode_text([caption], 32)
        assert "smith" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)
        diffusers.utils.logging.set_verbosity_error()


def test_no_private_folder_is_published_wherever_it_lies(trained, tmp_path):
    """A first stage has one of its own, within that of the run."""
    output = shutil.copytree(trained[0], tmp_path / "run")
    sheet = output / "means" / "private" / "images.png"
    sheet.parent.mkdir(parents=True)
    sheet.write_bytes(b"private")
    statement = read_json(output / "privacy.json")
    statement["files"]["means/private/images.png"] = hash_file(sheet)
    (output / "privacy.json").write_text(json.dumps(statement))
    with pytest.raises(UsageError, match="images.png leads out of what is published"):
        list_files_to_publish(output)


def test_encoded_images_lie_in_no_folder_that_may_be_published(tiny_base, image_folder, tmp_path):
    run = tmp_path / "run"
    arguments = train_arguments(tiny_base, image_folder, run, "--latents_dir", run / "latents")
    assert "of which all but private/ may be published" in train_here(arguments)
    assert not (run / "latents").exists()


def test_a_damaged_file_prints_nothing_when_it_is_decoded(capfd):
    """A line of libtiff's for each time would tell whose batch it was in."""
    torch.manual_seed(0)
    noise = Image.fromarray((torch.rand(64, 64) < 0.5).numpy())
    noise.save(file := io.BytesIO(), "TIFF", compression="group4")
    damaged = bytearray(file.getvalue())
    for place in range(60, 70):
        damaged[place] ^= 0x5A
    assert open_image(bytes(damaged)).size == (64, 64)
    assert capfd.readouterr() == ("", "")
