"""What lies below a folder: its files, which of them can be images, and its splits.

Files are listed here, not by name patterns: the name of a file never decides about another file.
"""

from collections import deque
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

from PIL import Image as PILImage

from utils.errors import UsageError
from utils.files import METRICS, PRIVATE, SAMPLING_SETTINGS, STATEMENT, resolve_if_there

# Names of folders that are splits, where every folder of a set has such a name.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
# What archives, file servers and Windows leave.
NO_IMAGES = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "Thumbs.db", "desktop.ini"}
RESULTS = (SAMPLING_SETTINGS, STATEMENT, METRICS)  # a folder with one of these has them of ours


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
        for path in list_shown(folder):
            if path.is_dir():  # links last, so that each folder is read where it lies
                (folders.append if path.is_symlink() else folders.appendleft)(path)
            elif path.is_file():
                files.append(path)
            else:
                others[path] = "a link to nothing" if path.is_symlink() else "not a file"
    return Listing(sorted(files), others, places)


class Reach(NamedTuple):
    """Where the images lie that are read of a set: its folders, and what links to files lead to."""

    places: set[Path]
    linked: set[Path]

    def meets(self, other: "Reach") -> bool:
        """Whether a file may be read of both."""
        shared = self.places & other.places or self.linked & other.linked
        one, two = ({path.parent for path in reach.linked} for reach in (self, other))
        return bool(shared or one & other.places or two & self.places)


def find_reach(name: str) -> Reach:
    """Of a folder; a Hub id is a place of its own. What may not be read is left out: who reads the
    images says so."""
    root = Path(resolve_if_there(name))
    with suppress(OSError):
        if root.is_dir():
            files, _, places = list_files(root)
            return Reach(places, {path.resolve() for path in files if path.is_symlink()})
    return Reach({root}, set())


def list_shown(folder: Path) -> list[Path]:
    """What is in a folder and not hidden, in order; of one with results, not what is private."""
    is_ours = any((folder / name).is_file() for name in RESULTS)
    left_out = {*NO_IMAGES, PRIVATE} if is_ours else NO_IMAGES
    shown = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in shown if path.name not in left_out)


def find_split(folder: Path, split: str | None) -> Path:
    """The folder of a split: one below, if all folders below have names of splits; else itself.
    Without a name, that of `test`, or the only one there is.

    Raises:
        UsageError: it has no such split, or several beside other folders.
    """
    inside = list_shown(folder)
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
    named = [names for names in SPLITS.values() if folders.keys() & set(names)]
    if len(named) > 1:
        raise UsageError(
            f"{folder} has folders that are splits, and others, such as "
            f"{min(folders.keys() - known)}: nobody can tell whether those are classes, and all "
            "would be read; move them out of it, or give the folder of one split"
        )
    if split not in ("train", None):
        raise UsageError(
            f"{folder} is not divided into splits, so it has only 'train'; a folder named "
            f"'{split}' beside one named 'train' would be another"
        )
    return folder
