"""The tables of an image folder: what metadata.csv, .jsonl or .parquet says of its images."""

import csv
import io
import json
import os
import unicodedata
from collections.abc import Collection
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from utils.errors import UsageError
from utils.files import read_text

METADATA_NAMES = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
FILE_NAME = "file_name"  # the column that names an image


def read_metadata(tables: list[Path]) -> dict[Path, list[dict]]:
    """By the path of an image, the rows of the tables that name it: every other column, as it is
    written.

    One table may name an image several times, which makes several rows of it.

    Raises:
        UsageError: a table cannot be read, or has no `file_name`; or two tables name one image.
    """
    entries: dict[Path, list[dict]] = {}
    named_by: dict[Path, Path] = {}
    for table in tables:
        try:
            rows = _READERS[table.suffix.lower()](table)
        except UsageError:
            raise
        except (ValueError, KeyError, TypeError, OSError, csv.Error, pa.ArrowException) as error:
            raise UsageError(f"cannot read {table}: {error}") from error
        for number, row in enumerate(rows, 1):
            name = row.pop(FILE_NAME, None) if isinstance(row, dict) else None
            if not isinstance(name, str) or not name:
                known = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
                raise UsageError(
                    f"{table}: row {number} has no {FILE_NAME}, the path of an image (it has: "
                    f"{known or 'nothing else'})"
                )
            path = _find_named(table.parent, name)
            if named_by.setdefault(path, table) != table:
                raise UsageError(
                    f"{named_by[path]} and {table} name the same image, which would count twice: "
                    "keep one table"
                )
            entries.setdefault(path, []).append(row)
    return entries


def _find_named(folder: Path, name: str) -> Path:
    """The path of an image from its table's folder; some write it with backslashes, with `./`, or
    from the root of the file system, which is the same image if it lies in that folder."""
    path = folder / name
    if path.is_absolute() and path.is_relative_to(folder.absolute()):
        path = folder / path.relative_to(folder.absolute())
    if not path.is_file() and "\\" in name:
        path = folder / name.replace("\\", "/")
    return Path(os.path.normpath(path))


def _read_csv(table: Path) -> list[dict]:
    reader = csv.DictReader(io.StringIO(read_text(table)), strict=True)
    names = [name.strip() for name in reader.fieldnames or ()]
    if len(names) == 1 and (";" in names[0] or "\t" in names[0]):
        raise ValueError("its columns are separated by semicolons or tabs: save it with commas")
    if len(set(names)) < len(names):
        raise ValueError(f"two columns have one name, among {', '.join(names)}")
    reader.fieldnames = names
    rows = list(reader)
    if any(None in row or None in row.values() for row in rows):
        raise ValueError("a row has more or fewer fields than the first line")
    return rows


def _read_jsonl(table: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(read_text(table).split("\n"), 1):
        try:
            rows += [json.loads(line)] if line.strip() else []
        except ValueError as error:
            raise ValueError(f"line {number}: {str(error).partition(': line ')[0]}") from error
    return rows


def _read_parquet(table: Path) -> list[dict]:
    return pq.read_table(table).to_pylist()


_READERS = {".csv": _read_csv, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def require_images(
    tables: list[Path], named: Collection[Path], absent: list[Path], images: list[Path]
) -> None:
    """Refuse tables that name no image; that spell the names of some otherwise than their files; or
    that would throw out those of other folders than theirs: whoever comes with a table must not
    decide about others.

    Args:
        named: what the tables name. absent: those of it that are not there.

    Raises:
        UsageError: they do. It says what may be meant.
    """
    unnamed = [path for path in images if path not in named]
    if len(unnamed) == len(images):
        raise UsageError(_explain_paths(tables[0], absent or list(named), images))
    alike = {_fold(path): path for path in unnamed}
    present = set(images)
    misspelt = [path for path in named if path not in present and _fold(path) in alike]
    if misspelt:
        raise UsageError(
            f"{len(misspelt)} images have other names than in the table, such as {misspelt[0]}, "
            f"which is {alike[_fold(misspelt[0])]}: by capitals, or by how Unicode spells the same "
            "letters; mend the table"
        )
    homes = {table.parent for table in tables}
    beyond = [path for path in unnamed if homes.isdisjoint(path.parents)]
    if beyond:
        raise UsageError(
            f"{len(beyond)} images, such as {beyond[0]}, are in no table, and not in the folder of "
            f"one, such as {tables[0]}: name them in a table, or take that one away"
        )


def _fold(path: Path) -> str:
    """A path as people read it, who see no difference between two spellings of one letter."""
    return unicodedata.normalize("NFC", str(path)).casefold()


def _explain_paths(table: Path, named: list[Path], images: list[Path]) -> str:
    """Why none of the images that a table names is one of `images`, and what may be meant."""
    if not named:
        return f"{table} names no image"
    first = os.path.relpath(named[0], table.parent)
    sentence = (
        f"none of the images is in {table}: it names {first}, and paths in it count from its own "
        "folder"
    )
    wanted = named[0].name.lower()
    same = [path for path in images if wanted in (path.name.lower(), path.stem.lower())]
    if same and same[0].is_relative_to(table.parent):
        sentence += f"; did you mean {same[0].relative_to(table.parent)}?"
    return sentence
