"""The durable record of what was spent: an append-only file, written ahead of every release.

One JSON record a line. Before training starts its whole plan is *reserved*; before a checkpoint or
the final weights exist on disk the step that they show is *released*; once they do, that they were
*written*. A crash at any moment leaves at least what was released on record, so the ledger never
under-reports. Each record carries the hash of the one before, so that none can be changed or
removed unseen (but for the last ones; a statement names the record that it rests on). It holds no
data, no hash of data, no seed and no state of a generator.
What the records come to is in `charges`.
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

from utils.errors import UsageError
from utils.files import sync_folder
from utils.ledger.charges import CHECKPOINT, check_admissible, check_can_resume, select_run

SCHEMA_VERSION = 1
START = "0" * 64  # what stands for the hash before the first record
TERMS = ("event", "delta", "num_units", "privacy_unit", "private", "builds_on")


def make_run_name() -> str:
    """A random name for a run."""
    return secrets.token_hex(8)


def hash_record(record: dict) -> str:
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
            raise UsageError(f"{where}: it is not a record; bring back the newest copy") from error
        if version > SCHEMA_VERSION:
            raise UsageError(f"the ledger {self.path} was written by a newer version of this code")
        intact = record.get("index") == number and record.get("previous") == previous
        if not intact or record.get("hash") != hash_record(record):
            raise UsageError(
                f"{where}: a record was changed or removed; bring back the newest copy"
            )
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
        record["hash"] = hash_record(record)
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
        made_with: dict | None = None,
        of_branch: int | None = None,
    ) -> "Branch":
        """Set the whole plan aside, for a new run or for one to resume; returns its `Branch`.

        Args:
            terms: what `PrivacyPlan.terms` gives; its event has the planned steps.
            total_epsilon: cap on everything in this ledger, this plan included; None for none.
            run: name of the run; None for a fresh one.
            step: for a run to resume, the step of the checkpoint that it resumes from.
            made_with: `Circumstances.made_with`, of what this branch will release.
            of_branch: that released the checkpoint; None if it does not say.

        Raises:
            UsageError: it would exceed the cap, other entries protect another unit, reproducible
                noise, or the ledger does not know this run or checkpoint.
        """
        with self.locked() as records:
            run, branch = run or make_run_name(), 0
            if step is not None:
                branch = 1 + check_can_resume(records, run, (of_branch, step), terms, self.path)
            elif select_run(records, run):
                raise UsageError(f"the ledger {self.path} has a run {run} already")
            fields = {"kind": "reserve", "run": run, "branch": branch, "from_step": step or 0}
            fields |= terms | ({} if made_with is None else {"made_with": made_with})
            check_admissible([*records, fields], terms, total_epsilon, self.path)
            self._append(records, **fields)
        return Branch(self, run, branch)

    def check_resuming(self, about: dict, total_epsilon: float | None) -> None:
        """Raises: UsageError if a run, on its own terms, could not be resumed now from the
        checkpoint that says `about` of itself."""
        run, step = about["run"], about["step"]
        records = self.records()
        plans = [r for r in select_run(records, run) if r["kind"] == "reserve"]
        terms = {key: plans[-1][key] for key in TERMS} if plans else {}
        released = about.get("branch"), step
        branch = 1 + check_can_resume(records, run, released, terms, self.path)
        fields = {"kind": "reserve", "run": run, "branch": branch, "from_step": step}
        check_admissible([*records, fields | terms], terms, total_epsilon, self.path)


@dataclass(frozen=True)
class Branch:
    """One branch of a run in a ledger: what the process that trains it may append."""

    ledger: Ledger
    run: str
    number: int

    def release(self, step: int, output: str, place: int | None = None) -> None:
        """Say that `output` will show the weights after `step` steps; call before it exists.

        Args:
            place: of a checkpoint, what `announce_checkpoint` gave.

        Raises:
            UsageError: the run was resumed or given up elsewhere, so this process must stop.
        """
        where = {} if place is None else {"place": place}
        self._append("release", step=step, output=output, **where)

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
            run_records = select_run(records, self.run)
            if not run_records:
                raise UsageError(f"{self.ledger.path} has lost run {self.run}: bring it back")
            given_up = any(
                r["kind"] == "give_up" and r["branch"] == self.number for r in run_records
            )
            if run_records[-1]["branch"] != self.number or (given_up and kind == "release"):
                raise UsageError(
                    f"run {self.run} was resumed or given up elsewhere; this process releases "
                    "nothing more"
                )
            return self.ledger._append(
                records, kind=kind, run=self.run, branch=self.number, **fields
            )


def find_branch(ledger: Ledger, run: str) -> Branch:
    """The last branch of a run. Raises: UsageError if the ledger does not know the run."""
    run_records = select_run(ledger.records(), run)
    if not run_records:
        raise UsageError(f"the ledger {ledger.path} has no run {run}")
    return Branch(ledger, run, run_records[-1]["branch"])
