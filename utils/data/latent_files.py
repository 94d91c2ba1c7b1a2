"""Images and captions -> memory-mapped files of latents and token ids, encoded once.

They are as private as the images, and go to OUTPUT_DIR/private or --latents_dir.
"""

import hashlib
import json
import math
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object
from diffusers import DiffusionPipeline
from filelock import FileLock
from tqdm import tqdm

from utils.arguments.training import TrainingArguments
from utils.data.images import PERCENT, read_pixel_batches, scale_to_unit_range
from utils.data.private_set import PrivateSet
from utils.errors import UsageError, on_main_process
from utils.files import (
    CACHE,
    DATA_SHEET,
    LATENTS,
    explain_disk_errors,
    private_folder,
    sync_folder,
    write_durably,
)
from utils.ledger.runs import FIRST_MEANS, SELECTION
from utils.models.denoising import list_tokenizers, tokenize
from utils.models.pipelines import is_xl

ENCODING = 2  # raise it whenever images are read, resized or encoded otherwise
PIXELS_AT_ONCE = 2**20  # that the autoencoder reads: four images of 512 pixels


@torch.no_grad()
def encode_rows(
    pipeline: DiffusionPipeline,
    private_set: PrivateSet,
    resolution: int,
    folder: Path,
    random_flip: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, Path]:
    """Latents [rows, F, channels, r, r] and token ids [rows, E, T] of every row, and their folder;
    F is 2 with flips (as is, mirrored), else 1.

    The files are made in `folder`/KEY, mode 0700, by all processes together, unless they are there
    from an earlier run on the same images, captions, autoencoder, resolution and flips. Beside them
    about.json says how many captions were longer than the text encoder reads, which is private.

    Raises:
        UsageError: they cannot be written, or the images changed since they were checked.
    """
    shapes = _plan_shapes(pipeline, private_set, resolution, random_flip)
    wanted = [shapes, _hash_inputs(pipeline, private_set, resolution)]
    encoded_dir = folder / hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    with _lock(encoded_dir):
        if not on_main_process(encoded_dir.exists):
            _encode_into(encoded_dir, pipeline, private_set, resolution, shapes)
        latents, tokens = (_map_file(encoded_dir / name, shape) for name, shape in shapes.items())
    return latents, tokens, encoded_dir


def _map_file(path: Path, shape: list[int]) -> torch.Tensor:
    """A file as a tensor; only the parts that are used are read from disk."""
    dtype = torch.float32 if path.suffix == ".f32" else torch.int32
    return torch.from_file(str(path), size=math.prod(shape), dtype=dtype).view(shape)


@contextmanager
def _lock(encoded_dir: Path) -> Iterator[None]:
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


def _plan_shapes(pipeline, private_set: PrivateSet, resolution: int, random_flip: bool) -> dict:
    """The shape of each file, by name."""
    rows, side = len(private_set.rows), resolution // pipeline.vae_scale_factor
    channels = pipeline.vae.config.latent_channels
    return {
        "latents.f32": [rows, 2 if random_flip else 1, channels, side, side],
        "tokens.i32": [rows, *tokenize(pipeline, [""]).shape[1:]],
    }


def _hash_inputs(pipeline, private_set: PrivateSet, resolution: int) -> str:
    """A digest of all that the files depend on, except their shapes."""
    how = f"{ENCODING} {resolution} {private_set.window}"
    digest = hashlib.sha256(how.encode() + private_set.digests.tobytes())
    for caption in private_set.captions:
        digest.update(hashlib.sha256(caption.encode(errors="surrogatepass")).digest())
    for name, tensor in sorted(pipeline.vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    keys = ("scaling_factor", "latents_mean", "latents_std")
    digest.update(repr([pipeline.vae.config.get(key) for key in keys]).encode())
    for tokenizer in list_tokenizers(pipeline):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for passing in ("padding", "truncation"):  # as its last caller left them
            rules.pop(passing)
        digest.update(repr((rules, tokenizer.pad_token_id)).encode())
    return digest.hexdigest()


def _encode_into(encoded_dir: Path, pipeline, private_set, resolution: int, shapes: dict) -> None:
    """Make the files of `encoded_dir`: each process a run of rows; it appears when it is whole.

    Raises:
        UsageError: on every process, if any cannot read or write.
    """
    state = PartialState()
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
                    empty.truncate(4 * math.prod(shape))

    on_main_process(start)
    rows, cut, mistake = len(private_set.rows), 0, None
    bounds = [rows * r // state.num_processes for r in range(state.num_processes + 1)]
    first, last = bounds[state.process_index : state.process_index + 2]
    try:
        cut = _encode_span(aside, pipeline, private_set, (first, last), resolution, shapes)
    except UsageError as error:
        mistake = str(error)
    answers = gather_object([(cut, mistake)])
    mistakes = [mistake for _, mistake in answers if mistake is not None]
    if mistakes:
        raise UsageError(mistakes[0])

    def finish() -> None:
        cut = sum(cut for cut, _ in answers)
        about = {"rows": rows, "captions_cut": cut, "tokens": shapes["tokens.i32"][-1]}
        with explain_disk_errors(encoded_dir.parent):
            write_durably(aside / "about.json", json.dumps(about) + "\n")
            sync_folder(aside)
            os.replace(aside, encoded_dir)
            sync_folder(encoded_dir.parent)

    on_main_process(finish)


def _encode_span(
    folder: Path,
    pipeline: DiffusionPipeline,
    private_set: PrivateSet,
    span: tuple[int, int],
    resolution: int,
    shapes: dict,
) -> int:
    """Write the rows first ... last - 1 to the files; returns how many captions were cut.

    Raises:
        UsageError: the disk does not take them, or see `read_pixel_batches`.
    """
    first, last = span
    share, digests = private_set.images.select(range(first, last)), private_set.digests[first:last]
    flips, cut = shapes["latents.f32"][1] == 2, 0
    batch_size = max(1, min(64, PIXELS_AT_ONCE // resolution**2))
    batches = read_pixel_batches(share, resolution, batch_size, digests)
    is_main = PartialState().is_main_process
    bar = tqdm(
        total=len(share),
        desc="encoding images",
        bar_format=PERCENT,
        leave=False,
        disable=not is_main,
    )
    with (
        explain_disk_errors(folder.parent),
        open(folder / "latents.f32", "r+b") as latents,
        open(folder / "tokens.i32", "r+b") as tokens,
        bar,
    ):
        latents.seek(first * 4 * math.prod(shapes["latents.f32"][1:]))
        tokens.seek(first * 4 * math.prod(shapes["tokens.i32"][1:]))
        for pixels in batches:
            images = scale_to_unit_range(pixels.to(pipeline.device))
            views = [images, images.flip(-1)] if flips else [images]
            encoded = torch.stack([encode_images(pipeline, view) for view in views], 1)
            latents.write(encoded.float().cpu().numpy().tobytes())
            captions = private_set.captions[first : first + len(pixels)]
            tokens.write(tokenize(pipeline, captions).int().numpy().tobytes())
            cut += count_cut(pipeline, captions)
            first += len(pixels)
            bar.update(len(pixels))
        for file in (latents, tokens):
            file.flush()
            os.fsync(file.fileno())
    return cut


def choose_latents_folder(training: TrainingArguments) -> Path:
    if training.latents_dir is not None:
        return Path(training.latents_dir)
    return private_folder(training.output_dir) / LATENTS


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

    with _lock(encoded_dir) if encoded_dir is not None else nullcontext():
        on_main_process(discard_or_explain)


def count_cut(pipeline: DiffusionPipeline, captions: list[str]) -> int:
    """How many captions have more tokens than the text encoder reads."""
    longest = pipeline.tokenizer.model_max_length
    # Not verbose: a warning would give the lengths of private captions away.
    tokens = pipeline.tokenizer(captions, verbose=False).input_ids
    return sum(len(ids) > longest for ids in tokens)


def encode_images(pipeline: DiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """The latent means of images in [-1, 1], as the U-Net wants them: [n, channels, r, r]."""
    latents, config = pipeline.vae.encode(images).latent_dist.mode(), pipeline.vae.config
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if is_xl(pipeline) and mean is not None and std is not None:  # of each channel
        mean, std = (torch.tensor(v, device=latents.device).view(1, -1, 1, 1) for v in (mean, std))
        latents = (latents - mean) / std
    return latents * config.scaling_factor
