"""Clause 5: bad values cost their owner only."""

import errno
import time

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

import utils.privacy.training
from tests.conftest import build_tiny_pipeline
from tests.worlds import LinearWorld, build_plan
from utils.data import images
from utils.data.images import ImageRows, find_readable_rows, keep_readable, open_image
from utils.data.latents import Objective, PrivateLosses, encode_units
from utils.data.private_set import PrivateSet
from utils.data.rows import load_split
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.families import find_family
from utils.privacy.dp_sgd import clip_scales
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import clipped_gradient_sum


@pytest.mark.parametrize("wide", [False, True])
def test_a_bad_unit_leaves_the_others_unchanged(accelerator, wide):
    """The sum with a NaN, an inf and an overflowing unit is exactly the sum without them."""
    kinds = ["ordinary", "nan", "ordinary", "inf", "overflowing", "ordinary"]
    world = LinearWorld(kinds, 2, seed=1, wide=wide)
    clean = world.total(accelerator, [0, 2, 5])
    torch.testing.assert_close(world.total(accelerator, range(6)), clean, rtol=1e-5, atol=1e-7)
    assert clean.norm() > 0


def _nan_spreads(record, plan):
    return record.weighted_sum(clip_scales(record.squared_norms(), plan))


def _whole_batch_dropped(record, plan):
    squared = record.squared_norms()
    return record.weighted_sum(clip_scales(squared, plan)).nan_to_num(0.0)


@pytest.mark.parametrize("mutant", [_nan_spreads, _whole_batch_dropped])
def test_the_test_catches_bad_values_that_spread(accelerator, monkeypatch, mutant):
    monkeypatch.setattr(utils.privacy.training, "clipped_sum", mutant)
    with pytest.raises(AssertionError):
        test_a_bad_unit_leaves_the_others_unchanged(accelerator, False)


@pytest.mark.parametrize("blank", [0, 3])
def test_a_unit_without_an_image_adds_nothing(accelerator, image_folder, tmp_path, blank):
    """It takes its place in a batch all the same: as the first, or beside others."""
    pipeline = build_tiny_pipeline()
    pipeline.text_encoder.requires_grad_(False)
    rows = load_split(None, None, str(image_folder), "train", tmp_path)
    digests = find_readable_rows(ImageRows(rows)).digests
    units = (torch.arange(40) + 1) % 40  # so that the order of rows is not that of units
    private_set = PrivateSet(rows, "image", ["the digit 1"] * 40, units, {}, digests, None, 2)
    encoded, _ = encode_units(pipeline, private_set, 16, tmp_path / "latents")
    losses = PrivateLosses(pipeline, encoded, Objective(2), SecretRandomness())
    engine = PerUnitGradients(find_family(pipeline).denoiser.requires_grad_(True), 2)
    plan = build_plan(num_units=42, noise_multiplicity=2, max_grad_norm=1e-3)

    def total(*units: int) -> torch.Tensor:
        return clipped_gradient_sum(accelerator, engine, losses, torch.tensor(units), plan, 4)

    assert not total(40).any() and not total(41, 40).any()
    with_others = [7, 8, 9]
    with_others.insert(blank, 41)
    with engine.recording(4) as record:
        losses(torch.tensor(with_others)).sum().backward()
    norms = record.squared_norms().sum(1).tolist()
    assert norms.pop(blank) < 1e-30 < min(norms)  # they are kept from being below the true ones


def image_rows(cells: list[dict]) -> ImageRows:
    return ImageRows(Dataset.from_dict({"image": cells}).cast_column("image", Image()))


def test_an_unreadable_image_removes_its_own_row_only(tmp_path):
    good = PILImage.new("RGB", (8, 8))
    good.save(tmp_path / "good.png")
    raw = (tmp_path / "good.png").read_bytes()
    cells = [{"bytes": b, "path": None} for b in (raw, b"broken", raw, raw[:40])]
    rows = image_rows(cells)
    kept, left_out = keep_readable(rows)
    assert (len(kept), left_out) == (2, {"unreadable": 2})
    with pytest.raises(UsageError, match="row 1"):
        keep_readable(rows, strict=True)


@pytest.mark.parametrize("error", [OSError("insufficient memory"), MemoryError()])
def test_what_fails_beside_others_alone_is_not_left_out(tmp_path, monkeypatch, error):
    """Several threads decode: one image must not cost another its place, as by its memory."""
    under_way, together = [], []

    def open_alone(*arguments):
        under_way.append(1)
        try:
            time.sleep(0.01)
            if len(under_way) > 1:
                together.append(1)
                raise error
            return open_image(*arguments)
        finally:
            under_way.pop()

    PILImage.new("RGB", (8, 8)).save(tmp_path / "good.png")
    cell = {"bytes": (tmp_path / "good.png").read_bytes(), "path": None}
    monkeypatch.setattr(images.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(images, "open_image", open_alone)
    kept, left_out = keep_readable(image_rows([cell] * 16 + [cell | {"bytes": b"broken"}]))
    assert (len(kept), left_out) == (16, {"unreadable": 1}) and together

    together.clear()
    (batch,) = images.read_pixel_batches(kept, 8, 16)  # as training does, and each step again
    assert len(batch) == 16 and together

    with pytest.raises(MemoryError):  # alone, too
        monkeypatch.setattr(images, "open_image", run_out)
        keep_readable(image_rows([cell]))
    with pytest.raises(MemoryError):
        list(images.read_pixel_batches(kept, 8, 16))


def run_out(*arguments):
    raise MemoryError


def test_a_disk_that_fails_is_no_damaged_image(tmp_path, monkeypatch):
    bad = [tmp_path, "", "a\0.png", "x" * 5000, tmp_path / "gone.png", "/etc/passwd/a.png"]
    PILImage.new("RGB", (8, 8)).save(tmp_path / "good.png")
    rows = [{"bytes": None, "path": str(path)} for path in (tmp_path / "good.png", *bad)]
    kept, left_out = keep_readable(image_rows(rows))
    assert (len(kept), left_out) == (1, {"unreadable": len(bad)})  # each by its own fault

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(images, "_read_bytes", fail)
    with pytest.raises(UsageError, match="good.png cannot be read: Input/output error"):
        keep_readable(image_rows(rows[:1]))
