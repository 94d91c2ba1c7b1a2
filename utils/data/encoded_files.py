"""Folders of large arrays: made by all processes together, whole or absent, mapped to be read.

They are as private as what they are computed from: mode 0700.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from filelock import FileLock

from utils.errors import UsageError, on_main_process
from utils.files import explain_disk_errors, sync_folder, write_durably

DTYPES = {".f32": torch.float32, ".bf16": torch.bfloat16}
ABOUT = "about.json"
Shapes = dict[str, list[int]]  # of each file, by name, which ends in its type


def map_file(path: Path, shape: list[int]) -> torch.Tensor:
    """A file as a tensor; only the parts that are used are read from disk."""
    dtype = DTYPES[path.suffix]
    return torch.from_file(str(path), size=math.prod(shape), dtype=dtype).view(shape)


@contextmanager
def lock_folder(encoded_dir: Path) -> Iterator[None]:
    """Only one run at a time makes or deletes these files; others wait."""
    lock = FileLock(encoded_dir.with_suffix(".lock"))

    def acquire() -> None:
        with explain_disk_errors(encoded_dir.parent):
            encoded_dir.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()

    on_main_process(acquire)
    try:
        yield
        PartialState().wait_for_everyone()
    finally:
        lock.release()


def make_folder(encoded_dir: Path, shapes: Shapes, fill: Callable[[Path], dict]) -> None:
    """Make a folder of files of these shapes; it appears when it is whole.

    Args:
        fill: on every process, writes its share of the files into the folder that it is given
            (`find_share`, `write_from`); returns what about.json is to say, numbers that are added
            up over the processes.

    Raises:
        UsageError: on every process, if any cannot read or write.
    """
    name = broadcast_object_list([f"{encoded_dir.name}-{uuid.uuid4().hex}"])[0]
    aside = encoded_dir.with_name(name)

    def start() -> None:
        with explain_disk_errors(encoded_dir.parent):
            # Of a run that was killed:
            for half in encoded_dir.parent.glob(f"{encoded_dir.name}-*"):
                shutil.rmtree(half)
            aside.mkdir(mode=0o700)
            for name, shape in shapes.items():
                with open(aside / name, "wb") as empty:
                    empty.truncate(count_bytes(name, shape))

    on_main_process(start)
    found, mistake = {}, None
    try:
        found = fill(aside)
    except UsageError as error:
        mistake = str(error)
    answers = gather_object([(found, mistake)])
    mistakes = [mistake for _, mistake in answers if mistake is not None]
    if mistakes:
        raise UsageError(mistakes[0])

    def finish() -> None:
        about = {name: sum(found[name] for found, _ in answers) for name in answers[0][0]}
        with explain_disk_errors(encoded_dir.parent):
            write_durably(aside / ABOUT, json.dumps(about) + "\n")
            sync_folder(aside)
            os.replace(aside, encoded_dir)
            sync_folder(encoded_dir.parent)

    on_main_process(finish)


def count_bytes(name: str, shape: Sequence[int]) -> int:
    return DTYPES[Path(name).suffix].itemsize * math.prod(shape)


def find_share(count: int) -> tuple[int, int]:
    """The first and the last but one of `count` that fall to this process."""
    state = PartialState()
    bounds = [count * r // state.num_processes for r in range(state.num_processes + 1)]
    return tuple(bounds[state.process_index : state.process_index + 2])


@contextmanager
def write_from(path: Path, shape: list[int], row: int) -> Iterator[Callable[[torch.Tensor], None]]:
    """What appends rows to a file that is there, beginning at one; they are on disk afterwards.

    Raises:
        UsageError: the disk does not take them.
    """
    with explain_disk_errors(path.parent.parent), open(path, "r+b") as file:
        file.seek(row * count_bytes(path.name, shape[1:]))
        dtype = DTYPES[path.suffix]
        yield lambda rows: file.write(rows.to(dtype).cpu().contiguous().view(torch.uint8).numpy())
        file.flush()
        os.fsync(file.fileno())
