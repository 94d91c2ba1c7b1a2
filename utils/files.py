"""What a run leaves on disk: the names, files that are whole or absent, digests, and modes.

OUTPUT_DIR/privacy.json  README.md  samples/  and the weights       public
OUTPUT_DIR/private/ledger.jsonl  checkpoints/  latents/  cache/     mode 0700, never uploaded
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile

from safetensors import SafetensorError

from utils.errors import UsageError

STATEMENT = "privacy.json"  # what epsilon is computed from
SIGNATURE = "privacy.json.sig"  # of whoever stands behind the statement
CARD = "README.md"
DENOISERS = ("unet", "transformer")  # the folders of a pipeline's denoiser, of every family
# In the config.json of a model whose own weights were trained: diffusers keeps it when it saves the
# model again, in whatever pipeline, where the statement would be left behind.
PRIVATE_MARK = "_trained_on_private_images"
SAMPLES = "samples"  # images of the trained model
SAMPLE = r"(\d{4}|grid|film)\.png"  # their names, as a pattern
SALIENCY = "saliency.json"  # which matrices a selection chose
SAMPLING_SETTINGS = "sampling.json"  # how images are drawn from a model; or how a set was made
METADATA = "metadata.jsonl"  # the captions of an image folder, as `datasets` reads them
METRICS, REPORT = "metrics.json", "report.html"
GRID = "grid.png"  # a sheet of images
MEANS = "means.safetensors"  # noisy means that were released
VOTES = "votes.safetensors"  # noisy counts of votes that were released
LABELLER = "labeller.safetensors"  # a private classifier of synthetic images
LORA_WEIGHTS = "pytorch_lora_weights.safetensors"  # as diffusers names them
PRIVATE = "private"
LEDGER = "ledger.jsonl"
DATA_SHEET, DATA_REPORT = "images.png", "data.json"  # in PRIVATE: what a private set looks like
SAMPLE_DIGESTS = "samples.json"  # in PRIVATE: the SHA-256 of each sample, as it was generated
CHECKPOINTS, CACHE, LATENTS, LOGS = "checkpoints", "cache", "latents", "logs"  # in PRIVATE
# What is downloaded of a published adapter.
PUBLISHED = ["*.json", SIGNATURE, "*.safetensors", "*.py", *(f"{d}/*" for d in DENOISERS), CARD]


def private_folder(output_dir: str | Path) -> Path:
    """Where a run keeps what must not leave: OUTPUT_DIR/private."""
    return Path(output_dir) / PRIVATE


def make_private(folder: Path) -> Path:
    """Make a folder that only its owner may enter (0700), also if it is there already."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    return folder


def drop_private(folder: Path) -> None:
    """Remove a folder that holds only what is private, and the one it is in if that is left empty:
    neither need be there."""
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        folder.parent.rmdir()


def write_durably(path: Path, content: str | bytes) -> None:
    """Write a file that is either whole on disk or not there at all."""
    with replace_file(path) as aside:
        aside.write_bytes(content if isinstance(content, bytes) else content.encode())


@contextmanager
def replace_file(path: Path, sync: bool = True) -> Iterator[Path]:
    """Gives a path beside `path` to write to; what was written there becomes `path`, whole.

    With `sync` it also outlives a power cut from then on. After an error, `path` is as it was.
    """
    aside = path.with_name(path.name + ".tmp")
    try:
        yield aside
        if sync:
            sync_file(aside)
        aside.replace(path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    if sync:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` outlive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make what was written to a file outlive a power cut."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def read_text(path: Path) -> str:
    """A text file, with or without a byte-order mark.

    Raises:
        UsageError: it is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text: save it as UTF-8") from error


def resolve_if_there(name: str) -> str:
    """A folder by its one full path, however it was written; a Hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_occupied(output_dir: Path, mark: str) -> None:
    """Refuse a folder for results of one kind that holds anything else, or cannot be written:
    before models are loaded.

    Args:
        mark: the file that tells those of the kind.

    Raises:
        UsageError: it is such a folder, or a file.
    """
    if output_dir.exists() and not output_dir.is_dir():
        raise UsageError(f"--output_dir {output_dir} is a file: name a folder")
    place = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not os.access(place, os.W_OK):
        raise UsageError(f"--output_dir {output_dir} cannot be written: {place} is read-only")
    if output_dir.is_dir() and any(output_dir.iterdir()) and not (output_dir / mark).exists():
        raise UsageError(f"--output_dir {output_dir} already holds other files; name a new folder")


def check_takes_files(folder: Path, option: str) -> None:
    """Make `folder`, and see that it can be written: before work, not after it.

    Raises:
        UsageError: it cannot be made or written; `option` names it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(f"{option} {folder} takes no files: {error.strerror}") from error


@contextmanager
def explain_disk_errors(output_dir: Path) -> Iterator[None]:
    """A disk that takes no more becomes one sentence, which says how to go on.

    Raises:
        UsageError: instead of the OSError or SafetensorError of what runs inside.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)
        places = (private_folder(output_dir) / CHECKPOINTS, Path(output_dir) / CHECKPOINTS)
        saved = any(path for place in places for path in place.glob("checkpoint-*"))
        then = "resume with --resume_from_checkpoint latest" if saved else "give the command again"
        raise UsageError(
            f"cannot write to {output_dir}: {error}. Nothing is lost: "
            f"{'make room' if full else 'mend that'}, and {then}"
        ) from error
