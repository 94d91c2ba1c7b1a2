"""The encoded private set: files under private/, made once, never read whole."""

import os
import shutil
import stat
import threading
import time
from dataclasses import replace
from unittest import mock

import pytest
import torch

from tests.conftest import build_tiny_pipeline, train_arguments, train_here
from utils import memory
from utils.data import latent_files
from utils.data.images import ImageRows, find_readable_rows
from utils.data.latent_files import _add_up
from utils.data.latents import Objective, encode_units, unit_losses
from utils.data.private_set import PrivateSet
from utils.data.rows import load_split
from utils.errors import UsageError
from utils.models.families import find_family
from utils.models.families.stable_diffusion import StableDiffusion
from utils.models.placement import halve_frozen
from utils.models.text import AT_ONCE, embed_captions
from utils.privacy.randomness import SecretRandomness


def tiny_set(image_folder, folder, captions=None, first: int = 0) -> PrivateSet:
    rows = load_split(None, None, str(image_folder), "train", folder / "cache")
    rows = rows.select([max(index, first) for index in range(40)])  # as many, others first
    captions = captions or [f"the digit {i % 4}" for i in range(len(rows))]
    digests = find_readable_rows(ImageRows(rows)).digests
    return PrivateSet(rows, "image", captions, torch.arange(len(rows)), {}, digests)


def made_in(folder) -> list:
    return [path for path in folder.iterdir() if path.suffix != ".lock"]


def test_one_run_at_a_time_makes_them(pipeline, image_folder, tmp_path):
    """A second run waits for the first, and finds them made."""
    private_set, folder, calls = tiny_set(image_folder, tmp_path), tmp_path / "latents", []
    whole = latent_files.read_pixel_batches

    def slow(*arguments):
        calls.append(1)
        time.sleep(0.5)
        return whole(*arguments)

    with mock.patch.object(latent_files, "read_pixel_batches", slow):
        runs = [
            threading.Thread(target=encode_units, args=(pipeline, private_set, 16, folder))
            for _ in range(2)
        ]
        for run in runs:
            run.start()
        for run in runs:
            run.join()
    assert len(calls) == 1 and len(made_in(folder)) == 1


@pytest.fixture
def pipeline():
    made = build_tiny_pipeline()
    made.text_encoder.requires_grad_(False)
    return made


def test_latents_are_the_autoencoders_as_they_are_and_mirrored(pipeline, image_folder, tmp_path):
    private_set = tiny_set(image_folder, tmp_path)
    units, _ = encode_units(pipeline, private_set, 16, tmp_path / "latents", random_flip=True)
    pixels = next(latent_files.read_pixel_batches(private_set.images, 16, 40))
    images = latent_files.scale_to_unit_range(pixels)
    with torch.no_grad():
        for flip, view in enumerate((images, images.flip(-1))):
            expected = find_family(pipeline).encode_images(view)
            torch.testing.assert_close(units.latents[:, flip], expected, rtol=1e-4, atol=1e-5)


def test_the_files_are_readable_by_their_owner_only(pipeline, image_folder, tmp_path):
    encode_units(pipeline, tiny_set(image_folder, tmp_path), 16, tmp_path / "latents")
    made = made_in(tmp_path / "latents")[0]
    assert {path.name for path in made.iterdir()} == {
        "latents.f32",
        "text-encoder_hidden_states.f32",
        "about.json",
    }
    for folder in (tmp_path / "latents", made):
        assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_change_anywhere_in_a_weight_is_seen(dtype):
    weight = torch.zeros(100, 100).to(dtype)
    known = {_add_up(weight)}
    for place in (0, 4095, 4096, 9999):
        changed = weight.clone()
        changed.view(-1)[place] = 1
        known.add(_add_up(changed))
    assert len(known) == 4 and _add_up(weight.clone()) in known  # within a run, places are alike


CHANGES = {
    "nothing": {},
    "an image": {"first": 1},
    "a caption": {"captions": ["the digit 9"] + ["the digit 1"] * 39},
    "flips": {"random_flip": True},
    "the autoencoder": {"spoil": "vae"},
    "the text encoder": {"spoil": "text_encoder"},
}


@pytest.mark.parametrize("change", CHANGES)
def test_they_are_made_again_only_if_something_changed(
    pipeline, image_folder, tmp_path, monkeypatch, change
):
    changes = dict(CHANGES[change])
    encode_units(pipeline, tiny_set(image_folder, tmp_path), 16, tmp_path / "latents")
    flip, spoil = changes.pop("random_flip", False), changes.pop("spoil", None)
    if spoil:
        next(getattr(pipeline, spoil).parameters()).data[0] += 1
    calls = []
    whole = latent_files.read_pixel_batches
    monkeypatch.setattr(latent_files, "read_pixel_batches", lambda *a: calls.append(a) or whole(*a))
    private_set = tiny_set(image_folder, tmp_path, **changes)
    again, _ = encode_units(pipeline, private_set, 16, tmp_path / "latents", flip)
    assert len(calls) == (change != "nothing")
    fresh, _ = encode_units(pipeline, private_set, 16, tmp_path / "fresh", flip)
    assert torch.equal(again.latents, fresh.latents)
    assert all(torch.equal(values, fresh.text[name]) for name, values in again.text.items())


def test_what_a_killed_run_left_half_made_is_not_used(
    pipeline, image_folder, tmp_path, monkeypatch
):
    private_set, folder = tiny_set(image_folder, tmp_path), tmp_path / "latents"

    def killed(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StableDiffusion, "encode_images", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_units(pipeline, private_set, 16, folder)
    half = made_in(folder)
    assert len(half) == 1
    units, _ = encode_units(pipeline, private_set, 16, folder)
    assert len(made_in(folder)) == 1 and made_in(folder) != half  # and it is cleaned up
    assert units.latents.abs().sum((1, 2, 3, 4)).min() > 0


def test_many_captions_are_embedded_when_sampled_and_give_the_same_losses(
    pipeline, image_folder, tmp_path, monkeypatch
):
    private_set, folder = tiny_set(image_folder, tmp_path), tmp_path / "latents"
    few, _ = encode_units(pipeline, private_set, 16, folder)
    monkeypatch.setattr(latent_files, "TEXT_LIMIT", 3 * few.text["encoder_hidden_states"][0].nbytes)
    many, _ = encode_units(pipeline, private_set, 16, folder)
    assert few.text is not None and many.text is None
    both = [
        unit_losses(pipeline, u, torch.arange(40), Objective(2), SecretRandomness(3))
        for u in (few, many)
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize("halved", [False, True])
def test_one_more_distinct_caption_changes_nobodys_loss_under_bf16(
    pipeline, image_folder, tmp_path, monkeypatch, halved
):
    """Embedded once or when drawn, captions give the same numbers: else the unit whose caption
    crosses the threshold would move every other unit's gradient."""
    if halved:
        halve_frozen(pipeline, pipeline.unet.parameters())
    private_set, folder = tiny_set(image_folder, tmp_path), tmp_path / "latents"
    texts, size = [], embed_captions(pipeline, [""], 16)["encoder_hidden_states"].nbytes
    for limit in (4, 3):
        monkeypatch.setattr(latent_files, "TEXT_LIMIT", limit * size)
        units, _ = encode_units(pipeline, private_set, 16, folder)
        assert (units.text is None) == (limit == 3)
        with torch.autocast("cpu", torch.bfloat16):
            text = units.encode_captions(pipeline, torch.arange(40))
            texts.append(text["encoder_hidden_states"])
    assert texts[0].dtype == texts[1].dtype == torch.float32
    assert torch.equal(*texts)


@pytest.mark.parametrize("halved", [False, True])
def test_what_a_caption_becomes_does_not_depend_on_how_many_others_there_are(
    pipeline, monkeypatch, halved
):
    """All passes through the encoders have one shape: kernels are chosen by it."""
    if halved:
        halve_frozen(pipeline, pipeline.unet.parameters())
    sizes, whole = [], StableDiffusion.encode_text
    monkeypatch.setattr(
        StableDiffusion,
        "encode_text",
        lambda self, captions, side: sizes.append(len(captions)) or whole(self, captions, side),
    )
    many = [f"the digit {i} and {i}" for i in range(40)]
    alone = torch.cat([embed_captions(pipeline, [c], 16)["encoder_hidden_states"] for c in many])
    assert torch.equal(embed_captions(pipeline, many, 16)["encoder_hidden_states"], alone)
    assert len(sizes) == 43 and set(sizes) == {AT_ONCE + 1}  # one is empty in every pass


def test_one_more_image_changes_nobodys_latent(pipeline, image_folder, tmp_path, monkeypatch):
    """All passes through the autoencoder have one shape, too."""
    sizes, found, whole = [], [], StableDiffusion.encode_images
    monkeypatch.setattr(
        StableDiffusion,
        "encode_images",
        lambda self, images: sizes.append(len(images)) or whole(self, images),
    )
    monkeypatch.setattr(memory, "PIXELS_AT_ONCE", 3 * 16**2)
    for count in (40, 38):  # in threes
        private_set = tiny_set(image_folder, tmp_path)
        part = replace(
            private_set,
            rows=private_set.rows.select(range(count)),
            captions=private_set.captions[:count],
            unit_of_row=torch.arange(count),
            digests=private_set.digests[:count],
        )
        found.append(encode_units(pipeline, part, 16, tmp_path / f"{count}")[0].latents)
    assert set(sizes) == {3}
    assert len(found[0]) == 40 and torch.equal(found[0][:38], found[1])


@pytest.mark.parametrize("change", ["another image", "no image"])
def test_images_that_change_while_they_are_read_are_refused(
    pipeline, image_folder, tmp_path, change
):
    shutil.copytree(image_folder, tmp_path / "images")
    private_set = tiny_set(tmp_path / "images", tmp_path)
    victim = tmp_path / "images" / "2" / "5.png"
    victim.unlink()
    if change == "another image":
        shutil.copy(tmp_path / "images" / "0" / "0.png", victim)
    with pytest.raises(UsageError, match="changed after they were checked") as refused:
        encode_units(pipeline, private_set, 16, tmp_path / "latents")
    assert "5.png" not in str(refused.value)


def test_only_ones_own_latents_are_discarded(pipeline, image_folder, tmp_path):
    folder = tmp_path / "latents"
    _, other = encode_units(pipeline, tiny_set(image_folder, tmp_path), 16, folder)
    _, own = encode_units(pipeline, tiny_set(image_folder, tmp_path, first=1), 16, folder)
    for run in ("run", "run/selection", "run/means"):
        (tmp_path / run / "private" / "cache").mkdir(parents=True)
        (tmp_path / run / "private" / "images.png").write_bytes(b"a sheet of private images")
    latent_files.discard_copies(tmp_path / "run", own)
    assert made_in(folder) == [other]
    assert not list((tmp_path / "run").rglob("cache"))
    assert not list((tmp_path / "run").rglob("images.png"))


def test_runs_share_a_folder_and_discard_it(tiny_base, image_folder, tmp_path, monkeypatch):
    shared = ["--latents_dir", tmp_path / "shared"]
    first = train_arguments(tiny_base, image_folder, tmp_path / "first", *shared)
    assert "saved the weights" in train_here(first)
    assert not (tmp_path / "first" / "private" / "latents").exists()
    monkeypatch.setattr(latent_files, "read_pixel_batches", None)  # what would encode again
    more = [*shared, "--learning_rate", 1e-4, "--discard_latents"]
    second = train_arguments(tiny_base, image_folder, tmp_path / "second", *more)
    assert "saved the weights" in train_here(second)
    assert not made_in(tmp_path / "shared")
    left = {path.name for path in (tmp_path / "second" / "private").iterdir()}
    assert "cache" not in left and "ledger.jsonl" in left
