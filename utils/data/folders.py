"""An image folder as rows: its files, what metadata says of them, and the folders they lie in.

Text in a table stays the text that it is. What is not used is counted, and said.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Image

from utils.data.metadata import FILE_NAME, METADATA_NAMES, read_metadata, require_images
from utils.errors import UsageError
from utils.files import read_text
from utils.listing import (
    RESULTS,
    find_image_extensions,
    find_reach,
    find_split,
    list_files,
)

ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
MEDICAL = (".dcm", ".dicom", ".nii")  # docs/data.md says how to convert them
DICOM = b"DICM"  # of scans without a suffix, after 128 bytes
TABLES = (".csv", ".tsv", ".json", ".jsonl", ".xlsx", ".ods")
CAMERA = (".heic", ".heif", ".dng", ".cr2", ".cr3", ".nef", ".arw")
PARQUET = ".parquet"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.parquet$")
BAD_COLUMN = (pa.ArrowException, TypeError, ValueError, OverflowError)
IMAGE, LABEL, TEXT = "image", "label", "text"  # what the layout of a folder gives


def refuse_among_images(
    output_dir: str | Path, *sets: str | None, option: str = "--output_dir"
) -> None:
    """Refuse a folder for results in which the next run would find them among its images.

    Args:
        sets: folders of images; Hub ids and None lie nowhere.
        option: names the folder in an error.

    Raises:
        UsageError: it is in one of them, also behind a link, or is one.
    """
    output = Path(output_dir).resolve()
    for images in sets:
        if images is None or not Path(images).is_dir():
            continue
        if not find_reach(str(images)).places.isdisjoint((output, *output.parents)):
            raise UsageError(
                f"{option} {output_dir} lies in {images}, whose images are read: pictures of "
                "this run would be among them next time; name a folder elsewhere"
            )


def is_image_folder(folder: Path) -> bool:
    """Whether it holds images, or archives or scans that must become some first, rather than
    parquet files beside which a picture may lie.

    Raises:
        UsageError: it holds more images than parquet files, and one that is no shard.
    """
    files = [path for path in list_files(folder).files if path.name.lower() not in METADATA_NAMES]
    suffixes = Counter(path.suffix.lower() for path in files)
    images = sum(suffixes[suffix] for suffix in find_image_extensions())
    if not suffixes[PARQUET]:
        others = any(suffixes[suffix] for suffix in ARCHIVES + CAMERA)
        return images > 0 or others or any(map(_is_scan, files))
    tables = [path for path in files if path.suffix.lower() == PARQUET]
    strays = [path for path in tables if not SHARD.search(path.name.lower())]
    if images > len(tables) and strays:
        raise UsageError(
            f"{folder} holds {images} images, but also {strays[0].relative_to(folder)}: which of "
            "them are the set? Move the others out of it"
        )
    return False


def load_image_folder(folder: Path, split: str | None) -> Dataset:
    """One row an image, in the order of the paths: `image`; `label`, the folder that it lies in
    (`_name_classes`); and the columns of metadata.csv, .jsonl or .parquet, or else the `text` of
    the `.txt` files beside them. With metadata, the images that it names are the set.

    Raises:
        UsageError: there is no such split or no image; metadata cannot be read, names no image, or
            is of some folders only; or some images have a `.txt` beside them, and others have not.
    """
    folder = folder.resolve() if ".." in folder.parts else folder  # metadata has paths without
    root = find_split(folder, split)
    extensions = find_image_extensions()
    files, unused, _ = list_files(root)
    images = [path for path in files if path.suffix.lower() in extensions]
    unused |= {path: "not an image" for path in files if path.suffix.lower() not in extensions}
    if not images:
        raise UsageError(f"{root} holds no images{_hint_at(unused)}")
    others = [path for path in files if path.suffix.lower() in TABLES and path.name not in RESULTS]
    unused |= dict.fromkeys(others, "a table is read if it is metadata.csv or .jsonl")
    unused |= {path: "a scan, convert it" for path in files if _is_scan(path)}
    unused |= {path: "convert it to JPEG" for path in files if path.suffix.lower() in CAMERA}
    tables = [path for path in unused if path.name.lower() in METADATA_NAMES]
    if root != folder:
        tables += [p for p in sorted(folder.iterdir()) if p.name.lower() in METADATA_NAMES]
    if tables:
        images, columns = _follow_metadata(tables, root, images, unused)
    else:
        columns = _read_texts_beside(root, images, unused)
    _say_what_is_unused(root, len(images), unused)
    return _make_rows(images, root, columns)


def _is_scan(path: Path) -> bool:
    """By its suffix; or by how it begins, if it has none, or a number's, as archives name them."""
    suffix = path.suffix.lower()
    if suffix[1:2].isalpha():
        return suffix in MEDICAL
    with open(path, "rb") as file:
        return file.read(132)[128:] == DICOM


def _hint_at(files: Iterable[Path]) -> str:
    """What to do with what a folder without images holds."""
    archives = [path.name for path in files if path.suffix.lower() in ARCHIVES]
    scans = [path.name for path in files if _is_scan(path)]
    photographs = [path.name for path in files if path.suffix.lower() in CAMERA]
    if photographs:
        return (
            f", but {len(photographs)} photographs such as {photographs[0]}: convert them to JPEG"
        )
    if archives:
        return f": unpack {', '.join(archives[:3])} first"
    if scans:
        return (
            f", but {len(scans)} scans such as {scans[0]}: convert each to a TIFF of floats, which "
            "keeps all levels (docs/data.md has the lines for DICOM), and give "
            "--intensity_range"
        )
    return ""


def _follow_metadata(
    tables: list[Path], root: Path, images: list[Path], unused: dict[Path, str]
) -> tuple[list[Path], dict[str, list]]:
    """The images that the tables name, and their columns; brings `unused` up to date."""
    entries = read_metadata(tables)
    present, homes = set(images), [table.parent for table in tables]
    others = [path for path in entries if path not in present]
    absent = [path for path in others if path.is_relative_to(root) and not path.is_file()]
    named = [path for path in images for _ in entries.get(path, ())]  # a row each time it is named
    require_images(tables, entries, absent, images)
    unused |= {path: "not in the metadata" for path in images if path not in entries}
    for path in others:
        if path.is_relative_to(root) or not any(map(path.is_relative_to, homes)):
            unused[path] = "in the metadata, but hidden, elsewhere, or no image"
    unused |= {path: "in the metadata, but not there" for path in absent}
    for table in tables:
        unused.pop(table, None)
    columns = _collect_columns([row for path in images for row in entries.get(path, ())])
    return named, {FILE_NAME: [path.relative_to(root).as_posix() for path in named], **columns}


def _read_texts_beside(
    root: Path, images: list[Path], unused: dict[Path, str]
) -> dict[str, list[str]]:
    """The column of captions from `.txt` files, if there are any; brings `unused` up to date."""
    texts = [path.with_suffix(".txt") for path in images]
    lacking = sum(text not in unused for text in texts)
    if lacking == len(images):
        return {}
    if lacking:
        raise UsageError(
            f"{lacking} of the {len(images)} images in {root} have no .txt file with a caption "
            "beside them: add what is missing, or remove the .txt files"
        )
    for text in set(texts):
        del unused[text]
    return {TEXT: [read_text(text).strip() for text in texts]}


def _collect_columns(entries: list[dict]) -> dict[str, list]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    if {IMAGE, FILE_NAME} & set(names):
        raise UsageError(f"the metadata has a column '{IMAGE}', which is that of the images")
    return {name: [entry.get(name) for entry in entries] for name in names}


def _say_what_is_unused(root: Path, used: int, unused: dict[Path, str]) -> None:
    if not unused or not PartialState().is_main_process:
        return
    reasons = Counter((why, _name_kind(path)) for path, why in unused.items())
    parts = [f"{count} {suffix} ({why})" for (why, suffix), count in sorted(reasons.items())]
    print(f"{root}: {used} images used; not used: {', '.join(parts)}", file=sys.stderr)


def _find_mixed(columns: dict[str, list]) -> str:
    """The columns that cannot be stored by themselves."""
    mixed = []
    for name, values in columns.items():
        try:
            Dataset.from_dict({name: values})
        except BAD_COLUMN:
            mixed.append(name)
    return ", ".join(mixed)


def _name_kind(path: Path) -> str:
    """Its suffix, if that is one: a name may be a person's."""
    suffix = path.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,4}", suffix) else "other"


def _make_rows(images: list[Path], root: Path, columns: dict[str, list]) -> Dataset:
    try:
        rows = Dataset.from_dict({IMAGE: [str(path) for path in images], **columns})
    except BAD_COLUMN as error:
        raise UsageError(
            f"the metadata of {root} mixes kinds in one column ({_find_mixed(columns)}): texts and "
            "numbers, or lists and others; write all its values alike"
        ) from error
    rows = rows.cast_column(IMAGE, Image())
    classes = _name_classes(images, root) if LABEL not in map(str.lower, columns) else []
    if any(classes):
        names = ClassLabel(names=sorted(set(classes) - {None}))
        numbers = [None if name is None else names.str2int(name) for name in classes]
        rows = rows.add_column(LABEL, numbers, feature=names)
    return rows


def _name_classes(images: list[Path], root: Path) -> list[str | None]:
    """The folder that each image lies in, below the one that holds them all; none if some lie
    deeper, since nobody could tell which folders are the classes (and some are patients)."""
    parents = [path.parent for path in images]
    shared = Path(os.path.commonpath(parents))
    if all(parent == shared for parent in parents):
        return [] if shared == root else [shared.name] * len(images)
    deep = [path for path in images if len(path.relative_to(shared).parts) > 2]
    if deep and PartialState().is_main_process:
        print(
            f"{root}: no column {LABEL} is made of the folders, since some lie within others: name "
            "the classes in metadata.csv; and if the folders are people, name those there, too, "
            "for --privacy_unit_column: without it, each image is protected, not each person",
            file=sys.stderr,
        )
    return [] if deep else [None if p == shared else p.name for p in parents]
