"""The durable record of what was spent: an append-only file, written ahead of every release.

One JSON record a line. Before training starts its whole plan is *reserved*; before a checkpoint or
the final weights exist on disk the step that they show is *released*; once they do, that they were
*written*. A crash at any moment leaves at least what was released on record, so the ledger never
under-reports. Each record carries the hash of the one before, so that none can be changed or
removed unseen (but for the last ones; a statement names the record that it rests on). It holds no
data, no hash of data, no seed and no state of a generator.

A run is charged branch by branch. It starts with one; resuming from a checkpoint opens another,
from that checkpoint's step. A branch is charged up to the last step it released (the last one of a
live run: up to its last planned step, so that concurrent runs cannot spend one budget twice). So
going on from the last checkpoint costs nothing extra, and going on from an older one costs the
steps in between once more: their noisy results exist already.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from utils.accounting import pld_epsilon
from utils.checkpoints import sync_folder
from utils.errors import UsageError

SCHEMA_VERSION = 1
START = "0" * 64  # what stands for the hash before the first record
CHECKPOINT, WEIGHTS = "checkpoint", "weights"  # what a release shows


TERMS = ("event", "delta", "num_units", "privacy_unit", "private", "builds_on")


def new_name() -> str:
    """A random name for a run."""
    return secrets.token_hex(8)


def digest(record: dict) -> str:
    """SHA-256 of a record, in one spelling, without its own hash."""
    content = {key: value for key, value in record.items() if key != "hash"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """A ledger file; processes of one machine may share it.

    Every method raises UsageError if the file cannot be read or written, is damaged, or comes from
    a newer version.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).resolve()

    def records(self) -> list[dict]:
        """All records, the chain checked. An unfinished last line is an append that was cut off:
        what it would have announced never happened, and the next append removes it."""
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
        except OSError as error:
            raise UsageError(f"cannot read the ledger {self.path}: {error}") from error
        records, previous = [], START
        for number, line in enumerate(content.split(b"\n")[:-1]):
            records.append(self._checked(line, number, previous))
            previous = records[-1]["hash"]
        return records

    def _checked(self, line: bytes, number: int, previous: str) -> dict:
        where = f"the ledger {self.path} is damaged in line {number + 1}"
        try:
            record = json.loads(line)
            version = record["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{where}: it is no record; restore it from a backup") from error
        if version > SCHEMA_VERSION:
            raise UsageError(f"the ledger {self.path} was written by a newer version of this code")
        intact = record.get("index") == number and record.get("previous") == previous
        if not intact or record.get("hash") != digest(record):
            raise UsageError(f"{where}: a record was changed or removed; restore it from a backup")
        return record

    @contextmanager
    def locked(self) -> Iterator[list[dict]]:
        """The records, while nobody else can append."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self.path.with_name(self.path.name + ".lock")):
                yield self.records()
        except OSError as error:
            raise UsageError(f"cannot write the ledger {self.path}: {error}") from error

    def _append(self, records: list[dict], **fields) -> dict:
        """Append one record to those there are, under the lock; it is on disk when this returns."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "index": len(records),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),  # for people; never relied on
            **fields,
            "previous": records[-1]["hash"] if records else START,
        }
        record["hash"] = digest(record)
        with open(self.path, "r+b" if self.path.exists() else "w+b") as file:
            known = file.read().rfind(b"\n") + 1
            file.truncate(known)  # an append that was cut off goes
            file.seek(known)
            try:
                file.write(json.dumps(record).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            except OSError:
                file.truncate(known)
                raise
        sync_folder(self.path.parent)
        records.append(record)
        return record

    def reserve(
        self,
        terms: dict,
        total_epsilon: float | None = None,
        run: str | None = None,
        step: int | None = None,
    ) -> "Page":
        """Set the whole plan aside, for a new run or for one that goes on; returns its `Page`.

        Args:
            terms: what `PrivacyPlan.terms` gives; its event has the planned steps.
            total_epsilon: cap on everything in this ledger, this plan included; None for none.
            run: name of the run; None for a fresh one.
            step: for a run that goes on, the step of the checkpoint that it goes on from.

        Raises:
            UsageError: it would exceed the cap, other entries protect another unit, reproducible
                noise, or the ledger does not know this run or checkpoint.
        """
        with self.locked() as records:
            run, branch = run or new_name(), 0
            if step is not None:
                branch = 1 + check_can_resume(records, run, step, terms, self.path)
            elif any(r["run"] == run for r in records):
                raise UsageError(f"the ledger {self.path} has a run {run} already")
            fields = {"kind": "reserve", "run": run, "branch": branch, "from_step": step or 0}
            check_admissible([*records, fields | terms], terms, total_epsilon, self.path)
            self._append(records, **fields, **terms)
        return Page(self, run, branch)

    def check(self, terms: dict, total_epsilon: float | None) -> None:
        """Raises: UsageError if a new run with these terms would be refused now."""
        fields = {"kind": "reserve", "run": "new", "branch": 0, "from_step": 0}
        check_admissible([*self.records(), fields | terms], terms, total_epsilon, self.path)

    def check_resuming(self, run: str, step: int, total_epsilon: float | None) -> None:
        """Raises: UsageError if the run, on its own terms, could not go on from `step` now."""
        records = self.records()
        own = [r for r in records if r["run"] == run and r["kind"] == "reserve"]
        terms = {key: own[-1][key] for key in TERMS} if own else {}
        branch = 1 + check_can_resume(records, run, step, terms, self.path)
        fields = {"kind": "reserve", "run": run, "branch": branch, "from_step": step}
        check_admissible([*records, fields | terms], terms, total_epsilon, self.path)


@dataclass(frozen=True)
class Page:
    """One branch of a run in a ledger: what the process that trains it may append."""

    ledger: Ledger
    run: str
    branch: int

    def release(self, step: int, output: str) -> None:
        """Say that `output` will show the weights after `step` steps; call before it exists.

        Raises:
            UsageError: the run was resumed or given up elsewhere, so this process must stop.
        """
        self._append("release", step=step, output=output)

    def wrote(self, step: int, output: str, files: dict[str, str] | None = None) -> dict:
        """Say that `output` is on disk, whole; `files` gives the SHA-256 of each published file."""
        return self._append("wrote", step=step, output=output, files=files or {})

    def void(self, step: int) -> None:
        """Take back the release of a checkpoint that was never finished and is destroyed."""
        self._append("void", step=step, output=CHECKPOINT)

    def give_up(self) -> None:
        """Hand back what was reserved and not released."""
        self._append("give_up")

    def _append(self, kind: str, **fields) -> dict:
        with self.ledger.locked() as records:
            own = [r for r in records if r["run"] == self.run]
            given_up = any(r["kind"] == "give_up" and r["branch"] == self.branch for r in own)
            if own[-1]["branch"] != self.branch or (given_up and kind == "release"):
                raise UsageError(
                    f"run {self.run} was resumed or given up elsewhere; this process releases "
                    "nothing more"
                )
            return self.ledger._append(
                records, kind=kind, run=self.run, branch=self.branch, **fields
            )


def page_of(ledger: Ledger, run: str) -> Page:
    """The last branch of a run. Raises: UsageError if the ledger does not know the run."""
    own = [r for r in ledger.records() if r["run"] == run]
    if not own:
        raise UsageError(f"the ledger {ledger.path} has no run {run}")
    return Page(ledger, run, own[-1]["branch"])


def check_can_resume(records: list[dict], run: str, step: int, terms: dict, path: Path) -> int:
    """The last branch of a run that may go on from `step` under `terms`.

    Raises:
        UsageError: the ledger does not know the run, no checkpoint of that step, or the run has
            released steps under other terms.
    """
    own = [r for r in records if r["run"] == run]
    if not own:
        raise UsageError(f"the ledger {path} has no run {run}: name the ledger it was started with")
    if step and step not in released_steps(own):
        raise UsageError(f"the ledger {path} has no checkpoint of step {step} of run {run}")
    before = [r for r in own if r["kind"] == "reserve"][-1]
    changed = [key for key in terms if terms[key] != before[key]]
    if charged_steps(own, run, live=False) and changed:
        raise UsageError(f"run {run} was started with another {' and '.join(changed)}")
    return own[-1]["branch"]


def check_admissible(records: list[dict], terms: dict, cap: float | None, path: Path) -> None:
    """Raises: UsageError if `terms`, the last of `records`, may not join the others."""
    charged = {r["run"] for r in records[:-1] if charged_steps(records[:-1], r["run"])}
    charged -= {records[-1]["run"]}
    others = [r for r in records if r["kind"] == "reserve" and r["run"] in charged]
    if any(r["privacy_unit"] != terms["privacy_unit"] for r in others):
        raise UsageError(
            f"the ledger {path} is about another privacy unit than '{terms['privacy_unit']}'; "
            "give this run a ledger of its own"
        )
    foreign = [r for r in others if r["private"] or r["run"] not in terms["builds_on"]]
    if not terms["private"] and (foreign or cap is not None):
        raise UsageError(
            "a run with reproducible noise has no epsilon: give it no shared --privacy_ledger and "
            "no --total_epsilon"
        )
    if terms["private"] and not all(r["private"] for r in others):
        raise UsageError(
            f"the ledger {path} holds a run with reproducible noise: it has no epsilon"
        )
    if cap is None:
        return
    spent = pld_epsilon(charged_events(records), terms["delta"])
    if spent > cap:
        before = charged_events(records[:-1])
        held = pld_epsilon(before, terms["delta"]) if before else 0.0
        raise UsageError(
            f"this run would bring the ledger {path} to epsilon {spent:.3f}, above --total_epsilon "
            f"{cap:g}; what is spent or reserved there comes to {held:.3f} at delta "
            f"{terms['delta']:g}" + _unfinished(records[:-1])
        )


def _unfinished(records: list[dict]) -> str:
    live = [run for run in dict.fromkeys(r["run"] for r in records) if is_live(records, run)]
    if not live:
        return ""
    return (
        f" (unfinished: {', '.join(live)}; resume them, or hand back what they did not use with "
        "privacy_report.py give_up)"
    )


def released_steps(records: list[dict]) -> set[int]:
    """The steps that some branch released and did not take back."""
    released = {(r["branch"], r["step"]) for r in records if r["kind"] == "release"}
    written = {(r["branch"], r["step"]) for r in records if r["kind"] == "wrote"}
    voided = {(r["branch"], r["step"]) for r in records if r["kind"] == "void"}
    return {step for _, step in released - (voided - written)}


def is_live(records: list[dict], run: str) -> bool:
    """Whether some of what the run's last branch reserved is neither released nor handed back."""
    return charged_steps(records, run) > charged_steps(records, run, live=False)


def charged_steps(records: list[dict], run: str, live: bool = True) -> int:
    """The steps that a run is charged for; with `live`, those it still holds in reserve too."""
    own = [r for r in records if r["run"] == run]
    reservations = [r for r in own if r["kind"] == "reserve"]
    handed_back = any(r["kind"] == "give_up" and r["branch"] == own[-1]["branch"] for r in own)
    total = 0
    for reservation in reservations:
        of_branch = [r for r in own if r["branch"] == reservation["branch"]]
        until = max(released_steps(of_branch), default=reservation["from_step"])
        if live and reservation is reservations[-1] and not handed_back:
            until = reservation["event"]["steps"]
        total += until - reservation["from_step"]
    return total


def charged_events(records: list[dict], only: list[str] | None = None) -> list[dict]:
    """The mechanisms that a ledger is charged for, one a run, oldest first; of `only` these runs.

    A run whose plan changed before its first step is charged by the plan that it went on with.
    """
    events = []
    for run in dict.fromkeys(r["run"] for r in records):
        steps = charged_steps(records, run)
        if steps and (only is None or run in only):
            terms = [r for r in records if r["run"] == run and r["kind"] == "reserve"][-1]
            events.append({**terms["event"], "steps": steps})
    return events
