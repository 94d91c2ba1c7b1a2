"""Synthetic images as a dataset on the Hub."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, Features, Image, Value
from huggingface_hub import hf_hub_download
from tqdm import tqdm

from utils.cards import Maker, dataset_card
from utils.errors import UsageError
from utils.evaluation_card import with_section
from utils.hub import HUB_ERRORS, RepositoryArguments, make_repo, upload
from utils.verification import problems_of, problems_of_statement, read_source

IMAGES_PER_SHARD, BYTES_PER_SHARD = 10_000, 2**28


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
        files, count = write_shards(folder, Path(aside))
        card = dataset_card(made_by, count, repo_id, args.hub_license)
        files["README.md"] = with_section(card, section).encode()
        files["grid.png"] = folder / "grid.png"
        if made_by.statement is not None:
            files["privacy.json"] = (json.dumps(made_by.statement, indent=2) + "\n").encode()
        finish = f"the same command again: the images in {folder} are not drawn anew"
        return upload(repo_id, files, args, "dataset", finish)


def write_shards(folder: Path, output: Path) -> tuple[dict[str, Path | bytes], int]:
    """The images and their metadata as parquet files, {path in the repository: path here}; and how
    many images there are."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    columns = [column for column in ("text", "label") if column in entries[0]]
    features = Features({"image": Image(), **{column: Value("string") for column in columns}})
    parts, size = [[]], 0
    for entry in entries:
        own = (folder / entry["file_name"]).stat().st_size
        if len(parts[-1]) == IMAGES_PER_SHARD or (parts[-1] and size + own > BYTES_PER_SHARD):
            parts.append([])
            size = 0
        parts[-1].append(entry)
        size += own
    files = {}
    for shard, part in enumerate(tqdm(parts, "writing parquet files", leave=False)):
        names = [entry["file_name"] for entry in part]
        rows = {"image": [{"bytes": (folder / n).read_bytes(), "path": n} for n in names]}
        rows |= {column: [entry[column] for entry in part] for column in columns}
        name = f"train-{shard:05}-of-{len(parts):05}.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(output / name)
        files[f"data/{name}"] = output / name
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
