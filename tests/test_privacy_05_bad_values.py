"""Clause 5: bad values cost their owner only."""

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

import utils.privacy.training
from tests.worlds import LinearWorld
from utils.data.images import ImageRows, keep_readable
from utils.errors import UsageError
from utils.privacy.dp_sgd import clip_scales


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


def test_an_unreadable_image_removes_its_own_row_only(tmp_path):
    good = PILImage.new("RGB", (8, 8))
    good.save(tmp_path / "good.png")
    raw = (tmp_path / "good.png").read_bytes()
    cells = [{"bytes": b, "path": None} for b in (raw, b"broken", raw, raw[:40])]
    rows = Dataset.from_dict({"image": cells}).cast_column("image", Image())
    kept, left_out = keep_readable(ImageRows(rows))
    assert (len(kept), left_out) == (2, {"unreadable": 2})
    with pytest.raises(UsageError, match="row 1"):
        keep_readable(ImageRows(rows), strict=True)
