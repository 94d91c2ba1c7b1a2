"""Synthetic images as a dataset on the Hub."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

from datasets import Dataset, Features, Image, Value
from huggingface_hub import hf_hub_download

from utils.arguments import ModelArguments
from utils.cards import dataset_card
from utils.errors import UsageError
from utils.generation import SamplingArguments
from utils.hub import RepositoryArguments, make_repo, upload, write_durably
from utils.verification import problems_of_statement

IMAGES_PER_SHARD = 10_000


def statement_of(sampling: SamplingArguments) -> dict | None:
    """The privacy statement of the adapter, from its folder or the Hub; None without an adapter.

    Raises:
        UsageError: it has none, or one that does not hold: its images are not to be published.
    """
    if sampling.adapter is None:
        return None
    path = Path(sampling.adapter) / "privacy.json"
    try:
        if not Path(sampling.adapter).is_dir():
            path = hf_hub_download(
                sampling.adapter, "privacy.json", revision=sampling.adapter_revision
            )
        statement = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(
            f"--push_to_hub: '{sampling.adapter}' has no privacy.json, so nobody can tell what its "
            f"images give away: {error}"
        ) from error
    problems = problems_of_statement(statement)
    if problems:
        raise UsageError(f"images of '{sampling.adapter}' are not published: {problems[0]}")
    return statement


def publish_images(
    folder: Path,
    model: ModelArguments,
    sampling: SamplingArguments,
    statement: dict | None,
    name: str,
    args: RepositoryArguments,
) -> str:
    """Upload a folder of `draw_folder` as parquet shards, with a card; returns the address.

    Raises:
        UsageError: see `make_repo` and `upload`.
    """
    repo_id = make_repo(name, args, "dataset")
    with TemporaryDirectory(dir=folder) as aside:
        files = write_shards(folder, Path(aside))
        card = dataset_card(
            model.pretrained_model_name_or_path,
            sampling.adapter,
            statement,
            sampling.num_images,
            repo_id,
            args.hub_license,
        )
        files |= {"README.md": Path(aside) / "README.md", "grid.png": folder / "grid.png"}
        write_durably(files["README.md"], card)
        finish = f"the same command again: the images in {folder} are not drawn anew"
        return upload(repo_id, files, args, "dataset", finish)


def write_shards(folder: Path, output: Path) -> dict[str, Path]:
    """The images and their metadata as parquet files: {path in the repository: path here}."""
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    shards = -(-len(entries) // IMAGES_PER_SHARD)
    columns = [column for column in ("text", "label") if column in entries[0]]
    features = Features({"image": Image(), **{column: Value("string") for column in columns}})
    files = {}
    for shard in range(shards):
        part = entries[shard * IMAGES_PER_SHARD : (shard + 1) * IMAGES_PER_SHARD]
        names = [entry["file_name"] for entry in part]
        rows = {"image": [{"bytes": (folder / n).read_bytes(), "path": n} for n in names]}
        rows |= {column: [entry[column] for entry in part] for column in columns}
        name = f"train-{shard:05}-of-{shards:05}.parquet"
        Dataset.from_dict(rows, features=features).to_parquet(output / name)
        files[f"data/{name}"] = output / name
    return files
