"""Greys of more than 8 bits: seen through a public window, or left out and counted; never black."""

import io
import json

import numpy as np
import pytest
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.conftest import read_json, train_arguments, train_here
from utils.data.grey_levels import MORE_BITS, MoreBitsError
from utils.data.images import (
    UNREADABLE,
    ImageRows,
    find_readable_rows,
    keep_readable,
    open_image,
)
from utils.errors import UsageError


def encode(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


LEVELS = np.linspace(0, 4095, 256).round().reshape(16, 16)


def encode_j2k(bits: int, lowest: int = 0) -> bytes:
    """LEVELS + `lowest` in a JPEG 2000 of so many bits, signed if any is below 0. Its encoder knows
    16 bits alone, whose middle it takes for zero."""
    middle = 0 if lowest else 2 ** (bits - 1)
    content = bytearray(
        encode(Image.fromarray((LEVELS + lowest - middle + 2**15).astype(np.uint16)), "JPEG2000")
    )
    depth = content.index(b"\xff\x4f\xff\x51") + 42
    assert content[depth] == 15
    content[depth] = bits - 1 + (128 if lowest else 0)
    return bytes(content)


def encode_pgm(maximum: int) -> bytes:
    header = f"P5 16 16 {maximum}\n".encode()
    return header + LEVELS.clip(0, maximum).astype(">u2").tobytes()


def encode_negative(levels: np.ndarray) -> bytes:
    """A TIFF whose zero is white."""
    file = io.BytesIO()
    Image.fromarray(levels).save(file, "TIFF", tiffinfo={262: 0})
    return file.getvalue()


WIDE = {  # a 12-bit X-ray in each container that Pillow reads
    "png": encode(Image.fromarray(LEVELS.astype(np.uint16)), "PNG"),
    "tiff": encode(Image.fromarray(LEVELS.astype(np.uint16)), "TIFF"),
    "tiff of int32": encode(Image.fromarray(LEVELS.astype(np.int32)), "TIFF"),
    "tiff of floats": encode(Image.fromarray(LEVELS.astype(np.float32)), "TIFF"),
    "jpeg 2000": encode(Image.fromarray(LEVELS.astype(np.uint16)), "JPEG2000"),
    "jpeg 2000 of 12 bits": encode_j2k(12),
    "jpeg 2000 of 14 bits": encode_j2k(14),
    "pgm": encode(Image.fromarray(LEVELS.astype(np.uint16)), "PPM"),
    "pgm of 12 bits": encode_pgm(4095),
    "pgm in decimals": b"P2 16 16 4095\n" + " ".join(f"{v:.0f}" for v in LEVELS.flat).encode(),
}
GREY = encode(Image.fromarray(np.full((16, 16), 77, np.uint8)), "PNG")


def build_rows(*files: bytes | None) -> ImageRows:
    images = [None if file is None else {"bytes": file, "path": None} for file in files]
    return ImageRows(Dataset.from_dict({"image": images}, Features({"image": ImageFeature()})))


@pytest.mark.parametrize("kind", WIDE)
def test_the_window_is_spread_over_all_greys(kind):
    seen = np.asarray(open_image(WIDE[kind], (0, 4095)))
    assert seen.dtype == np.uint8
    assert np.abs(seen.astype(float) - LEVELS / 4095 * 255).max() <= 1
    narrow = np.asarray(open_image(WIDE[kind], (1000, 2000))).astype(float)
    expected = ((LEVELS - 1000) / 1000).clip(0, 1) * 255
    assert np.abs(narrow - expected).max() <= 1


@pytest.mark.parametrize("kind", WIDE)
def test_without_a_window_it_is_no_image(kind):
    with pytest.raises(MoreBitsError):
        open_image(WIDE[kind])


def test_hounsfield_units_are_below_zero_and_nan_is_black():
    levels = np.array([[-1000.0, -300.0, 400.0, np.nan]], np.float32)
    seen = np.asarray(open_image(encode(Image.fromarray(levels), "TIFF"), (-1000, 400)))
    assert seen.tolist() == [[0, 128, 255, 0]]


def test_a_jpeg_2000_may_have_levels_below_zero():
    seen = np.asarray(open_image(encode_j2k(13, -1000), (-1000, 3095))).astype(float)
    assert np.abs(seen - LEVELS / 4095 * 255).max() <= 1


@pytest.mark.parametrize("kind", [np.uint16, np.float32])
def test_a_tiff_whose_zero_is_white_is_no_negative(kind):
    levels = np.array([[0, 51, 255]], kind)
    seen = np.asarray(open_image(encode_negative(levels), (0, 255)))
    assert seen.tolist() == [[255, 204, 0]]


def test_a_window_changes_no_file_of_eight_bits():
    colour = Image.new("RGB", (4, 4), (10, 20, 30))
    for image in (colour, colour.convert("L"), colour.convert("LA"), colour.quantize(2)):
        content = encode(image, "PNG")
        assert open_image(content, (0, 4095)).tobytes() == open_image(content).tobytes()


def test_a_grey_of_sixteen_bits_with_transparency_is_left_out():
    """Pillow gives its upper eight bits alone: a 12-bit scan would be black."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        size, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return size + kind + data + check

    lines = b"".join(b"\0" + struct.pack(">HH", 4095, 65535) * 4 for _ in range(4))
    header = struct.pack(">IIBBBBB", 4, 4, 16, 4, 0, 0, 0)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    for window in (None, (0, 4095)):
        with pytest.raises(MoreBitsError):
            open_image(b"\x89PNG\r\n\x1a\n" + parts, window)


def test_what_is_left_out_is_counted_by_reason():
    rows = build_rows(GREY, WIDE["png"], None, b"text", WIDE["tiff"], GREY)
    found = find_readable_rows(rows)
    assert found.good == [0, 5]
    assert found.left_out == {MORE_BITS: 2, UNREADABLE: 2}
    kept, left_out = keep_readable(ImageRows(rows.rows, "image", (0, 4095)))
    assert len(kept) == 4 and left_out == {UNREADABLE: 2}
    with pytest.raises(UsageError, match="row 1 .of more than 8 bits"):
        find_readable_rows(rows, strict=True)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([GREY, None, b"text", *WIDE.values()]), min_size=1, max_size=8),
    st.integers(0, 8),
    st.sampled_from([GREY, None, b"text", *WIDE.values()]),
)
def test_one_more_image_of_any_kind_changes_no_other_row(files, place, more):
    """The rule looks at one file alone."""
    files = [GREY, *files]
    place = min(place, len(files))
    before = find_readable_rows(build_rows(*files))
    after = find_readable_rows(build_rows(*files[:place], more, *files[place:]))
    moved = [index + (index >= place) for index in before.good]
    assert [index for index in after.good if index != place] == moved
    assert len(after.good) - len(before.good) in (0, 1)


def test_a_set_of_nothing_else_is_refused_naming_the_option():
    with pytest.raises(UsageError) as refused:
        find_readable_rows(build_rows(WIDE["png"], WIDE["tiff"], b"text"))
    assert "2 are of more than 8 bits; give --intensity_range LOW HIGH" in str(refused.value)


@pytest.mark.parametrize(
    "levels", [["0"], ["5", "5"], ["9", "1"], ["0", "inf"], ["nan", "1"], ["1", "2", "3"]]
)
def test_a_range_is_two_numbers(tiny_base, image_folder, tmp_path, levels):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run")
    shown = train_here([*arguments, "--intensity_range", *levels])
    assert shown.startswith("error: --intensity_range") and "LOW below HIGH" in shown


def test_training_sees_a_scan_and_its_owner_sees_what_training_sees(tiny_base, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(20):
        levels = np.full((16, 16), 200 * index, np.uint16)
        Image.fromarray(levels).save(folder / f"{index:02}.png")
    Image.new("L", (16, 16), 255).save(folder / "white.png")
    arguments = train_arguments(tiny_base, folder, tmp_path / "run", "--caption", "a scan")
    shown = train_here([*arguments[:4], *arguments[8:], "--intensity_range", 0, 3800])
    assert "21 private units (no image left out)" in shown
    private = tmp_path / "run" / "private"
    sheet = np.asarray(Image.open(private / "images.png").convert("L"))
    tile = sheet.shape[1] // 8
    centres = [int(sheet[12, tile * column + tile // 2]) for column in range(8)]
    assert centres == [round(255 * 200 * index / 3800) for index in range(8)]
    assert private.stat().st_mode & 0o77 == 0
    report = read_json(private / "data.json")
    assert report == {
        "rows": 21,
        "units": 21,
        "units_without_image": 0,
        "left_out": {},
        "left_out_images": {},
        "pictures_in_several_units": 0,
        "captions_empty": 0,
    }


def test_bytes_without_the_type_of_an_image_are_read():
    """What pyarrow writes: bytes alone, or a struct of bytes and path."""
    plain = Dataset.from_dict({"image": [GREY, b"text"]}, Features({"image": Value("binary")}))
    struct = Dataset.from_dict(
        {"image": [{"bytes": GREY, "path": "a.png"}, {"bytes": None, "path": "gone.png"}]},
        Features({"image": {"bytes": Value("binary"), "path": Value("string")}}),
    )
    large = plain.cast(Features({"image": Value("large_binary")}))
    for rows in (plain, struct, large):
        found = find_readable_rows(ImageRows(rows))
        assert found.good == [0] and found.left_out == {UNREADABLE: 1}


@pytest.mark.parametrize(
    "column, said",
    [
        (["a.png"], "texts; for paths or addresses, make an image folder"),
        ([3], "int64"),
        ([[GREY]], "List"),
        ([{"x": 1}], "dict"),
        ([{"bytes": [137, 80]}], "dict"),  # as lists of numbers
    ],
)
def test_what_is_no_image_column_is_said(column, said):
    with pytest.raises(UsageError, match=f"does not hold images, but {said}"):
        find_readable_rows(ImageRows(Dataset.from_dict({"image": column})))


def test_the_same_pictures_through_another_window_are_encoded_anew(tiny_base, tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    for index in range(20):
        Image.fromarray(np.full((16, 16), 200 * index, np.uint16)).save(folder / f"{index}.png")
    latents = tmp_path / "latents"
    for run, high in (("a", 3800), ("b", 3800), ("c", 2000)):
        arguments = train_arguments(tiny_base, folder, tmp_path / run, "--caption", "")
        more = ["--intensity_range", 0, high, "--latents_dir", latents]
        assert "saved the weights" in train_here([*arguments, *more])
    assert len(list(latents.glob("*/about.json"))) == 2
    assert json.loads((tmp_path / "a" / "private" / "data.json").read_text())["rows"] == 20
