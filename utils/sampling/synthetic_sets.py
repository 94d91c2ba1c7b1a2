"""Synthetic images as a dataset on the Hub; and the privacy statement that came with a set."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm import tqdm

from utils.arguments.publishing import RepositoryArguments
from utils.errors import UsageError
from utils.files import CARD, GRID, METADATA, SAMPLING_SETTINGS, STATEMENT
from utils.hub.cards import Maker, build_dataset_card
from utils.hub.evaluation_card import insert_section
from utils.hub.upload import HUB_ERRORS, make_repo, upload
from utils.ledger.verification import check_statement, find_problems, read_source
from utils.sampling.shards import plan_shards, write_piece


def read_verified_statement(adapter: Path) -> dict:
    """The privacy statement of an adapter whose images are to be published.

    Raises:
        UsageError: it has none, or one that does not hold for the weights beside it.
    """
    if not (adapter / STATEMENT).is_file():
        raise UsageError(
            f"--push_to_hub: {adapter} has no privacy.json, so nobody can tell what its images "
            "give away"
        )
    source = read_source(str(adapter), None)
    problems = find_problems(source)
    if problems:
        raise UsageError(f"images of {adapter} are not published: {'; '.join(problems)}")
    return source.statement


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
    with TemporaryDirectory(dir=folder) as aside:
        files, count = collect_shards(folder, Path(aside))
        card = build_dataset_card(made_by, count, repo_id, args.hub_license)
        files[CARD] = insert_section(card, section).encode()
        files[GRID] = folder / GRID
        if made_by.statement is not None:
            files[STATEMENT] = (json.dumps(made_by.statement, indent=2) + "\n").encode()
        finish = f"the same command again: the images in {folder} are not generated anew"
        return upload(repo_id, files, args, "dataset", finish)


def collect_shards(folder: Path, aside: Path) -> tuple[dict[str, Path | bytes], int]:
    """The set as parquet files, {path in the repository: path here}, and how many images there are;
    shards that are not there yet are written to `aside`."""
    shards = sorted((folder / "data").glob("train-*.parquet"))
    if shards:
        files = {f"data/{path.name}": path for path in shards}
        return files, sum(pq.read_metadata(path).num_rows for path in shards)
    entries = [json.loads(line) for line in (folder / METADATA).read_text().splitlines()]
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
        UsageError: the statement does not hold.
    """
    folder, known = Path(images), {"std": None, "covered_by_epsilon": True}
    statement = None
    if (folder / STATEMENT).is_file():
        statement = json.loads((folder / STATEMENT).read_text())
    elif not folder.is_dir():
        try:
            path = hf_hub_download(images, STATEMENT, repo_type="dataset", revision=revision)
            statement = json.loads(Path(path).read_text())
        except HUB_ERRORS:
            pass  # not there, or not to be had: then nothing is promised
    if statement is not None:
        problems = check_statement(statement) if statement["private"] else []
        if problems:
            raise UsageError(f"the privacy.json of {images} does not hold: {'; '.join(problems)}")
        entry = {"value": statement["epsilon"]["add_or_remove_one"], **known}
        return statement, {
            "epsilon": entry | {"delta": statement["delta"], "weights": statement["files"]}
        }
    record = folder / SAMPLING_SETTINGS
    if record.is_file() and json.loads(record.read_text())["adapter"] is None:
        return None, {"epsilon": {"value": 0.0, **known}}
    return None, {}
