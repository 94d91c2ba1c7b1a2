"""Does a privacy statement hold? Recompute it, and compare it with the files and the ledger."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import httpx2
import yaml
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled

from utils.errors import UsageError
from utils.files import CARD, CHECKPOINTS, LEDGER, PRIVATE, PUBLISHED, STATEMENT, hash_file
from utils.ledger.charges import (
    CHECKPOINT,
    WEIGHTS,
    count_charged_steps,
    find_smallest_delta,
    list_charged_events,
)
from utils.ledger.checkpoints import list_steps, locate_checkpoint, read_about
from utils.ledger.ledger import Ledger
from utils.privacy.accounting import pld_both_relations, prv_epsilon, prv_error

# Versions of the accountants may differ this much, the second by so much of epsilon.
PLD_TOLERANCE, PRV_TOLERANCE, PRV_RELATIVE_TOLERANCE = 1e-3, 0.02, 2e-3
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHT_SUFFIXES += (".npz", ".npy", ".onnx", ".gguf", ".msgpack", ".h5")
# What a repository may hold beside the files of its statement.
HARMLESS = re.compile(r"privacy\.json|README\.md|\.gitattributes|samples/(\d{4}|grid)\.png")


@dataclass(frozen=True)
class Source:
    """What a path or Hub id holds: a statement, a ledger, or both."""

    folder: Path | None
    statement: dict | None
    ledger: Ledger | None
    extras: tuple[str, ...] = ()  # files there that the statement must account for

    def delta(self) -> float:
        """The delta at which `events` are quoted: of a ledger, the smallest on record."""
        records = [] if self.ledger is None else self.ledger.records()
        if list_charged_events(records):
            return find_smallest_delta(records)
        return 0 if self.statement is None else self.statement["delta"]

    def events(self) -> list[dict]:
        ledger = self.ledger
        return self.statement["events"] if ledger is None else list_charged_events(ledger.records())


def read_source(name: str, revision: str | None) -> Source:
    """Find what `name` stands for.

    Raises:
        UsageError: there is neither a statement nor a ledger.
    """
    path = Path(name)
    if path.suffix == ".jsonl" and path.is_file():
        return Source(None, None, Ledger(path))
    if path.suffix == ".json" and path.is_file():
        return Source(None, _read_json(path), None)
    if path.is_dir():
        found = (p.relative_to(path) for p in sorted(path.rglob("*")) if p.is_file())
        names = [str(p) for p in found if PRIVATE not in p.parts]
        extras = [name for name in names if name.lower().endswith(WEIGHT_SUFFIXES)]
    else:
        path, names = _download(name, revision)
        extras = [name for name in names if not HARMLESS.fullmatch(name)]
    statement, ledger = path / STATEMENT, path / PRIVATE / LEDGER
    if not statement.exists() and not ledger.exists():
        raise UsageError(f"{name} holds no privacy.json and no ledger")
    return Source(
        path,
        _read_json(statement) if statement.exists() else None,
        Ledger(ledger) if ledger.exists() else None,
        tuple(extras),
    )


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


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


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


def _check_with_ledger(source: Source) -> list[str]:
    records = source.ledger.records()
    problems = check_records(records)
    if source.statement is not None:
        problems += check_ledger(source.statement, records)
    if source.folder is not None:
        problems += check_checkpoints(records, source.folder / PRIVATE / CHECKPOINTS)
    return problems


def check_statement(statement: dict) -> list[str]:
    """What is wrong with a statement by itself: a sentence each; none if it can be recomputed."""
    if statement.get("schema_version") != 1:
        return [f"the statement has schema version {statement.get('schema_version')}, not 1"]
    if statement.get("private") is not True:
        return ["the statement is stamped NOT PRIVATE"]
    missing = {"epsilon", "delta", "num_units", "privacy_unit", "events", "accountants", "files"}
    missing -= set(statement)
    if missing:
        return [f"the statement lacks {', '.join(sorted(missing))}"]
    units, delta = statement["num_units"], statement["delta"]
    problems = []
    if not isinstance(units, int) or units < 1:
        return [f"the number of units is {units}"]
    if not 0 < delta < 1 / units:
        problems.append(f"delta {delta:g} is not below 1/N = {1 / units:.3g}")
    problems += _check_epsilon(statement["events"], delta, statement["epsilon"], "the statement")
    if not problems:
        claimed = statement["accountants"]
        pld, prv = claimed["pld"]["epsilon"], claimed["prv"]["epsilon"]
        if pld != statement["epsilon"]["add_or_remove_one"]:
            problems.append("its PLD accountant and its epsilon differ")
        recomputed = prv_epsilon(statement["events"], delta, error=prv_error(pld))
        if not abs(prv - recomputed) <= PRV_TOLERANCE + PRV_RELATIVE_TOLERANCE * pld:
            problems.append(f"it says PRV epsilon {prv:.4f}; recomputed: {recomputed:.4f}")
    everything = statement.get("ledger", {}).get("everything")
    if everything is not None:
        epsilon, delta = everything["epsilon"], everything.get("delta", delta)
        problems += _check_epsilon(everything["events"], delta, epsilon, "its ledger's total")
    return problems


def _check_epsilon(events: list[dict], delta: float, claimed: dict, what: str) -> list[str]:
    if not events:
        return [f"{what} has no events"]
    for event in events:
        sane = 0 < event["sampling_rate"] <= 1 and event["noise_multiplier"] > 0
        if not sane or event["steps"] < 1 or event["steps"] != int(event["steps"]):
            return [f"{what} has an event with an impossible rate, noise or number of steps"]
    found = pld_both_relations(events, delta)
    return [
        f"{what} says epsilon {claimed[relation]:.4f} ({relation.replace('_', ' ')}); its events "
        f"come to {epsilon:.4f}"
        for relation, epsilon in found.items()
        if not abs(claimed[relation] - epsilon) <= PLD_TOLERANCE
    ]


def check_files(statement: dict, source: Source) -> list[str]:
    """Published files that are missing, changed, or that the statement does not account for."""
    problems, folder = [], source.folder
    for name, digest in statement["files"].items():
        if not (folder / name).is_file():
            problems.append(f"{name} is missing")
        elif hash_file(folder / name) != digest:
            problems.append(f"{name} is not the file that was paid for")
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
    stated = statement["epsilon"]["add_or_remove_one"]
    on_card = [result.metric_value for result in results if result.metric_type == "epsilon"]
    on_card += [float(value) for value in re.findall(r"\*\*epsilon = ([\d.]+\d)", loaded.text)]
    return [
        f"README.md says epsilon {value}, the statement {stated:.4f}"
        for value in on_card
        if not isinstance(value, float | int) or abs(value - stated) > 1e-3
    ]


def check_records(records: list[dict]) -> list[str]:
    """Records that no run of this code writes, though their chain is whole."""
    problems, open_branch, announced = [], {}, set()
    for record in records:
        kind, run, number = record["kind"], record["run"], record["index"] + 1
        key = (run, record["branch"], record.get("step"), record.get("output"))
        if kind == "reserve":
            expected = open_branch[run]["branch"] + 1 if run in open_branch else 0
            if record["branch"] != expected:
                problems.append(f"record {number} opens branch {record['branch']} out of turn")
            seen = {(r, s) for r, _, s, _ in announced}
            if record["from_step"] and (run, record["from_step"]) not in seen:
                problems.append(f"record {number} resumes from a step that was never released")
            open_branch[run] = record
            continue
        branch = open_branch.get(run)
        if branch is None or branch["branch"] != record["branch"]:
            problems.append(f"record {number} belongs to no open branch")
        elif kind == "release":
            announced.add(key)
            if not branch["from_step"] <= record["step"] <= branch["event"]["steps"]:
                problems.append(f"record {number} releases a step that was not reserved")
        elif kind in ("wrote", "void") and key not in announced:
            problems.append(f"record {number} is about a release that is not on record")
    return problems


def check_ledger(statement: dict, records: list[dict]) -> list[str]:
    """Where a statement and the ledger that it refers to differ."""
    run, entry = statement["ledger"]["run"], statement["ledger"]["entry"]
    index = next((r["index"] for r in records if r["hash"] == entry), None)
    if index is None:
        return ["the ledger does not hold the entry that the statement refers to"]
    record, problems = records[index], []
    if (record["kind"], record["run"], record.get("output")) != ("wrote", run, WEIGHTS):
        return ["the statement refers to an entry that is not about its weights"]
    if record["files"] != statement["files"]:
        problems.append("the ledger paid for other files than the statement names")
    terms = [r for r in records[:index] if r["kind"] == "reserve" and r["run"] == run][-1]
    charged = list_charged_events(records[: index + 1], [*terms["builds_on"], run])
    if charged != statement["events"]:
        problems.append("the ledger's events are not those of the statement")
    everything = list_charged_events(records[: index + 1])
    stated = statement["ledger"].get("everything", {"events": charged})["events"]
    if stated != everything:
        problems.append("the statement's total is not that of the ledger")
    quoted = statement["ledger"].get("everything", {}).get("delta")
    if quoted not in (None, find_smallest_delta(records[: index + 1])):
        problems.append("the statement's total is not quoted at the ledger's smallest delta")
    before, now = (
        count_charged_steps(part, run, live=False) for part in (records[: index + 1], records)
    )
    if now > before:
        problems.append(f"the run has released {now - before} more steps since this statement")
    for key in ("delta", "num_units", "privacy_unit", "private"):
        if terms[key] != statement[key]:
            problems.append(f"the ledger says {key} {terms[key]}, the statement {statement[key]}")
    return problems


def check_checkpoints(records: list[dict], folder: Path) -> list[str]:
    """Checkpoints on disk that the ledger did not announce, or that are damaged."""
    problems = []
    for step in list_steps(folder):
        try:
            about = read_about(locate_checkpoint(folder, step))
        except UsageError as error:
            problems.append(str(error))
            continue
        announced = {
            r["step"] for r in records if r["kind"] == "release" and r["run"] == about["run"]
        }
        if step not in announced or about["step"] != step:
            problems.append(f"the ledger did not release {CHECKPOINT}-{step}")
    return problems
