"""Images and captions -> memory-mapped files of latents and of conditioning, encoded once.

They are as private as the images, and go to OUTPUT_DIR/private or --latents_dir.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

import torch
import torch.nn.functional as F
from accelerate import PartialState
from diffusers import DiffusionPipeline
from tqdm import tqdm

from utils.arguments.training import TrainingArguments
from utils.data.encoded_files import (
    DTYPES,
    Shapes,
    find_share,
    lock_folder,
    make_folder,
    map_file,
    write_from,
)
from utils.data.images import PERCENT, read_pixel_batches, scale_to_unit_range
from utils.data.private_set import PrivateSet
from utils.errors import UsageError, on_main_process
from utils.files import CACHE, DATA_SHEET, LATENTS, explain_disk_errors, private_folder
from utils.ledger.runs import FIRST_MEANS, SELECTION
from utils.memory import images_at_once
from utils.models.families import find_family
from utils.models.pipelines import trains_text
from utils.models.text import AT_ONCE, embed_captions

ENCODING = 5  # raise it whenever images or captions are read, resized or encoded otherwise
TEXT_LIMIT = 64 * 2**30  # bytes of conditioning on disk; beyond, captions are encoded when sampled
LATENTS_FILE, TEXT_PREFIX = "latents.f32", "text-"
RUN, INTEGERS = 4096, {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class EncodedFiles:
    """The files of a private set, mapped: only what is used is read from disk.

    Attributes:
        latents: [rows, F, channels, r, r]; F is 2 with flips (as is, mirrored), else 1.
        text: the conditioning of each of D distinct captions, by name, each [D, ...];
            `caption_rows` [rows]: which of them a row has. Both None if there are no such files.
        folder: that holds them.
    """

    latents: torch.Tensor
    text: dict[str, torch.Tensor] | None
    caption_rows: torch.Tensor | None
    folder: Path


@torch.no_grad()
def encode_rows(
    pipeline: DiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    folder: Path,
    random_flip: bool = False,
) -> EncodedFiles:
    """Latents of every row, and the conditioning of every distinct caption, unless the text encoder
    trains or they would take more than `TEXT_LIMIT`.

    The files are made in `folder`/KEY, mode 0700, by all processes together, unless they are there
    from an earlier run on the same images, captions, encoders, resolution and flips. Beside them
    about.json says how many captions were longer than the text encoder reads, which is private.

    Raises:
        UsageError: they cannot be written, or the images changed since they were checked.
    """
    text, distinct, caption_rows = {}, [], None
    if not trains_text(pipeline):
        one = embed_captions(pipeline, [""], resolution)
        limit = TEXT_LIMIT // sum(values.nbytes for values in one.values())
        distinct, caption_rows = number_captions(private_set.captions, limit)
        text = one if distinct else {}
    job = _Job(pipeline, private_set, resolution, distinct)
    shapes = job.plan_shapes(2 if random_flip else 1, text)
    wanted = [shapes, job.hash_inputs()]
    encoded_dir = folder / hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    with lock_folder(encoded_dir):
        if not on_main_process(encoded_dir.exists):
            make_folder(encoded_dir, shapes, partial(job.encode, shapes))
        mapped = {name: map_file(encoded_dir / name, shape) for name, shape in shapes.items()}
    latents = mapped.pop(LATENTS_FILE)
    text = {name.removeprefix(TEXT_PREFIX).rsplit(".", 1)[0]: t for name, t in mapped.items()}
    return EncodedFiles(latents, text or None, caption_rows, encoded_dir)


def number_captions(captions: Sequence[str], limit: int) -> tuple[list[int], torch.Tensor | None]:
    """A row of each distinct caption, in the order of their first rows; and for each row which of
    them it has [rows]. Nothing if there are more than `limit`."""
    number: dict[bytes, int] = {}
    first, caption_rows = [], torch.empty(len(captions), dtype=torch.int32)
    for row, caption in enumerate(captions):
        found = number.setdefault(_digest(caption), len(number))
        if found == len(first):
            first.append(row)
        if len(first) > limit:
            return [], None
        caption_rows[row] = found
    return first, caption_rows


def _digest(caption: str) -> bytes:
    return hashlib.sha256(caption.encode(errors="surrogatepass")).digest()


def _add_up(tensor: torch.Tensor) -> bytes:
    """The sums of a tensor's bits in runs of 4,096 numbers, made where it is: to bring a text
    encoder of 20 GiB from a GPU and hash all of it takes over half a minute, at every start."""
    bits = tensor.detach().flatten().view(INTEGERS[tensor.element_size()])
    whole = len(bits) // RUN * RUN
    sums = bits[:whole].view(-1, RUN).sum(1, dtype=torch.int64)
    return torch.cat([sums, bits[whole:].sum(dtype=torch.int64)[None]]).cpu().numpy().tobytes()


@dataclass(frozen=True)
class _Job:
    """What is encoded; `distinct` rows have all captions between them, as far as text is kept."""

    pipeline: DiffusionPipeline
    private_set: PrivateSet
    resolution: int
    distinct: list[int]

    def plan_shapes(self, views: int, text: dict[str, torch.Tensor]) -> Shapes:
        """The shape of each file; `text` of one caption."""
        latent = find_family(self.pipeline).latent_shape(self.resolution)
        suffixes = {dtype: suffix for suffix, dtype in DTYPES.items()}
        kept = {
            f"{TEXT_PREFIX}{name}{suffixes[v.dtype]}": [len(self.distinct), *v.shape[1:]]
            for name, v in text.items()
        }
        return {LATENTS_FILE: [len(self.private_set.rows), views, *latent], **kept}

    def hash_inputs(self) -> str:
        """A digest of all that the files depend on, except their shapes."""
        family, private_set = find_family(self.pipeline), self.private_set
        how = f"{ENCODING} {self.resolution} {private_set.window}"
        digest = hashlib.sha256(how.encode() + private_set.digests.tobytes())
        for caption in private_set.captions:
            digest.update(_digest(caption))
        for part in [self.pipeline.vae, *(family.encoders if self.distinct else [])]:
            for name, tensor in sorted(part.state_dict().items()):
                digest.update(f"{name} {tensor.dtype}".encode() + _add_up(tensor))
            config = part.config if isinstance(part.config, dict) else part.config.to_dict()
            known = {k: v for k, v in config.items() if not k.startswith("_")}
            digest.update(repr(sorted(known.items())).encode())
        for rules in family.describe_reading() if self.distinct else []:
            digest.update(repr(rules).encode())
        return digest.hexdigest()

    def encode(self, shapes: Shapes, folder: Path) -> dict[str, int]:
        """Write the share of this process; returns how many rows it has, and captions that are
        longer than the text encoder reads.

        Raises:
            UsageError: the disk does not take them, or see `read_pixel_batches`.
        """
        cut = self._encode_images(folder, shapes, find_share(len(self.private_set.rows)))
        self._encode_captions(folder, shapes, find_share(len(self.distinct)))
        first, last = find_share(len(self.private_set.rows))
        return {"rows": last - first, "captions_cut": cut}

    def _encode_images(self, folder: Path, shapes: Shapes, share: tuple[int, int]) -> int:
        """Write the latents of the rows first ... last - 1; returns how many captions are cut."""
        family, (first, last), cut = find_family(self.pipeline), share, 0
        images = self.private_set.images.select(range(first, last))
        digests, flips = self.private_set.digests[first:last], shapes[LATENTS_FILE][1] == 2
        batch_size = images_at_once(self.resolution)
        batches = read_pixel_batches(images, self.resolution, batch_size, digests)
        with (
            write_from(folder / LATENTS_FILE, shapes[LATENTS_FILE], first) as write,
            _show_progress(last - first, "images") as bar,
        ):
            for pixels in batches:
                count, blank = len(pixels), (*[0] * 7, batch_size - len(pixels))
                # Always as many: else one more image would change the rounding of the others.
                view = scale_to_unit_range(F.pad(pixels, blank).to(family.device))
                views = [view, view.flip(-1)] if flips else [view]
                write(torch.stack([family.encode_images(view)[:count] for view in views], 1))
                cut += family.count_cut(self.private_set.captions[first : first + len(pixels)])
                first += len(pixels)
                bar.update(len(pixels))
        return cut

    def _encode_captions(self, folder: Path, shapes: Shapes, share: tuple[int, int]) -> None:
        """Write the conditioning of the distinct captions first ... last - 1."""
        first, last = share
        names = [name for name in shapes if name.startswith(TEXT_PREFIX)]
        with ExitStack() as stack, _show_progress(last - first, "captions") as bar:
            writers = [
                stack.enter_context(write_from(folder / name, shapes[name], first))
                for name in names
            ]
            for start in range(first, last, AT_ONCE):
                rows = self.distinct[start : min(start + AT_ONCE, last)]
                captions = [self.private_set.captions[row] for row in rows]
                text = embed_captions(self.pipeline, captions, self.resolution)
                for write, values in zip(writers, text.values(), strict=True):
                    write(values)
                bar.update(len(rows))


def _show_progress(count: int, what: str) -> tqdm:
    is_main = PartialState().is_main_process
    how = {"bar_format": PERCENT, "leave": False, "disable": not is_main or not count}
    return tqdm(total=count, desc=f"encoding {what}", **how)


def choose_latents_folder(training: TrainingArguments) -> Path:
    if training.latents_dir is not None:
        return Path(training.latents_dir)
    return private_folder(training.output_dir) / LATENTS


@contextmanager
def encode_aside(training: TrainingArguments) -> Iterator[TrainingArguments]:
    """The arguments with a folder of latents of its own, where those of the run would be, on a disk
    that all processes share; it is deleted afterwards.

    Raises:
        UsageError: the disk does not take it.
    """
    beside = choose_latents_folder(training)

    def make() -> str:
        with explain_disk_errors(beside):
            beside.mkdir(parents=True, exist_ok=True)
            return mkdtemp(dir=beside)

    folder = on_main_process(make)
    try:
        yield replace(training, latents_dir=folder)
        PartialState().wait_for_everyone()
    finally:
        if PartialState().is_main_process:
            shutil.rmtree(folder, ignore_errors=True)


def discard_copies(output_dir: Path, encoded_dir: Path | None) -> None:
    """Delete the copies of a run's private images: its latents, the sheet of them, and what
    `datasets` cached.

    Raises:
        UsageError: they cannot be deleted; on every process.
    """

    def discard() -> None:
        for folder in (output_dir, output_dir / SELECTION, output_dir / FIRST_MEANS):
            shutil.rmtree(private_folder(folder) / CACHE, ignore_errors=True)
            (private_folder(folder) / DATA_SHEET).unlink(missing_ok=True)
        if encoded_dir is not None and encoded_dir.exists():
            aside = encoded_dir.with_name(f"{encoded_dir.name}-discarded")
            os.replace(encoded_dir, aside)
            shutil.rmtree(aside)

    def discard_or_explain() -> None:
        try:
            discard()
        except OSError as error:
            raise UsageError(f"--discard_latents: {error}; delete them by hand") from error

    with lock_folder(encoded_dir) if encoded_dir is not None else nullcontext():
        on_main_process(discard_or_explain)
