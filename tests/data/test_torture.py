"""Every bad image and caption that a real folder holds: training ends well, and counts right."""

import io
import json
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.conftest import ROOT, read_json, train_arguments, train_here
from utils.arguments.training import DataArguments
from utils.data.images import (
    LARGEST_IMAGE,
    ImageRows,
    crop_to_pixels,
    find_readable_rows,
    open_image,
    read_pixel_batches,
)
from utils.data.rows import load_rows, load_split, read_captions
from utils.errors import UsageError

RED, SIZE = (200, 30, 40), (24, 16)
LEVELS = (0, 65535)  # --intensity_range


def encode_png(width: int, height: int) -> bytes:
    """A PNG file that claims a size, with no pixels to speak of."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    data = chunk(b"IDAT", zlib.compress(b"\0" * 100))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + data + chunk(b"IEND", b"")


def save_readable(folder) -> dict[str, str]:
    """One image of each kind that can be read: {name: caption}."""
    plain = Image.new("RGB", SIZE, RED)
    clear = Image.new("RGBA", SIZE, (0, 0, 0, 0))
    palette = plain.quantize(4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    sixteen = Image.fromarray(np.full((16, 24), 200 * 257, np.uint16))
    images = {
        "grey.png": plain.convert("L"),
        "one_bit.png": plain.convert("1"),
        "palette.png": palette,
        "transparent.png": clear,
        "grey_alpha.png": plain.convert("LA"),
        "cmyk.jpg": plain.convert("CMYK"),
        "sixteen_bit.png": sixteen,
        "sixteen_bit.tif": sixteen,
        "float.tif": Image.fromarray(np.full((16, 24), 127 * 257, np.float32)),
        "one_pixel.png": Image.new("RGB", (1, 1), RED),
        "thin.png": Image.new("RGB", (400, 1), RED),
        "huge.png": Image.new("L", (4000, 3000), 128),
        "größe 🦴.png": plain,
    }
    for name, image in images.items():
        image.save(folder / name)
    palette.save(folder / "palette_transparent.gif", transparency=0)
    plain.save(folder / "turned.jpg", exif=exif)
    frames = [Image.new("RGB", SIZE, c) for c in (RED, "blue", "green")]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    captions = ["", "x-ray " * 300, "Röntgen 骨折 🦴", "a plain caption"]
    names = sorted(path.name for path in folder.iterdir())
    return {name: captions[i % len(captions)] for i, name in enumerate(names)}


def save_unreadable(folder) -> list[str]:
    Image.new("RGB", (64, 64), RED).save(folder / "whole.jpg")
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "whole.jpg").unlink()
    icon = io.BytesIO()
    Image.new("RGB", (16, 16), RED).save(icon, "ICO")  # decoded before its size is known
    side = int(LARGEST_IMAGE**0.5) + 2
    files = {
        "empty.png": b"",
        "truncated.jpg": whole[: len(whole) // 2],
        "bomb.png": encode_png(side, side),
        "larger_bomb.png": encode_png(60_000, 60_000),
        "no_image.png": b"this is text",
        "icon.png": icon.getvalue(),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return list(files)


@pytest.fixture(scope="module")
def torture(tmp_path_factory):
    """The folder, and the names of what can be read and what cannot."""
    folder = tmp_path_factory.mktemp("torture")
    captions = save_readable(folder)
    bad = save_unreadable(folder)
    lines = [{"file_name": n, "text": c} for n, c in captions.items()]
    lines += [{"file_name": name, "text": "unreadable"} for name in bad]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "metadata.jsonl").write_text(text)
    return folder, list(captions), bad


def test_training_on_it_ends_well_and_counts_the_units_right(torture, tiny_base, tmp_path):
    folder, good, bad = torture
    arguments = train_arguments(tiny_base, folder, tmp_path / "run", "--caption_column", "text")
    arguments += ["--intensity_range", *LEVELS]
    shown = train_here([*arguments, "--latents_dir", tmp_path / "latents"])
    assert "saved the weights" in shown
    named = len(good) + len(bad)
    assert f"{named} private units (left out: {len(bad)} unreadable)" in shown
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert statement["num_units"] == named
    event = statement["events"][0]
    assert event["sampling_rate"] == pytest.approx(10 / named, abs=1e-12)
    listed = read_json(tmp_path / "run" / "private" / "data.json")["left_out_images"]
    assert sorted(map(Path, listed["unreadable"])) == sorted(folder / name for name in bad)
    about = read_json(next((tmp_path / "latents").glob("*/about.json")))
    # Of this tokenizer's few words, all but the empty captions make more than 8 tokens.
    assert about == {"rows": len(good), "captions_cut": len(good) * 3 // 4}
    assert "cut" not in shown and "x-ray" not in shown


def test_strict_images_refuses_it_with_a_sentence(torture, tiny_base, tmp_path):
    arguments = train_arguments(tiny_base, torture[0], tmp_path / "run", "--caption_column", "text")
    shown = train_here([*arguments, "--strict_images", "--intensity_range", *LEVELS])
    assert shown.startswith("error: images that cannot be used (--strict_images): ")
    assert shown.count(" (unreadable)") == 5 and "and 1 more" in shown
    assert not (tmp_path / "run" / "privacy.json").exists()


def colour(folder, name: str) -> list[int]:
    """Of the middle, as training sees it."""
    return crop_to_pixels(open_image((folder / name).read_bytes(), LEVELS), 16)[:, 8, 8].tolist()


def test_each_kind_is_seen_as_it_looks(torture):
    folder, _, _ = torture
    grey = round(0.299 * RED[0] + 0.587 * RED[1] + 0.114 * RED[2])
    seen = {
        "transparent.png": [255] * 3,  # on white
        "sixteen_bit.png": [200] * 3,
        "sixteen_bit.tif": [200] * 3,
        "float.tif": [127] * 3,
        "grey.png": [grey] * 3,
        "grey_alpha.png": [grey] * 3,
        "palette.png": RED,
        "animated.gif": RED,  # its first frame
        "huge.png": [128] * 3,
        "thin.png": RED,
        "one_pixel.png": RED,
        "cmyk.jpg": RED,
    }
    for name, expected in seen.items():
        got = colour(folder, name)
        assert np.abs(np.subtract(got, expected)).max() <= 4, (name, got, expected)


SIDEWAYS = (0x0112, 3, 1, b"\6\0\0\0")  # the camera was turned: left is up
ODD = {  # tags of a type that they do not have, which Pillow does not write again
    "none": (),
    "artist, a float": ((0x013B, 11, 1, struct.pack("<f", 1.5)),),
    "copyright, a rational": ((0x8298, 5, 1, struct.pack("<2I", 1, 3)),),
    "unit, a signed byte": ((0x0128, 6, 1, b"\2\0\0\0"),),
    "resolution, -1 by 0": ((0x011A, 10, 1, struct.pack("<2i", -1, 0)),),
}


def write_exif(*tags: tuple[int, int, int, bytes]) -> bytes:
    """Tag, type, count and value of each, as a camera writes them."""
    tags, late = sorted(tags), b""
    head = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags))
    for tag, kind, count, value in tags:
        if len(value) > 4:
            place = 8 + 2 + 12 * len(tags) + 4 + len(late)
            value, late = struct.pack("<I", place), late + value
        head += struct.pack("<HHI", tag, kind, count) + value
    return b"Exif\0\0" + head + b"\0\0\0\0" + late


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
@pytest.mark.parametrize("odd", ODD)
def test_an_image_on_its_side_is_turned_upright(tmp_path, odd, suffix):
    lying = Image.new("RGB", (40, 20), "black")
    lying.paste("white", (0, 0, 20, 20))  # its left half
    path = tmp_path / f"lying{suffix}"
    lying.save(path, exif=write_exif(SIDEWAYS, *ODD[odd]), quality=100)
    upright = open_image(path.read_bytes())
    assert upright.size == (20, 40)
    column = np.asarray(upright.convert("L"))[:, 10]
    assert column[5] > 250 and column[35] < 5


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size(tmp_path):
    Image.new("RGB", (1600, 1200), RED).save(tmp_path / "large.jpg")
    image = open_image((tmp_path / "large.jpg").read_bytes(), about=64)
    assert 64 <= min(image.size) <= 300
    assert crop_to_pixels(image, 32).shape == (3, 32, 32)


def test_nothing_is_said_about_a_damaged_image(tmp_path):
    """Pillow would warn of what is in it, and of its size."""
    exif = Image.Exif()
    exif[0x010E] = "text" * 20
    Image.new("RGB", (64, 64), RED).save(tmp_path / "a.jpg", exif=exif)
    content = bytearray((tmp_path / "a.jpg").read_bytes())
    at = content.index(b"Exif") + 6
    content[at + 8 : at + 10] = (200).to_bytes(2, "little")  # more entries than there are
    (tmp_path / "a.jpg").write_bytes(content)
    # Pillow warns of bombs from 89 million pixels.
    (tmp_path / "b.png").write_bytes(encode_png(12_000, 12_000))
    code = "import sys; from utils.data.images import _check\n"
    code += "for name in sys.argv[1:]: _check({'bytes': None, 'path': name}, None)"
    names = [tmp_path / "a.jpg", tmp_path / "b.png"]
    command = [sys.executable, "-c", code, *map(str, names)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0 and "Warning" not in run.stderr, run.stderr


def test_captions_that_are_lists_empty_or_missing():
    from datasets import Dataset

    rows = Dataset.from_dict({"text": [["first", "second"], [], None, [""]]})
    assert list(read_captions(rows, DataArguments(caption_column="text"))) == ["first", "", "", ""]
    rows = Dataset.from_dict({"text": ["one", None, "", "naïve 猫"]})
    captions = read_captions(rows, DataArguments(caption_column="text"))
    assert list(captions) == ["one", "", "", "naïve 猫"]
    assert captions[3] == "naïve 猫" and captions[1:3] == ["", ""]
    labels = DataArguments(label_column="label", caption_template="{label} in {0} braces")
    rows = Dataset.from_dict({"label": [7]})
    assert read_captions(rows, labels)[0] == "7 in {0} braces"


def test_a_row_without_a_label_is_refused():
    from datasets import ClassLabel, Dataset, Features

    features = Features({"label": ClassLabel(names=["cat", "dog"])})
    rows = Dataset.from_dict({"label": [0, None]}, features=features)
    with pytest.raises(UsageError, match="a row has no label"):
        list(read_captions(rows, DataArguments(label_column="label", caption_template="a {label}")))


def test_every_way_to_name_a_set(image_folder, tmp_path):
    rows = load_split(None, None, str(image_folder), "train", tmp_path / "cache")
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    for folder in ("saved", "parquet"):
        for argument in ("dataset_name", "train_data_dir"):
            data = DataArguments(**{argument: str(tmp_path / folder)})
            assert load_rows(data, tmp_path / "c")["label"] == rows["label"], (folder, argument)
    Image.new("RGB", (8, 8)).save(tmp_path / "parquet" / "grid.png")  # as published sets have
    data = DataArguments(dataset_name=str(tmp_path / "parquet"))
    assert len(load_rows(data, tmp_path / "c")) == len(rows)
    captions = read_captions(
        rows, DataArguments(label_column="label", caption_template="the digit {label}")
    )
    assert captions[0] == "the digit 0" and captions[-1] == "the digit 3"
    folder = DataArguments(dataset_name=str(image_folder), max_train_samples=7)
    assert len(load_rows(folder, tmp_path / "c")) == 7


def test_the_rule_looks_at_one_image_alone(torture):
    """Pixels do not depend on what else is in the folder, nor on the batch they are read in."""

    rows = load_split(None, None, str(torture[0]), "train", torture[0].parent / "c")
    good, digests, _ = find_readable_rows(ImageRows(rows))
    kept = rows.select(good)
    whole = torch.cat(list(read_pixel_batches(ImageRows(kept), 16, 64)))
    apart = torch.cat(list(read_pixel_batches(ImageRows(kept), 16, 3)))
    assert torch.equal(whole, apart)
    fewer = kept.select(range(1, len(kept)))
    assert torch.equal(torch.cat(list(read_pixel_batches(ImageRows(fewer), 16, 64))), whole[1:])
    assert (find_readable_rows(ImageRows(fewer)).digests == digests[1:]).all()
