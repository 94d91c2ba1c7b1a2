"""What the owner of a private set should look at before its budget is spent. It shows private
images: it goes to OUTPUT_DIR/private.
"""

import json
import sys
import textwrap
from collections.abc import Collection
from pathlib import Path

import numpy as np
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Value
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

from utils.arguments.training import DataArguments
from utils.data.images import read_pixel_batches, tile_images
from utils.data.private_set import PrivateSet
from utils.data.rows import fill_template, find_item_feature, find_used_template, read_labels
from utils.errors import on_main_process
from utils.files import (
    DATA_REPORT,
    DATA_SHEET,
    explain_disk_errors,
    make_private,
    private_folder,
    write_durably,
)

SHOWN, COLUMNS, SIDE = 48, 8, 128  # images on the sheet, of how many pixels at most
NAMED = 20  # classes
LINES, PER_LINE = 3, 20  # of a caption


def warn_of_captions(rows: Dataset, data: DataArguments) -> None:
    """Say so if captions are not made of labels, though a template is given; or of numbers: by the
    names of its classes nobody can ask for images then."""
    template = find_used_template(data)
    if template is None and data.caption_template is not None:
        used = "--caption" if data.caption is not None else "--caption_column"
        print(f"captions are those of {used}: --caption_template is not used", file=sys.stderr)
    feature = None if template is None else find_item_feature(rows, data.label_column)
    if isinstance(feature, Value) and "string" not in feature.dtype:
        print(
            f"warning: --label_column {data.label_column} holds numbers without names, so captions "
            f"read like '{fill_template(template, '0')}': if the classes have names, give a column "
            "of those",
            file=sys.stderr,
        )


def warn_of_other_classes(classes: dict[str, Collection[str]], then: str) -> None:
    """Say which classes only one of two sets has, of each set by what it is called; and `then`."""
    (one, own), (other, others) = classes.items()
    for side, lacking in ((one, set(own) - set(others)), (other, set(others) - set(own))):
        if lacking and PartialState().is_main_process:
            names = sorted(lacking)[:NAMED]
            names += [f"{len(lacking) - NAMED} more"] if len(lacking) > NAMED else []
            print(
                f"warning: only the {side} have the classes {', '.join(names)}, {then}",
                file=sys.stderr,
            )


def list_class_captions(rows: Dataset, data: DataArguments) -> list[str]:
    """The captions that `--label_column` makes of the names of its classes, as far as they are
    known; none if captions come from elsewhere, or a row may have several labels."""
    template, column = find_used_template(data), data.label_column
    if template is None or hasattr(rows.features[column], "feature"):
        return []
    feature = rows.features[column]
    names = feature.names if isinstance(feature, ClassLabel) else read_labels(rows, column)
    return [fill_template(template, name) for name in sorted(set(names))]


def show_private_set(private_set: PrivateSet, resolution: int, output_dir: str | Path) -> None:
    """Leave images.png, a sheet of images and captions as training sees them, and data.json,
    counts; and say so. Warn if a picture is in several privacy units.

    Raises:
        UsageError: the disk does not take them, or an image changed since it was checked.
    """
    on_main_process(lambda: _show(private_set, resolution, private_folder(output_dir)))


def _show(private_set: PrivateSet, resolution: int, folder: Path) -> None:
    repeated = private_set.count_repeated()
    empty = sum(not caption.strip() for caption in private_set.captions)
    report = {
        "rows": len(private_set.rows),
        "units": private_set.num_units,
        "units_without_image": private_set.without_image,
        "left_out": dict(private_set.left_out),
        "left_out_images": dict(private_set.bad),
        "pictures_in_several_units": repeated,
        "captions_empty": empty,
    }
    with explain_disk_errors(folder):
        make_private(folder)
        write_durably(folder / DATA_REPORT, json.dumps(report, indent=2) + "\n")
        draw_sheet(private_set, resolution).save(folder / DATA_SHEET)
    print(f"{folder / DATA_SHEET} shows images as training sees them: look", file=sys.stderr)
    if empty == len(private_set.rows):
        print("no image has a caption", file=sys.stderr)
    elif empty:
        print(
            f"warning: some captions are empty (how many: {folder / DATA_REPORT}), so those images "
            "teach no word: fill them in, or leave them out",
            file=sys.stderr,
        )
    if repeated:
        print(
            "warning: some pictures are in several rows that count as different privacy units (how "
            f"many: {folder / DATA_REPORT}). The guarantee is for one unit: whoever is in several "
            "is protected less. If that is one person, name a column with --privacy_unit_column "
            "(for an image folder whose metadata names pictures repeatedly, file_name)",
            file=sys.stderr,
        )


def draw_sheet(private_set: PrivateSet, resolution: int) -> Image.Image:
    """Up to 48 images, from all over the set, each above the start of its caption."""
    count = min(SHOWN, len(private_set.rows))
    numbers = np.unique(np.linspace(0, len(private_set.rows) - 1, count).round().astype(int))
    images = private_set.images.select(numbers.tolist())
    batches = read_pixel_batches(images, resolution, COLUMNS, private_set.digests[numbers])
    side, tiles = min(resolution, SIDE), []
    for pixels in (image for batch in batches for image in batch):
        image = Image.fromarray(pixels.permute(1, 2, 0).numpy())
        tiles.append(image.resize((side, side)) if side < resolution else image)
    captioned = [
        _write_below(tile, private_set.captions[int(number)])
        for tile, number in zip(tiles, numbers, strict=True)
    ]
    return tile_images(captioned, min(COLUMNS, len(captioned)))


def _write_below(image: Image.Image, caption: str) -> Image.Image:
    """On a tile wide enough to read it."""
    whole = textwrap.wrap(caption, PER_LINE) or ["(no caption)"]
    lines = whole[:LINES]
    lines[-1] += "…" if len(whole) > LINES else ""
    tile = Image.new("RGB", (SIDE + 8, image.height + 12 * LINES + 8), "white")
    tile.paste(image, ((tile.width - image.width) // 2, 4))
    font = ImageFont.truetype(f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", 10)
    ImageDraw.Draw(tile).text((4, image.height + 6), "\n".join(lines), fill="black", font=font)
    return tile
