"""Synthetic images as a dataset on the Hub; and the privacy statement that came with a set."""

import json
import shutil
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from utils.arguments.publishing import RepositoryArguments
from utils.errors import UsageError
from utils.files import (
    CARD,
    GRID,
    METADATA,
    SAMPLING_SETTINGS,
    STATEMENT,
    explain_disk_errors,
    make_private,
    private_folder,
    write_durably,
)
from utils.hub.cards import Maker, build_dataset_card
from utils.hub.collection import join_collection
from utils.hub.evaluation_card import insert_section
from utils.hub.upload import make_repo, upload
from utils.ledger.checks import check_statement
from utils.ledger.public_sets import IS_PUBLIC
from utils.ledger.runs import Run
from utils.ledger.statement import quote_total, write_statement
from utils.ledger.verification import fetch_statement, read_json
from utils.sampling.generation import (
    ADAPTER_FILES,
    SET_DIGEST,
    save_grid,
    write_metadata,
)
from utils.sampling.shards import SET, hash_set, plan_image_files, plan_shards, write_piece

UNKNOWN_IMAGES = (
    "has a privacy.json, but no sampling.json that says which images it is about, so their epsilon "
    "is taken as unknown: of a set of the Hub, name its id; else give its sample.py command again"
)


def write_set(
    run: Run,
    step: int,
    entries: list[dict],
    images: Iterable[tuple[int, bytes]],
    settings: dict,
    columns: int,
) -> None:
    """Write the synthetic set of a run, whose statement is published, into its folder `set`, as
    sample.py leaves one; the ledger notes what it holds. Doing it again is safe.

    Args:
        step: the last of the run. entries: `text`, and perhaps `label`, of every image.
        images: (number, PNG), in any order. settings: its sampling.json. columns: of grid.png.

    Raises:
        UsageError: the disk does not take it.
    """
    folder = run.output_dir / SET
    run.branch.release(step, SET)
    statement = read_json(run.output_dir / STATEMENT)
    digest = write_files(folder, statement, entries, images, settings, columns)
    run.branch.wrote(step, SET, {SET: digest})


def write_files(
    folder: Path,
    statement: dict,
    entries: list[dict],
    images: Iterable[tuple[int, bytes]],
    settings: dict,
    columns: int,
) -> str:
    """The files of a set, anew: its images, metadata.jsonl, grid.png, the statement that covers
    them, and last sampling.json, with the digest of the set, which is returned. See `write_set`.

    Raises:
        UsageError: the disk does not take it.
    """
    pieces = plan_image_files(len(entries))
    with explain_disk_errors(folder.parent):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        write_statement(statement, folder)
        for number, png in images:
            write_piece(folder, pieces[number], [png], entries)
        write_metadata(folder, entries)
        save_grid(folder, pieces, columns)
        settings = settings | {IS_PUBLIC: False, SET_DIGEST: (digest := hash_set(folder))}
        write_durably(folder / SAMPLING_SETTINGS, json.dumps(settings, indent=2) + "\n")
    return digest


def publish_images(
    folder: Path, made_by: Maker, name: str, args: RepositoryArguments, section: str = ""
) -> str:
    """Upload a folder of `generate_folder` as parquet shards, with a card and the adapter's
    statement; returns the address. Shards of an earlier set are replaced.

    Args:
        section: put on the card (`build_evaluation_section`).

    Raises:
        UsageError: see `make_repo` and `upload`.
    """
    repo_id = make_repo(name, args, "dataset")
    hidden = make_private(private_folder(folder))  # no part of the set, if this is killed
    with TemporaryDirectory(dir=hidden) as aside:
        files, count = collect_shards(folder, Path(aside))
        card = build_dataset_card(made_by, count, repo_id, args.hub_license)
        files[CARD] = insert_section(card, section).encode()
        files[GRID] = folder / GRID
        if made_by.statement is not None:
            files[STATEMENT] = (json.dumps(made_by.statement, indent=2) + "\n").encode()
        finish = f"the same command again: the images in {folder} are not generated anew"
        address = upload(repo_id, files, args, "dataset", finish)
    with suppress(OSError):  # there may be results of an evaluation
        hidden.rmdir()
    if args.hub_collection is not None:
        join_collection(repo_id, "dataset", made_by.statement, args, finish)
    return address


def collect_shards(folder: Path, aside: Path) -> tuple[dict[str, Path | bytes], int]:
    """The set as parquet files, {path in the repository: path here}, and how many images there are;
    shards that are not there yet are written to `aside`."""
    shards = sorted((folder / "data").glob("train-*.parquet"))
    if shards:
        files = {f"data/{path.name}": path for path in shards}
        return files, sum(pq.read_metadata(path).num_rows for path in shards)
    entries = [json.loads(line) for line in (folder / METADATA).read_text().split("\n") if line]
    with Image.open(folder / entries[0]["file_name"]) as first:
        resolution = max(first.size)
    files = {}
    for piece in tqdm(plan_shards(len(entries), resolution), "writing parquet files", leave=False):
        pngs = [(folder / entries[i]["file_name"]).read_bytes() for i in piece.images]
        write_piece(aside, piece, pngs, entries)
        files[piece.name] = aside / piece.name
    return files, len(entries)


def read_privacy(images: str, revision: str | None) -> tuple[dict | None, dict]:
    """The privacy statement that came with a synthetic set, a folder or a Hub id, or None; and its
    entry in metrics.json: epsilon for adding or removing one unit; 0 for the images of a public
    model alone; nothing where it is not known.

    Raises:
        UsageError: the statement does not hold, or is not about the weights that made the images,
            or a folder's images are others.
    """
    known, record = {"std": None, "covered_by_epsilon": True}, Path(images) / SAMPLING_SETTINGS
    settings = read_json(record) if record.is_file() else {}
    statement, _ = fetch_statement(images, revision, "dataset")
    if statement is None:
        public = settings.get(IS_PUBLIC, False)  # of a Hub that was not reached: not known
        return None, {"epsilon": {"value": 0.0, **known}} if public else {}
    is_private = statement.get("private") is not False
    problems = check_statement(statement) if is_private else []
    if Path(images).is_dir() and is_private and not problems:
        if SET_DIGEST not in settings:
            if PartialState().is_main_process:
                print(f"warning: {images} {UNKNOWN_IMAGES}", file=sys.stderr)
            return None, {}
        if settings[SET_DIGEST] != hash_set(Path(images)):
            problems.append("its images, or files among them, are not those that were drawn")
    made_by, files = settings.get(ADAPTER_FILES, {}), statement.get("files", {})
    if any(made_by.get(name, digest) != digest for name, digest in files.items()):
        problems.append("it is about other weights than those that made the images")
    if problems:
        raise UsageError(f"the privacy.json of {images} does not hold: {'; '.join(problems)}")
    epsilon, delta = None, statement.get("delta")  # NOT PRIVATE, whatever else it claims
    if is_private:
        epsilon, delta = quote_total(statement)
    return statement, {"epsilon": {"value": epsilon, **known, "delta": delta, "weights": files}}
