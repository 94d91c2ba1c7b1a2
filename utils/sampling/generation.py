"""Batched text-to-image generation, over processes, into folders that `datasets` reads."""

import hashlib
import io
import json
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from PIL import Image
from tqdm import tqdm

from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.data.images import tile_images
from utils.errors import UsageError, on_main_process
from utils.files import (
    GRID,
    METADATA,
    SAMPLING_SETTINGS,
    STATEMENT,
    hash_file,
    refuse_occupied,
    write_durably,
)
from utils.ledger.public_sets import IS_PUBLIC
from utils.ledger.statement import BASE_CHECKSUM, write_statement
from utils.ledger.verification import fetch_statement, read_json
from utils.memory import images_at_once
from utils.models.adapters import ADAPTER_CONFIG, PARTS, load_adapter
from utils.models.drawing import (
    DrawingSettings,
    choose_settings,
    read_base_settings,
    read_settings,
)
from utils.models.families import find_family
from utils.models.pipelines import list_parts, load_pipeline
from utils.privacy.training import checksum
from utils.sampling.batches import generate
from utils.sampling.prompts import choose_template, read_prompts
from utils.sampling.shards import (
    Piece,
    hash_set,
    is_whole,
    list_set,
    plan_pieces,
    read_pieces,
    write_piece,
)
from utils.sampling.sources import ImageSource, warn_of_another_base

ADAPTER_FILES = "adapter_files"  # in sampling.json: digests of the weights behind the images
PROMPTS = "prompts_sha256"  # in sampling.json: of those of a file
SET_DIGEST = "set"  # in sampling.json: `hash_set` of the images, once all are there
AFTERWARDS = {IS_PUBLIC: None, SET_DIGEST: None}  # what sampling.json says beside the settings


def hash_adapter(adapter: Path) -> dict[str, str]:
    """The SHA-256 of each of its weights, of what scales them, and of its statement, by name."""
    if adapter.is_file():
        return {adapter.name: hash_file(adapter)}
    paths = [*adapter.glob("*.safetensors")]
    paths += [path for part in PARTS for path in adapter.glob(f"{part}/*.safetensors")]
    paths += [adapter / name for name in (STATEMENT, ADAPTER_CONFIG) if (adapter / name).exists()]
    return {str(path.relative_to(adapter)): hash_file(path) for path in sorted(paths)}


def claim_folder(folder: Path, settings: dict, source: ImageSource) -> None:
    """Start or resume a folder of images; it gets the statement that covers them.

    Raises:
        UsageError: it holds images made with other settings.
    """
    record, known = folder / SAMPLING_SETTINGS, {}
    if record.exists():
        known = read_json(record)
        if known | AFTERWARDS != settings | AFTERWARDS:
            raise UsageError(
                f"{folder} holds images of other settings, prompts or weights; name another "
                "--output_dir"
            )
        if fetch_statement(str(folder))[0] != source.statement:
            raise UsageError(
                f"{folder} holds images of a model or adapter that had another privacy.json; name "
                "another --output_dir"
            )
    folder.mkdir(parents=True, exist_ok=True)
    is_public = source.is_public and known.get(IS_PUBLIC, True)
    told = known | settings | {IS_PUBLIC: is_public}
    write_durably(record, json.dumps(told, indent=2) + "\n")
    if source.statement is not None:
        write_statement(source.statement, folder)


@dataclass(frozen=True)
class Generation:
    """All that generating a folder of images needs; no image was generated yet.

    Attributes:
        pipeline: with the adapter, on its device. prompts: one entry a prompt (`read_prompts`).
        settings: how images are drawn; the pipeline has their scheduler.
    """

    pipeline: DiffusionPipeline
    prompts: list[dict]
    settings: DrawingSettings


def prepare_generation(
    model: ModelArguments,
    sampling: SamplingArguments,
    source: ImageSource,
    folder: Path,
    state: PartialState,
) -> Generation:
    """Load the pipeline of `model`, with the adapter of `source`, of any kind, if there is one; and
    claim the folder. The statement that covers the images goes into it.

    Raises:
        UsageError: see `read_prompts`, `load_pipeline`, `choose_settings` and `load_adapter`; or
            the folder holds something else, or images of other settings or prompts, or of a base
            model or an adapter that has changed.
    """
    on_main_process(lambda: refuse_occupied(folder, SAMPLING_SETTINGS))
    recorded = on_main_process(lambda: read_recorded(model, source))
    sampling = choose_template(sampling, recorded)
    prompts = read_prompts(sampling)
    pipeline, drawing, made_by = load_drawing(model, sampling, source, state)
    find_family(pipeline).check_captions([prompt["text"] for prompt in prompts])
    settings = asdict(sampling) | asdict(model) | asdict(drawing) | made_by
    del settings["batch_size"]  # it changes no image
    if sampling.prompts_file is not None:  # which may be another by the time that this is resumed
        settings[PROMPTS] = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()
    on_main_process(lambda: claim_folder(folder, settings, source))
    return Generation(pipeline, prompts, drawing)


def read_recorded(model: ModelArguments, source: ImageSource) -> list[dict]:
    """What sampling.json of the adapter, then of the base model says."""
    adapter = [] if source.adapter is None else [read_settings(source.adapter)]
    return [*adapter, read_base_settings(model)]


def load_drawing(
    model: ModelArguments, sampling: SamplingArguments, source: ImageSource, state: PartialState
) -> tuple[DiffusionPipeline, DrawingSettings, dict]:
    """The pipeline, with adapter and scheduler, on its device; how it draws; and what tells its
    weights, as sampling.json has it: the base's checksum, and the digests of the adapter's files.

    Raises:
        UsageError: see `load_pipeline`, `choose_settings` and `load_adapter`; or the adapter has
            changed.
    """
    pipeline = load_pipeline(*model.source)
    base = checksum(p for part in list_parts(pipeline) for p in part.parameters()).item()
    made_by = {BASE_CHECKSUM: base}
    recorded = on_main_process(lambda: read_recorded(model, source))
    drawing = choose_settings(pipeline, sampling, sampling.resolution, *recorded)
    if source.adapter is not None:
        warn_of_another_base(source, base, model.pretrained_model_name_or_path)
        load_adapter(pipeline, source.adapter)
        made_by[ADAPTER_FILES] = hash_adapter(source.adapter)
        _check_that_weights_are_those_verified(made_by[ADAPTER_FILES], source)
    pipeline.to(state.device, torch.bfloat16 if sampling.mixed_precision == "bf16" else None)
    drawing.use_scheduler(pipeline)
    return pipeline, drawing, made_by


def _check_that_weights_are_those_verified(found: dict[str, str], source: ImageSource) -> None:
    """Raises: UsageError if the adapter was replaced since `find_source` verified it."""
    if source.statement is None or source.statement["private"] is not True:
        return
    verified = source.statement["files"]
    if any(verified.get(name) != digest for name, digest in found.items() if name != STATEMENT):
        raise UsageError(f"the adapter {source.adapter} changed while it was loaded; try again")


def generate_folder(
    prepared: Generation, sampling: SamplingArguments, folder: Path, state: PartialState
) -> None:
    """Generate the images that `folder` does not hold yet, each process its share.

    Leaves one file an image and metadata.jsonl, or shards, with the columns text, and label for
    class names; and grid.png. Images are balanced over the prompts.
    """
    prompts = prepared.prompts
    entries = [prompts[i % len(prompts)] for i in range(sampling.num_images)]
    pieces = plan_pieces(sampling.output_format, len(entries), prepared.settings.resolution)
    missing = [piece for piece in pieces if not is_whole(folder / piece.name)]
    state.wait_for_everyone()  # all have looked, before anyone writes
    share = missing[state.process_index :: state.num_processes]
    generate_pieces(prepared, entries, share, sampling, folder)
    state.wait_for_everyone()
    on_main_process(lambda: finish_folder(folder, pieces, entries, len(prompts)))


def finish_folder(folder: Path, pieces: list[Piece], entries: list[dict], num_prompts: int) -> None:
    """metadata.jsonl for single files, grid.png, and in sampling.json the digest of the set, so
    that no other is taken for it.

    Raises:
        UsageError: it was whole before, and its images are not those that were drawn; or files lie
            among them that were never drawn.
    """
    record = folder / SAMPLING_SETTINGS
    settings = read_json(record)
    drawn = {folder / piece.name for piece in pieces} | {folder / METADATA}
    if others := [path for path in list_set(folder) if path not in drawn]:
        raise UsageError(f"{others[0]} lies among the images, and was not drawn: move it away")
    if SET_DIGEST in settings and settings[SET_DIGEST] != hash_set(folder):
        raise UsageError(
            f"{folder} holds other images than were drawn: remove it, and draw it anew"
        )
    if pieces[0].name.endswith(".png"):
        write_metadata(folder, entries)
    save_grid(folder, pieces, min(num_prompts, 10) if num_prompts > 1 else 8)
    write_durably(record, json.dumps(settings | {SET_DIGEST: hash_set(folder)}, indent=2) + "\n")


def write_metadata(folder: Path, entries: list[dict]) -> None:
    """metadata.jsonl, as `datasets` reads it, of a folder of images."""
    lines = [json.dumps({"file_name": f"{i:06}.png", **entry}) for i, entry in enumerate(entries)]
    write_durably(folder / METADATA, "\n".join(lines) + "\n")


def save_grid(folder: Path, pieces: list[Piece], columns: int) -> None:
    """grid.png: the first images of a set, up to ten rows of them."""
    first = islice(read_pieces(folder, pieces), 10 * columns)
    images = [Image.open(io.BytesIO(content)) for content in first]
    tile_images(images, columns).save(folder / GRID)


def generate_pieces(
    prepared: Generation,
    entries: list[dict],
    pieces: list[Piece],
    sampling: SamplingArguments,
    folder: Path,
) -> None:
    """Generate image i from entry i, for those of the given pieces; files are whole or absent.

    Images are compressed and written while the next batch is generated.
    """
    indices = [i for piece in pieces for i in piece.images]
    is_main = PartialState().is_local_main_process
    bar = tqdm(total=len(indices), desc="images", disable=not is_main)
    waiting, pngs, writing = deque(pieces), {}, []
    with ThreadPoolExecutor(2) as pool:

        def write(piece: Piece, waited_for: list[Future]) -> None:
            write_piece(folder, piece, [png.result() for png in waited_for], entries)

        at_once = sampling.batch_size or images_at_once(prepared.settings.resolution)
        for start in range(0, len(indices), at_once):
            part = indices[start : start + at_once]
            texts, pipeline = [entries[i]["text"] for i in part], prepared.pipeline
            images = generate(pipeline, texts, part, sampling.seed, prepared.settings)
            for written in writing:
                written.result()
            pngs |= {
                i: pool.submit(encode_png, image) for i, image in zip(part, images, strict=True)
            }
            writing = []
            while waiting and waiting[0].images[-1] in pngs:
                piece = waiting.popleft()
                writing.append(pool.submit(write, piece, [pngs.pop(i) for i in piece.images]))
            bar.update(len(part))
        for written in writing:
            written.result()
    bar.close()


def encode_png(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, format="PNG")
    return content.getvalue()
