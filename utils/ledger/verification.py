"""Does a privacy statement hold? Recompute it, and compare it with the files and the ledger."""

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path

import httpx2
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from utils.errors import UsageError
from utils.fetching import fetch_file
from utils.files import (
    CARD,
    CHECKPOINTS,
    DENOISERS,
    LEDGER,
    MEANS,
    PRIVATE,
    PUBLISHED,
    SAMPLE,
    STATEMENT,
    hash_file,
)
from utils.ledger.charges import compose_with_bases, summarise_runs
from utils.ledger.checks import check_checkpoints, check_ledger, check_records, check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.runs import FIRST_MEANS
from utils.ledger.statement import list_all_events, quote_total
from utils.privacy.accounting import account, membership_power, pld_epsilon, quote, split_budget

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHT_SUFFIXES += (".npz", ".npy", ".onnx", ".gguf", ".msgpack", ".h5")
FIRST_RELEASE = f"{FIRST_MEANS}/{MEANS}"  # of a stage in a run's own folder
# Read by a loader before the weights beside it, or instead of them.
READ_FIRST = re.compile(rf"({'|'.join(DENOISERS)})/.*|(.*/)?[^/]*\.index\.json")
# What a repository may hold beside the files of its statement.
HARMLESS = re.compile(
    rf"(privacy|sampling)\.json|privacy\.json\.sig|README\.md|\.gitattributes|samples/{SAMPLE}"
)


@dataclass(frozen=True)
class Source:
    """What a path or Hub id holds: a statement, a ledger, or both."""

    folder: Path | None
    statement: dict | None
    ledger: Ledger | None
    extras: tuple[str, ...] = ()  # files there that the statement must account for

    def delta(self) -> float:
        """The delta at which `events` are quoted: the smallest of those behind them."""
        return self._compose()[1]

    def events(self) -> list[dict]:
        """All that the ledger, or else the statement, has; after what is behind base models."""
        return self._compose()[0]

    def is_private(self) -> bool:
        """Whether no run of the ledger, nor the statement, is stamped NOT PRIVATE."""
        records = [] if self.ledger is None else self.ledger.records()
        stamps = [record["private"] for record in records if record["kind"] == "reserve"]
        return all([*stamps, (self.statement or {}).get("private", True)])

    def _compose(self) -> tuple[list[dict], float]:
        statement = self.statement or {"events": []}
        base = statement.get("base")
        if self.ledger is not None:
            events, delta = compose_with_bases(self.ledger.records(), base)
        else:
            events, delta = list_all_events(statement), (base or statement)["delta"]
        return events, min(delta, statement.get("delta", delta if events else 0.0))


def read_source(name: str, revision: str | None) -> Source:
    """Find what `name` stands for.

    Raises:
        UsageError: there is neither a statement nor a ledger.
    """
    path = Path(name)
    if path.suffix == ".jsonl" and path.is_file():
        return Source(None, None, Ledger(path))
    if path.suffix == ".json" and path.is_file():
        return Source(None, read_json(path), None)
    if path.is_dir():
        names = _list_readable(path)
        loaded = [
            name
            for name in names
            if name.lower().endswith(WEIGHT_SUFFIXES) or READ_FIRST.fullmatch(name)
        ]
        extras = [n for n in loaded if n != FIRST_RELEASE or not _is_accounted_for(path / n)]
    else:
        path, names = _download(name, revision)
        extras = [name for name in names if not HARMLESS.fullmatch(name)]
    statement, ledger = path / STATEMENT, path / PRIVATE / LEDGER
    if not statement.exists() and not ledger.exists():
        raise UsageError(f"{name} holds no privacy.json and no ledger")
    return Source(
        path,
        read_json(statement) if statement.exists() else None,
        Ledger(ledger) if ledger.exists() else None,
        tuple(extras),
    )


def _list_readable(folder: Path) -> list[str]:
    """The files of a folder that a loader may read, by name, also behind links: all but those in
    private folders, of which the denoiser's has none."""
    names = []
    for place, folders, files in os.walk(folder, followlinks=True):
        inside, above = Path(place).relative_to(folder), Path(place).parents
        is_private = PRIVATE in inside.parts and inside.parts[0] not in DENOISERS
        if is_private or Path(place).resolve() in {p.resolve() for p in above}:  # a link upwards
            folders.clear()
            continue
        names += [(inside / name).as_posix() for name in files]
    return sorted(names)


def _is_accounted_for(file: Path) -> bool:
    """Whether a file of an earlier stage is in the statement beside it, and that holds."""
    path = file.parent / STATEMENT
    if not path.is_file():
        return False
    statement = read_json(path)
    return not check_statement(statement) and statement["files"].get(file.name) == hash_file(file)


def _download(name: str, revision: str | None) -> tuple[Path, list[str]]:
    """One commit: what is needed of it, downloaded, and the names of all its files.

    Offline, what was downloaded before is all that is known.
    """
    try:
        try:
            information = HfApi().model_info(name, revision=revision)
            revision, names = information.sha, [file.rfilename for file in information.siblings]
        except (OfflineModeIsEnabled, httpx2.TransportError):
            names = None
        path = Path(snapshot_download(name, revision=revision, allow_patterns=PUBLISHED))
    except (OSError, ValueError, httpx2.HTTPError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"'{name}' is not a file, folder or Hub id: {reason}") from error
    if names is None:
        names = [str(p.relative_to(path)) for p in sorted(path.rglob("*")) if p.is_file()]
    return path, names


def fetch_statement(
    name: str, revision: str | None = None, repo_type: str = "model"
) -> tuple[dict | None, bool]:
    """The privacy.json of a folder or Hub id, unverified, or None; and whether its absence is
    known: a Hub that cannot be reached tells nothing.

    Raises:
        UsageError: it is not valid JSON.
    """
    path, is_known = fetch_file(name, STATEMENT, revision, repo_type)
    return (None if path is None else read_json(path)), is_known


def find_changed(statement: dict, folder: Path) -> list[str]:
    """The files of a folder that have the names, but not the weights, that were paid for. A LoRA
    that was merged into a model is no file there, so that nobody can tell."""
    paid = statement["files"].items()
    there = [(name, digest) for name, digest in paid if (folder / name).is_file()]
    wrong = [name for name, digest in there if hash_file(folder / name) != digest]
    return [f"{name} is not the file that was paid for" for name in wrong]


def read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise UsageError(f"{path} is not a privacy statement")
    return content


def find_problems(source: Source) -> list[str]:
    """Everything that is wrong with a source: a sentence each; none if it verifies."""
    problems = []
    try:
        if source.statement is not None:
            problems += check_statement(source.statement)
        if source.folder is not None and not problems:
            problems += check_files(source.statement or {"files": {}}, source)
            problems += check_card(source.statement, source.folder)
        private = source.folder is not None and (source.folder / PRIVATE).is_dir()
        if source.ledger is None and private:
            problems.append("the ledger is missing from private/")
        if source.ledger is not None:
            problems += _check_with_ledger(source)
    except UsageError as error:
        problems.append(str(error))
    except (KeyError, TypeError, AttributeError) as error:
        problems.append(f"the statement or the ledger is malformed: {error!r}")
    return problems


def describe_verified(source: Source) -> list[str]:
    """What is now known of a source without problems: a sentence each."""
    statement, sentences = source.statement, []
    if statement is not None:
        epsilon = statement["epsilon"]
        sentences.append(
            f"ok: epsilon {quote(epsilon['add_or_remove_one'])} at delta {statement['delta']:g} "
            f"(replace one: {quote(epsilon['replace_one'])}) follows from the events of "
            "the statement"
        )
    if statement is not None and "base" in statement:
        total, delta = quote_total(statement)
        sentences.append(
            f"ok: its base model is a private result, too: together epsilon {quote(total)} at "
            f"delta {delta:g}"
        )
    if statement is not None and source.folder is not None:
        sentences.append(f"ok: the {len(statement['files'])} published file(s) are those paid for")
    if source.ledger is None:
        sentences.append("no ledger lies here, so none was checked as a whole")
    elif statement is None:
        sentences.append("ok: the ledger is whole; there is no statement here to compare it with")
    else:
        sentences.append("ok: the ledger is whole, and agrees with the statement and checkpoints")
    return sentences


def summarise_spending(source: Source) -> dict:
    """Every event of a source, and what all come to, as numbers."""
    events, delta = source.events(), source.delta()
    spent = account(events, delta)
    return {
        "private": source.is_private(),
        "delta": delta,
        "events": [
            {**event, "epsilon": pld_epsilon([event], delta), "adds": added}
            for event, added in zip(events, split_budget(events, delta), strict=True)
        ],
        "epsilon": {
            "pld": spent.both_relations(),
            "prv": {"add_or_remove_one": spent.prv, "replace_one": spent.prv_replace_one},
        },
        "membership_inference": membership_power(events),
        "runs": summarise_runs(source.ledger.records()) if source.ledger else [],
    }


def _check_with_ledger(source: Source) -> list[str]:
    records = source.ledger.records()
    problems = check_records(records)
    if source.statement is not None:
        problems += check_ledger(source.statement, records)
    if source.folder is not None:
        problems += check_checkpoints(records, source.folder / PRIVATE / CHECKPOINTS)
    return problems


def check_files(statement: dict, source: Source) -> list[str]:
    """Published files that are missing, changed, or that the statement does not account for."""
    folder = source.folder
    problems = find_changed(statement, folder)
    problems += [f"{n} is missing" for n in statement["files"] if not (folder / n).is_file()]
    for name in source.extras:
        if name not in statement["files"]:
            problems.append(f"{name}: the statement does not account for it")
    return problems


def check_card(statement: dict | None, folder: Path) -> list[str]:
    """Where the numbers that the model card shows to the Hub are not those of the statement."""
    card = folder / CARD
    if statement is None or not card.is_file():
        return []
    try:
        loaded = ModelCard.load(card)
        results = loaded.data.eval_results or []
    except (ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        return [f"the front matter of README.md cannot be read: {error}"]
    own, (total, _) = statement["epsilon"]["add_or_remove_one"], quote_total(statement)
    shown = [(r.metric_value, total) for r in results if r.metric_type == "epsilon"]
    said = re.findall(r"\*\*epsilon = (\d+(?:\.\d+)?)", loaded.text)
    shown += [(float(number), own) for number in said]
    return [
        f"README.md says epsilon {value}, the statement {stated:.4f}"
        for value, stated in shown
        if not isinstance(value, float | int) or abs(value - stated) > 1e-3
    ]
