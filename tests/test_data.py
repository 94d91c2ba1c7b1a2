"""Rows to images and captions."""

import pytest
import torch
from datasets import Dataset, Image
from PIL import Image as PILImage

from tests.conftest import build_tiny_pipeline
from utils.data import captions_of, keep_readable, load_rows, pixels_of
from utils.entropy import SecretRandomness
from utils.errors import UsageError
from utils.latents import encode_units, unit_losses
from utils.pipelines import resolve_targets


def test_image_folder_saved_dataset_and_parquet_are_read_alike(image_folder, tmp_path):
    rows = load_rows(None, None, str(image_folder), "train", tmp_path / "cache")
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    for name in ("saved", "parquet"):
        again = load_rows(str(tmp_path / name), None, None, "train", tmp_path / "cache")
        assert again["label"] == rows["label"] and len(again) == 40
    captions = captions_of(rows, None, "label", "the digit {label}")
    assert captions[0] == "the digit 0" and captions[-1] == "the digit 3"


def test_images_are_resized_and_cropped_to_rgb():
    pixels = pixels_of(PILImage.new("L", (40, 20), 7), 16)
    assert pixels.shape == (3, 16, 16) and pixels.dtype == torch.uint8 and (pixels == 7).all()


def test_an_unreadable_image_removes_its_own_row_only(tmp_path):
    good = PILImage.new("RGB", (8, 8))
    good.save(tmp_path / "good.png")
    raw = (tmp_path / "good.png").read_bytes()
    cells = [{"bytes": b, "path": None} for b in (raw, b"broken", raw, raw[:40])]
    rows = Dataset.from_dict({"image": cells}).cast_column("image", Image())
    kept, dropped = keep_readable(rows, "image")
    assert (len(kept), dropped) == (2, 2)
    with pytest.raises(UsageError, match="row 1"):
        keep_readable(rows, "image", strict=True)


def encoded(image_folder, tmp_path, flip: bool):
    pipeline = build_tiny_pipeline()
    rows = load_rows(None, None, str(image_folder), "train", tmp_path)
    captions = captions_of(rows, None, "label", "the digit {label}")
    return pipeline, encode_units(pipeline, rows, "image", captions, 16, flip, 7, False)


def test_units_are_encoded_once_with_each_caption_once(image_folder, tmp_path):
    pipeline, units = encoded(image_folder, tmp_path, flip=True)
    assert units.latents.shape == (40, 2, 4, 8, 8)
    assert units.embeddings.shape == (4, 8, 16)
    assert units.caption_rows.tolist() == [i // 10 for i in range(40)]
    assert not torch.allclose(units.latents[:, 0], units.latents[:, 1])


def test_a_units_loss_depends_on_its_own_image_only(image_folder, tmp_path):
    """Clause 3 rests on this: draws laid out otherwise would spread one image over several rows."""
    pipeline, units = encoded(image_folder, tmp_path, flip=False)
    units.latents[4] = float("nan")
    asked = (pipeline.unet, pipeline.scheduler, units, torch.tensor([7, 4, 30]))
    losses = unit_losses(*asked, 3, SecretRandomness(debug_seed=1), "cpu")
    assert losses.isfinite().tolist() == [True, False, True]


def test_targets_match_by_suffix_as_peft_does():
    unet = build_tiny_pipeline().unet
    assert all(name.endswith(".to_out.0") for name in resolve_targets(unet, ["to_out.0"]))
    for wrong, near in [("to_out", "to_out.0"), ("to_out.Linear", "to_out.0"), ("toq", "to_q")]:
        with pytest.raises(UsageError, match=near):
            resolve_targets(unet, [wrong])
