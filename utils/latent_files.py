"""Images and captions -> memory-mapped files of latents and token ids, once, under private/."""

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

from utils.arguments import TrainingArguments
from utils.checkpoints import sync_folder
from utils.data import PERCENT, PrivateSet, pixel_batches, to_unit_range
from utils.errors import UsageError, on_main_process
from utils.hub import write_durably
from utils.pipelines import tokenize, tokenizers_of
from utils.runs import disk_errors_told, private_folder

ENCODING = 1  # raise it whenever images are read, resized or encoded otherwise
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
    shapes = _shapes(pipeline, private_set, resolution, random_flip)
    wanted = [shapes, _digest(pipeline, private_set, resolution)]
    made = folder / hashlib.sha256(json.dumps(wanted).encode()).hexdigest()[:16]
    with _locked(made):
        if not on_main_process(made.exists):
            _encode_into(made, pipeline, private_set, resolution, shapes)
        latents, tokens = (_mapped(made / name, shape) for name, shape in shapes.items())
    return latents, tokens, made


def _mapped(path: Path, shape: list[int]) -> torch.Tensor:
    """A file as a tensor, of which only what is used is read."""
    dtype = torch.float32 if path.suffix == ".f32" else torch.int32
    return torch.from_file(str(path), size=math.prod(shape), dtype=dtype).view(shape)


@contextmanager
def _locked(made: Path) -> Iterator[None]:
    """Only one run at a time makes or deletes these files; others wait."""
    lock = FileLock(made.with_suffix(".lock"))

    def acquire() -> None:
        with disk_errors_told(made.parent):
            made.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            lock.acquire()

    on_main_process(acquire)
    try:
        yield
        PartialState().wait_for_everyone()
    finally:
        lock.release()


def _shapes(pipeline, private_set: PrivateSet, resolution: int, random_flip: bool) -> dict:
    """Of the files, by name."""
    rows, side = len(private_set.rows), resolution // pipeline.vae_scale_factor
    channels = pipeline.vae.config.latent_channels
    return {
        "latents.f32": [rows, 2 if random_flip else 1, channels, side, side],
        "tokens.i32": [rows, *tokenize(pipeline, [""]).shape[1:]],
    }


def _digest(pipeline, private_set: PrivateSet, resolution: int) -> str:
    """Of all that the files depend on, but for their shapes."""
    digest = hashlib.sha256(f"{ENCODING} {resolution}".encode() + private_set.digests.tobytes())
    for caption in private_set.captions:
        digest.update(hashlib.sha256(caption.encode(errors="surrogatepass")).digest())
    for name, tensor in sorted(pipeline.vae.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().numpy().tobytes())
    digest.update(repr(pipeline.vae.config.scaling_factor).encode())
    for tokenizer in tokenizers_of(pipeline):
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        for passing in ("padding", "truncation"):  # as its last caller left them
            rules.pop(passing)
        digest.update(repr((rules, tokenizer.pad_token_id)).encode())
    return digest.hexdigest()


def _encode_into(made: Path, pipeline, private_set, resolution: int, shapes: dict) -> None:
    """Make the files of the folder `made`: each process a run of rows; it appears when it is whole.

    Raises:
        UsageError: on every process, if any cannot read or write.
    """
    state = PartialState()
    aside = made.with_name(broadcast_object_list([f"{made.name}-{uuid.uuid4().hex}"])[0])

    def start() -> None:
        with disk_errors_told(made.parent):
            for half in made.parent.glob(f"{made.name}-*"):  # of a run that was killed
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
        with disk_errors_told(made.parent):
            write_durably(aside / "about.json", json.dumps(about) + "\n")
            sync_folder(aside)
            os.replace(aside, made)
            sync_folder(made.parent)

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
        UsageError: the disk does not take them, or see `pixel_batches`.
    """
    first, last = span
    own, digests = private_set.rows.select(range(first, last)), private_set.digests[first:last]
    flips, cut = shapes["latents.f32"][1] == 2, 0
    batch_size = max(1, min(64, PIXELS_AT_ONCE // resolution**2))
    batches = pixel_batches(own, private_set.image_column, resolution, batch_size, digests)
    shown = PartialState().is_main_process
    bar = tqdm(
        total=len(own), desc="encoding images", bar_format=PERCENT, leave=False, disable=not shown
    )
    with (
        disk_errors_told(folder.parent),
        open(folder / "latents.f32", "r+b") as latents,
        open(folder / "tokens.i32", "r+b") as tokens,
        bar,
    ):
        latents.seek(first * 4 * math.prod(shapes["latents.f32"][1:]))
        tokens.seek(first * 4 * math.prod(shapes["tokens.i32"][1:]))
        for pixels in batches:
            images = to_unit_range(pixels.to(pipeline.device))
            views = [images, images.flip(-1)] if flips else [images]
            encoded = torch.stack([encode_images(pipeline, view) for view in views], 1)
            latents.write(encoded.float().cpu().numpy().tobytes())
            words = private_set.captions[first : first + len(pixels)]
            tokens.write(tokenize(pipeline, words).int().numpy().tobytes())
            cut += count_cut(pipeline, words)
            first += len(pixels)
            bar.update(len(pixels))
        for file in (latents, tokens):
            file.flush()
            os.fsync(file.fileno())
    return cut


def latents_folder(training: TrainingArguments) -> Path:
    if training.latents_dir is not None:
        return Path(training.latents_dir)
    return private_folder(training.output_dir) / "latents"


def discard_copies(output_dir: Path, made: Path | None) -> None:
    """Delete what a run made of its private images: its latents, and what `datasets` cached.

    Raises:
        UsageError: they cannot be deleted; on every process.
    """

    def discard() -> None:
        for folder in (output_dir, output_dir / "selection"):
            shutil.rmtree(private_folder(folder) / "cache", ignore_errors=True)
        if made is not None and made.exists():
            aside = made.with_name(f"{made.name}-discarded")
            os.replace(made, aside)
            shutil.rmtree(aside)

    def told() -> None:
        try:
            discard()
        except OSError as error:
            raise UsageError(f"--discard_latents: {error}; delete them by hand") from error

    with _locked(made) if made is not None else nullcontext():
        on_main_process(told)


def count_cut(pipeline: DiffusionPipeline, captions: list[str]) -> int:
    """How many captions have more tokens than the text encoder reads."""
    longest = pipeline.tokenizer.model_max_length
    tokens = pipeline.tokenizer(captions, verbose=False).input_ids  # or it would tell their lengths
    return sum(len(ids) > longest for ids in tokens)


def encode_images(pipeline: DiffusionPipeline, images: torch.Tensor) -> torch.Tensor:
    """The latent means of images in [-1, 1], as the U-Net wants them: [n, channels, r, r]."""
    latents = pipeline.vae.encode(images).latent_dist.mode()
    return latents * pipeline.vae.config.scaling_factor
