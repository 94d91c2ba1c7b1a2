"""Uploads to the Hugging Face Hub: of exactly the files that are meant, verified first."""

import json
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard

from utils.arguments.publishing import HubArguments, MetricsArguments, RepositoryArguments
from utils.errors import UsageError
from utils.files import (
    CARD,
    GRID,
    PRIVATE,
    SAMPLE,
    SAMPLE_DIGESTS,
    SAMPLES,
    SAMPLING_SETTINGS,
    SIGNATURE,
    STATEMENT,
    hash_file,
    private_folder,
)
from utils.hub.cards import PLACEHOLDER
from utils.hub.collection import find_collection, join_collection
from utils.hub.evaluation_card import build_evaluation_section, insert_section
from utils.hub.failures import HUB_ERRORS, explain, is_temporary
from utils.ledger.signatures import check_signature
from utils.ledger.verification import WEIGHT_SUFFIXES, find_problems, read_source
from utils.models.drawing import read_settings

# What an earlier upload may have left, of a model or a synthetic set.
OURS = re.compile(
    rf"data/train-.*\.parquet|samples/{SAMPLE}|(privacy|sampling)\.json|grid\.png|"
    r"privacy\.json\.sig|(unet|transformer)/.*|"
    r"adapter_(config\.json|model\.safetensors)|(loda|pipeline)\.py|"
    r"pytorch_lora_weights\.safetensors"
)
DATA = re.compile(r".*\.(parquet|arrow|csv|tsv|jsonl|zip|tar|gz)")
WEIGHTS = re.compile(rf"model_index\.json|.*({'|'.join(map(re.escape, WEIGHT_SUFFIXES))})")
ATTEMPTS = 4


def make_repo(name: str, args: RepositoryArguments, repo_type: str = "model") -> str:
    """Create a repository, unless it exists, and the collection that it is to join; returns its
    full name, USER/NAME.

    Raises:
        UsageError: the Hub cannot be reached, or refuses the name or the token; or there is such a
            repository, and it holds what no upload left, or everyone may see it against
            `--hub_private_repo`.
    """
    api = HfApi(token=args.hub_token)
    try:
        address = api.create_repo(
            name, repo_type=repo_type, private=args.hub_private_repo or None, exist_ok=True
        )
        _check_free(api.list_repo_files(address.repo_id, repo_type=repo_type), name, repo_type)
        is_private = api.repo_info(address.repo_id, repo_type=repo_type).private
    except HUB_ERRORS as error:
        raise UsageError(f"cannot make the repository '{name}': {explain(error)}") from error
    if args.hub_private_repo and not is_private:
        raise UsageError(
            f"the repository '{name}' is there already, and public: make it private in its "
            "settings, or leave --hub_private_repo out"
        )
    if args.hub_collection is not None:
        find_collection(address.repo_id, args)
    return address.repo_id


def _check_free(published: list[str], name: str, repo_type: str) -> None:
    """Raises: UsageError if an upload would remove what no earlier one left, or, in a dataset, lie
    beside it and pass its card on to it."""
    others = [file for file in published if file not in (CARD, ".gitattributes")]
    read = DATA if repo_type == "dataset" else WEIGHTS
    foreign = [file for file in others if read.fullmatch(file) and not OURS.fullmatch(file)]
    if foreign or others and not {STATEMENT, GRID} & set(others):
        raise UsageError(
            f"the repository '{name}' is there already, and holds {(foreign or others)[0]}, which "
            "no upload from here left: name another one"
        )


def check_license(license: str | None) -> None:
    """Raises: UsageError if the Hub knows no such licence."""
    if license is None:
        return
    try:
        ModelCard(f"---\nlicense: {license}\n---\n").validate()
    except HUB_ERRORS as error:
        raise UsageError(f"--hub_license {license}: {explain(error)}") from error


def list_files_to_publish(output_dir: Path) -> dict[str, Path | bytes]:
    """The files of a finished run that are published, by their path in the repository; no others.

    The weights that the statement accounts for, the statement, the card, and the samples.

    Raises:
        UsageError: it is a set; the run is not finished, a file is missing or leads elsewhere, or
            sampling.json says something else than how to draw.
    """
    if (output_dir / GRID).is_file():
        raise UsageError(
            f"{output_dir} is a synthetic set, and no model: the command that made it, with "
            "--push_to_hub, publishes it; only what release_means.py drew is not published"
        )
    statement = output_dir / STATEMENT
    if not statement.is_file():
        raise UsageError(f"{output_dir} holds no privacy.json: there is nothing to publish")
    names = [*json.loads(statement.read_text()).get("files", {}), STATEMENT, CARD]
    names += [SAMPLING_SETTINGS] if read_settings(output_dir) else []
    if (output_dir / SIGNATURE).exists():
        _, problems = check_signature(output_dir, None)
        if problems:
            raise UsageError(f"{output_dir}: {problems[0]}: sign it again, or remove {SIGNATURE}")
        names.append(SIGNATURE)
    names += [f"{SAMPLES}/{name}" for name in _list_samples(output_dir)]
    for name in names:
        path = output_dir / name
        if not path.is_file():
            raise UsageError(f"{output_dir} lacks {name}: the run is not finished")
        inside = path.resolve() == output_dir.resolve() / name  # no link, no .., no absolute path
        if not inside or PRIVATE in Path(name).parts:
            raise UsageError(f"{path} leads out of what is published: it is not uploaded")
    return {name: output_dir / name for name in names}


def _list_samples(output_dir: Path) -> list[str]:
    """The images in samples/, all of which the run generated.

    Raises:
        UsageError: one is not as it was generated: it may show anything, also a private image.
    """
    folder, record = output_dir / SAMPLES, private_folder(output_dir) / SAMPLE_DIGESTS
    if not folder.is_dir():
        return []
    generated = json.loads(record.read_text()) if record.is_file() else {}
    names = sorted(path.name for path in folder.iterdir() if re.fullmatch(SAMPLE, path.name))
    for name in names:
        path = folder / name
        if path.is_file() and not path.is_symlink() and generated.get(name) != hash_file(path):
            raise UsageError(f"{path} is not an image that this run generated: remove it first")
    return names


def prepare_model(
    output_dir: Path, metrics: MetricsArguments
) -> tuple[dict[str, Path | bytes], dict]:
    """Verify a finished run; what it publishes, its card with the evaluation, and its statement.

    Raises:
        UsageError: it does not verify, or see `list_files_to_publish` and
            `build_evaluation_section`.
    """
    files = list_files_to_publish(output_dir)
    source = read_source(str(output_dir), None)
    problems = find_problems(source)
    if problems:
        raise UsageError(f"{output_dir} is not published: {'; '.join(problems)}")
    section = build_evaluation_section(metrics, source.statement)
    files[CARD] = insert_section(files[CARD].read_text(encoding="utf-8"), section).encode()
    return files, source.statement


def publish_model(
    output_dir: Path, args: HubArguments, metrics: MetricsArguments | None = None
) -> str:
    """Upload what a finished run publishes; returns the address of the commit.

    Raises:
        UsageError: see `prepare_model`, `make_repo` and `upload`.
    """
    files, statement = prepare_model(output_dir, metrics or MetricsArguments())
    repo_id = make_repo(args.hub_model_id, args)
    files[CARD] = files[CARD].replace(PLACEHOLDER.encode(), repo_id.encode())
    command = ["python", "push_to_hub.py", "--output_dir", output_dir, "--hub_model_id", repo_id]
    if args.hub_collection is not None:
        command += ["--hub_collection", args.hub_collection]
    if metrics is not None and metrics.metrics_file is not None:
        command += ["--metrics_file", metrics.metrics_file]
        command += ["--publish_private_metrics"] if metrics.publish_private_metrics else []
    finish = shlex.join(map(str, command))
    address = upload(repo_id, files, args, "model", finish)
    if args.hub_collection is not None:
        join_collection(repo_id, "model", statement, args, finish)
    return address


def upload(
    repo_id: str,
    files: dict[str, Path | bytes],
    args: RepositoryArguments,
    repo_type: str,
    finish: str,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """Upload `files`, {path in the repository: path here, or content}, in one commit, which also
    removes what an earlier upload left beside them; returns its address.

    Doing it again is safe. After a temporary failure it waits and tries again, a few times.

    Args:
        finish: the command that tries again, for the message.

    Raises:
        UsageError: it did not work; what is here is whole, and the message has the command that
            finishes it.
    """
    api = HfApi(token=args.hub_token)
    for attempt in range(ATTEMPTS):
        try:
            ModelCard(files[CARD].decode()).validate(repo_type=repo_type)
            published = api.list_repo_files(repo_id, repo_type=repo_type)
            operations = [CommitOperationAdd(name, _to_add(file)) for name, file in files.items()]
            operations += [
                CommitOperationDelete(name)
                for name in published
                if OURS.fullmatch(name) and name not in files
            ]
            return api.create_commit(
                repo_id, operations, commit_message="Publish", repo_type=repo_type
            ).commit_url
        except HUB_ERRORS as error:
            if attempt == ATTEMPTS - 1 or not is_temporary(error):
                raise UsageError(
                    f"the upload to {repo_id} failed: {explain(error)}. All files are safe here; "
                    f"to publish them:\n{finish}"
                ) from error
            wait(2.0**attempt)
    raise AssertionError("unreachable")


def _to_add(file: Path | bytes) -> str | bytes:
    return file if isinstance(file, bytes) else str(file)
