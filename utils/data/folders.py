"""An image folder as rows: its files, what metadata says of them, and the folders they lie in.

Files are listed here, not by name patterns: the name of a file never decides about another file,
and text in a table stays the text that it is. What is not used is counted, and said.
"""

import os
import re
import sys
from collections import Counter, deque
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Image
from PIL import Image as PILImage

from utils.data.metadata import FILE_NAME, METADATA_NAMES, read_metadata, require_images
from utils.errors import UsageError
from utils.files import METRICS, PRIVATE, SAMPLING_SETTINGS, STATEMENT, read_text

# Names of folders that are splits, where every folder of a set has such a name.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".7z", ".rar")
MEDICAL = (".dcm", ".dicom", ".nii")  # docs/data.md says how to convert them
PARQUET = ".parquet"
SHARD = re.compile(r"-\d{5}-of-\d{5}\.parquet$")
RESULTS = (SAMPLING_SETTINGS, STATEMENT, METRICS)  # a folder with one of these has them of ours
IMAGE, LABEL, TEXT = "image", "label", "text"  # what the layout of a folder gives


@cache
def list_image_formats() -> tuple[str, ...]:
    """Those that Pillow opens here, but icons, which it decodes before their size is known."""
    PILImage.init()
    return tuple(kind for kind in PILImage.OPEN if kind != "ICO")


def find_image_extensions() -> set[str]:
    """Of the files of these formats: lower-case, with the dot."""
    known = list_image_formats()
    return {suffix for suffix, kind in PILImage.EXTENSION.items() if kind in known}


class Listing(NamedTuple):
    """What lies below a folder, also behind links: its files, in order; what cannot be followed,
    and why; and where the folders lie that were entered."""

    files: list[Path]
    others: dict[Path, str]
    places: set[Path]


def list_files(root: Path) -> Listing:
    """All below a folder but what is hidden, or private beside results.

    Raises:
        OSError: a folder may not be read.
    """
    files, others, places, folders = [], {}, set(), deque([root])
    while folders:
        folder = folders.popleft()
        if (place := folder.resolve()) in places:
            others[folder] = "a folder that is read already, under another name"
            continue
        places.add(place)
        for path in _list_shown(folder):
            if path.is_dir():  # links last, so that each folder is read where it lies
                (folders.append if path.is_symlink() else folders.appendleft)(path)
            elif path.is_file():
                files.append(path)
            else:
                others[path] = "a link to nothing" if path.is_symlink() else "not a file"
    return Listing(sorted(files), others, places)


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
        places = {Path(images).resolve()}
        with suppress(OSError):  # who reads the images says so
            places |= list_files(Path(images)).places
        if not places.isdisjoint((output, *output.parents)):
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
        return any(suffixes[suffix] for suffix in ARCHIVES + MEDICAL) or images > 0
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
    unused |= {path: "a scan, convert it" for path in files if path.suffix.lower() in MEDICAL}
    tables = [path for path in unused if path.name.lower() in METADATA_NAMES]
    if root != folder:
        tables += [p for p in sorted(folder.iterdir()) if p.name.lower() in METADATA_NAMES]
    if tables:
        images, columns = _follow_metadata(tables, root, images, unused)
    else:
        columns = _read_texts_beside(root, images, unused)
    _say_what_is_unused(root, len(images), unused)
    return _make_rows(images, root, columns)


def _hint_at(files: Iterable[Path]) -> str:
    """What to do with what a folder without images holds."""
    archives = [path.name for path in files if path.suffix.lower() in ARCHIVES]
    scans = [path.name for path in files if path.suffix.lower() in MEDICAL]
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


def find_split(folder: Path, split: str | None) -> Path:
    """The folder of a split: one below, if all folders below have names of splits; else itself.
    Without a name, that of `test`, or the only one there is.

    Raises:
        UsageError: it has no such split.
    """
    inside = _list_shown(folder)
    folders = {path.name.lower(): path for path in inside if path.is_dir()}
    known = {name for names in SPLITS.values() for name in names}
    if folders and set(folders) <= known:
        loose = [path.name for path in inside if path.suffix.lower() in find_image_extensions()]
        if loose:
            raise UsageError(
                f"{folder} has the splits {', '.join(sorted(folders))}, and images beside them, "
                f"such as {min(loose)}: move those into one of the folders, or out of it"
            )
        asked = split or "test"
        named = [folders[name] for name in SPLITS.get(asked, (asked,)) if name in folders]
        if split is None and not named:
            named = list(folders.values())
        if len(named) == 1:
            return named[0]
        raise UsageError(f"{folder} has the splits {', '.join(sorted(folders))}: not '{asked}'")
    if split not in ("train", None):
        raise UsageError(
            f"{folder} is not divided into splits, so it has only 'train'; a folder named "
            f"'{split}' beside one named 'train' would be another"
        )
    return folder


def _list_shown(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, in order; of one with results, not what is private."""
    is_ours = any((folder / name).is_file() for name in RESULTS)
    left_out = {"__MACOSX", PRIVATE} if is_ours else {"__MACOSX"}
    shown = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in shown if path.name not in left_out)


def _collect_columns(entries: list[dict]) -> dict[str, list]:
    names = dict.fromkeys(name for entry in entries for name in entry)
    if {IMAGE, FILE_NAME} & set(names):
        raise UsageError(f"the metadata has a column '{IMAGE}', which is that of the images")
    return {name: [entry.get(name) for entry in entries] for name in names}


def _say_what_is_unused(root: Path, used: int, unused: dict[Path, str]) -> None:
    if not unused or not PartialState().is_main_process:
        return
    reasons = Counter((why, path.suffix.lower() or path.name) for path, why in unused.items())
    parts = [f"{count} {suffix} ({why})" for (why, suffix), count in sorted(reasons.items())]
    print(f"{root}: {used} images used; not used: {', '.join(parts)}", file=sys.stderr)


def _make_rows(images: list[Path], root: Path, columns: dict[str, list]) -> Dataset:
    try:
        rows = Dataset.from_dict({IMAGE: [str(path) for path in images], **columns})
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"the metadata of {root} mixes kinds in one column: {error}") from error
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
            f"{root}: no column {LABEL} is made of the folders, since some lie within others, such "
            f"as that of {deep[0].relative_to(root)}: name the classes in metadata.csv",
            file=sys.stderr,
        )
    return [] if deep else [None if p == shared else p.name for p in parents]
