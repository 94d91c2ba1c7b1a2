"""The files of a synthetic set: one PNG an image, or parquet shards, which suit large sets."""

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pyarrow.parquet as pq
from datasets import (
    Dataset,
    Features,
    Image,
    Value,
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
)

from utils.files import (
    GRID,
    METRICS,
    PRIVATE,
    REPORT,
    SAMPLING_SETTINGS,
    STATEMENT,
    hash_file,
    replace_file,
)
from utils.listing import list_files

IMAGES_PER_SHARD, BYTES_PER_SHARD = 1_000, 2**28
ENDS = {".png": b"IEND\xaeB`\x82", ".parquet": b"PAR1"}  # of a whole file
SET = "set"  # beside released means: the images drawn to match them; in the ledger: their digest


class Piece(NamedTuple):
    """A file of a set, by its name in the folder, and the numbers of the images that it holds."""

    name: str
    images: range


def plan_image_files(num_images: int) -> list[Piece]:
    return [Piece(f"{index:06}.png", range(index, index + 1)) for index in range(num_images)]


def plan_shards(num_images: int, resolution: int) -> list[Piece]:
    """Parquet shards, named as the Hub names them, small even if PNG saves no byte."""
    size = max(1, min(IMAGES_PER_SHARD, BYTES_PER_SHARD // (3 * resolution**2)))
    count = math.ceil(num_images / size)
    return [
        Piece(
            f"data/train-{index:05}-of-{count:05}.parquet",
            range(index * size, min((index + 1) * size, num_images)),
        )
        for index in range(count)
    ]


def plan_pieces(output_format: str, num_images: int, resolution: int) -> list[Piece]:
    """The files of a set, by `--output_format`."""
    if output_format == "parquet":
        return plan_shards(num_images, resolution)
    return plan_image_files(num_images)


def write_piece(folder: Path, piece: Piece, pngs: list[bytes], entries: list[dict]) -> None:
    """Write the file of a piece, whole or not at all, from its images as PNG.

    Args:
        entries: `text`, and perhaps `label`, of every image of the set.
    """
    path = folder / piece.name
    path.parent.mkdir(parents=True, exist_ok=True)
    with replace_file(path, sync=False) as aside:  # syncing each image would take most of the time
        if path.suffix == ".png":
            aside.write_bytes(pngs[0])
        else:
            _write_shard(aside, piece, pngs, entries)


def _write_shard(path: Path, piece: Piece, pngs: list[bytes], entries: list[dict]) -> None:
    columns = [column for column in ("text", "label") if column in entries[0]]
    features = Features({"image": Image(), **{column: Value("string") for column in columns}})
    names = [f"{index:06}.png" for index in piece.images]
    images = [{"bytes": png, "path": name} for png, name in zip(pngs, names, strict=True)]
    rows = {"image": images}
    rows |= {column: [entries[i][column] for i in piece.images] for column in columns}
    with _hide_bars():  # generating the images has one already
        Dataset.from_dict(rows, features=features).to_parquet(path)


@contextmanager
def _hide_bars() -> Iterator[None]:
    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


def is_whole(path: Path) -> bool:
    """Whether a piece is there, to its end: none is synced, so a power cut may leave it empty."""
    if not path.is_file():
        return False
    end = ENDS[path.suffix]
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - len(end)))
        return file.read() == end


def read_pieces(folder: Path, pieces: list[Piece]) -> Iterator[bytes]:
    """The images of some pieces, as PNG, in order."""
    for piece in pieces:
        path = folder / piece.name
        if path.suffix == ".png":
            yield path.read_bytes()
        else:
            for batch in pq.ParquetFile(path).iter_batches(100, columns=["image"]):
                yield from (row["image"]["bytes"] for row in batch.to_pylist())


def list_set(folder: Path) -> list[Path]:
    """Every file of a set, whatever its kind, also behind links: one that was added may be read
    too. Not what is never read as part of it: what is hidden, or of a file server, its grid,
    statement and settings, and what evaluate.py left."""
    beside = {GRID, STATEMENT, SAMPLING_SETTINGS, METRICS, REPORT}
    names = {path: path.relative_to(folder) for path in list_files(folder).files}
    return [p for p, n in names.items() if str(n) not in beside and n.parts[0] != PRIVATE]


def hash_set(folder: Path) -> str:
    """The SHA-256 of every file of a set (`list_set`)."""
    digest = hashlib.sha256()
    for path in list_set(folder):
        name = path.relative_to(folder).as_posix()
        digest.update(f"{json.dumps(name)} {hash_file(path)}\n".encode())
    return digest.hexdigest()
