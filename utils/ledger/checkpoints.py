"""Checkpoints: whole or absent, never with a generator in them.

A checkpoint is a folder `checkpoint-STEP` with `state.pt` (adapter, optimizer, schedule, moving
average) and `about.json` (step, run, what it must agree with, the hash of state.pt). It is written
in a folder `unfinished-STEP`, synced and renamed. That folder is created, empty, before the release
is on record. A release can be taken back only while the folder still exists.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

from utils.errors import UsageError, find_differences
from utils.files import hash_file, replace_file, sync_folder, write_durably

SCHEMA_VERSION = 1
ABOUT = "about.json"
SET_ASIDE = "set-aside"  # what a resumed run has passed over


def announce_checkpoint(folder: Path, step: int) -> int:
    """Make the empty folder that `save_checkpoint` will fill; call before the release is on record.
    Returns what tells it from a copy on the same disk: its inode.

    Raises:
        UsageError: the disk does not take it.
    """
    aside = folder / f"unfinished-{step}"
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        sync_folder(folder)
        return aside.stat().st_ino
    except OSError as error:
        raise _no_room(folder, step, error) from error


def was_left_unfinished(folder: Path, step: int, place: int | None = None) -> bool:
    """Whether the folder is there that was announced (at `place`, if that is known): of a copy, the
    original may still hold what was written to it."""
    aside = folder / f"unfinished-{step}"
    return aside.is_dir() and place in (None, aside.stat().st_ino)


def _no_room(folder: Path, step: int, error: Exception) -> UsageError:
    return UsageError(
        f"cannot write the checkpoint of step {step} to {folder}: {error}. Make room and resume "
        "with --resume_from_checkpoint latest"
    )


def save_checkpoint(folder: Path, step: int, state: dict, about: dict) -> None:
    """Write `folder`/checkpoint-`step`. Raises: UsageError if the disk does not take it."""
    aside, final = folder / f"unfinished-{step}", locate_checkpoint(folder, step)
    try:
        with replace_file(aside / "state.pt") as file:
            torch.save(state, file)
        about = {"schema_version": SCHEMA_VERSION, "step": step, **about}
        about["sha256"] = hash_file(aside / "state.pt")
        write_durably(aside / ABOUT, json.dumps(about, indent=2))
        remove(final)
        aside.rename(final)
        sync_folder(folder)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError on a full disk
        for part in aside.glob("*"):
            part.unlink(missing_ok=True)
        raise _no_room(folder, step, error) from error


def locate_checkpoint(folder: Path, step: int) -> Path:
    return folder / f"checkpoint-{step}"


def list_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, oldest first."""
    found = [re.fullmatch(r"checkpoint-(\d+)", path.name) for path in folder.glob("checkpoint-*")]
    return sorted(int(match[1]) for match in found if match)


def list_kept(folder: Path) -> Iterator[tuple[str, dict]]:
    """The name of every checkpoint in `folder`, of those set aside too, and what it says about
    itself; whether its state is whole is not looked at, and one that says nothing is none."""
    for path in sorted([*folder.glob("checkpoint-*"), *folder.glob(f"{SET_ASIDE}-*")]):
        with suppress(OSError, ValueError, AttributeError):
            about = json.loads((path / ABOUT).read_text())
            if {"run", "step"} <= about.keys():
                yield path.name, about


def rotate(folder: Path, limit: int) -> None:
    """Keep the `limit` newest checkpoints."""
    for step in list_steps(folder)[:-limit]:
        remove(locate_checkpoint(folder, step))


def remove(checkpoint: Path) -> None:
    """Delete a checkpoint, if it is there; it is never half there under its own name."""
    if checkpoint.exists():
        aside = checkpoint.with_name(f"deleting-{checkpoint.name}")
        shutil.rmtree(aside, ignore_errors=True)
        checkpoint.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


def empty_unfinished(folder: Path) -> None:
    """Destroy, for good, what unfinished checkpoints hold; their folders stay."""
    for leftover in folder.glob("unfinished-*"):
        for part in leftover.iterdir():
            part.unlink()
        sync_folder(leftover)


def sweep(folder: Path) -> None:
    """Remove the folders of unfinished checkpoints, and what was left of deleted ones."""
    for leftover in [*folder.glob("unfinished-*"), *folder.glob("deleting-*")]:
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.is_dir():
        sync_folder(folder)


def read_about(path: Path) -> dict:
    """What a checkpoint says about itself.

    Raises:
        UsageError: it is not there, is damaged, or was written by a newer version.
    """
    try:
        about = json.loads((path / ABOUT).read_text())
        if about["schema_version"] > SCHEMA_VERSION:
            raise UsageError(f"the checkpoint {path} was written by a newer version of this code")
        if about["sha256"] != hash_file(path / "state.pt"):
            raise ValueError("state.pt is not what was written")
        return about
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"the checkpoint {path} is missing or damaged: {error}") from error


def read_state(path: Path) -> dict:
    """What `save_checkpoint` was given, on the CPU; no code is run to read it."""
    return torch.load(path / "state.pt", map_location="cpu", weights_only=True)


def find_newest_intact(folder: Path) -> tuple[Path, list[str]]:
    """The newest checkpoint that can be read, and a sentence for each newer one that cannot.

    Raises:
        UsageError: there is none.
    """
    sentences = []
    for step in reversed(list_steps(folder)):
        path = locate_checkpoint(folder, step)
        try:
            read_about(path)
            return path, sentences
        except UsageError as error:
            sentences.append(f"{error}; resuming from the one before")
    raise UsageError(
        f"there is no {'intact ' if sentences else ''}checkpoint in {folder} to resume from; start "
        "a new run instead"
    )


def list_differences(then: dict, now: dict) -> list[str]:
    """What changed between two nested dictionaries, as "name was ..., is ...", for people."""
    return [f"{name} was {old}, is {new}" for name, old, new in find_differences(then, now)]
