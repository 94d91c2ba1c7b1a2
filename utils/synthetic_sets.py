"""Synthetic images as a dataset on the Hub."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet as pq
from huggingface_hub import hf_hub_download
from PIL import Image
from tqdm import tqdm

from utils.cards import Maker, dataset_card
from utils.errors import UsageError
from utils.evaluation_card import with_section
from utils.hub import HUB_ERRORS, RepositoryArguments, make_repo, upload
from utils.shards import shard_pieces, write_piece
from utils.verification import problems_of, problems_of_statement, read_source


def statement_of(adapter: Path) -> dict:
    """The privacy statement of an adapter whose images are to be published.

    Raises:
        UsageError: it has none, or one that does not hold for the weights beside it.
    """
    if not (adapter / "privacy.json").is_file():
        raise UsageError(
            f"--push_to_hub: {adapter} has no privacy.json, so nobody can tell what its images "
            "give away"
        )
    source = read_source(str(adapter), None)
    problems = problems_of(source)
    if problems:
        raise UsageError(f"images of {adapter} are not published: {'; '.join(problems)}")
    return source.statement


def publish_images(
    folder: Path, made_by: Maker, name: str, args: RepositoryArguments, section: str = ""
) -> str:
    """Upload a folder of `draw_folder` as parquet shards, with a card and the adapter's statement;
    returns the address. Shards of an earlier set are replaced. `section` goes on the card.

    Raises:
        UsageError: see `make_repo` and `upload`.
    """
    repo_id = make_repo(name, args, "dataset")
    with TemporaryDirectory(dir=folder) as aside:
        files, count = shards_of(folder, Path(aside))
        card = dataset_card(made_by, count, repo_id, args.hub_license)
        files["README.md"] = with_section(card, section).encode()
        files["grid.png"] = folder / "grid.png"
        if made_by.statement is not None:
            files["privacy.json"] = (json.dumps(made_by.statement, indent=2) + "\n").encode()
        finish = f"the same command again: the images in {folder} are not drawn anew"
        return upload(repo_id, files, args, "dataset", finish)


def shards_of(folder: Path, aside: Path) -> tuple[dict[str, Path | bytes], int]:
    """The set as parquet files, {path in the repository: path here}, and how many images there are;
    shards that are not there yet are written to `aside`."""
    there = sorted((folder / "data").glob("train-*.parquet"))
    if there:
        files = {f"data/{path.name}": path for path in there}
        return files, sum(pq.read_metadata(path).num_rows for path in there)
    entries = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    with Image.open(folder / entries[0]["file_name"]) as first:
        resolution = max(first.size)
    files = {}
    for piece in tqdm(shard_pieces(len(entries), resolution), "writing parquet files", leave=False):
        pngs = [(folder / entries[i]["file_name"]).read_bytes() for i in piece.images]
        write_piece(aside, piece, pngs, entries)
        files[piece.name] = aside / piece.name
    return files, len(entries)


def privacy_of(images: str, revision: str | None) -> tuple[dict | None, dict]:
    """The privacy statement that came with a synthetic set, a folder or a Hub id, or None; and its
    entry in metrics.json: epsilon for adding or removing one unit; 0 for the images of a public
    model alone; nothing where it is not known.

    Raises:
        UsageError: the statement does not hold.
    """
    folder, known = Path(images), {"std": None, "covered_by_epsilon": True}
    statement = None
    if (folder / "privacy.json").is_file():
        statement = json.loads((folder / "privacy.json").read_text())
    elif not folder.is_dir():
        try:
            path = hf_hub_download(images, "privacy.json", repo_type="dataset", revision=revision)
            statement = json.loads(Path(path).read_text())
        except HUB_ERRORS:
            pass  # not there, or not to be had: then nothing is promised
    if statement is not None:
        problems = problems_of_statement(statement) if statement["private"] else []
        if problems:
            raise UsageError(f"the privacy.json of {images} does not hold: {'; '.join(problems)}")
        entry = {"value": statement["epsilon"]["add_or_remove_one"], **known}
        return statement, {
            "epsilon": entry | {"delta": statement["delta"], "weights": statement["files"]}
        }
    record = folder / "sampling.json"
    if record.is_file() and json.loads(record.read_text())["adapter"] is None:
        return None, {"epsilon": {"value": 0.0, **known}}
    return None, {}
