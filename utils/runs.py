"""One training run: its folder, its page in the ledger, its checkpoints, and what it publishes.

The order of things is the privacy argument (contract: "the ledger is ahead of the release"): the
plan is reserved before an image is read; a release is on record before the file that shows it
exists; a file is on record as written once it does.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from safetensors import SafetensorError

from utils.accounting import PrivacyPlan, account, privacy_statement
from utils.arguments import TrainingArguments
from utils.checkpoints import (
    announce_checkpoint,
    read_state,
    rotate,
    save_checkpoint,
    sha256_of,
    sync_file,
)
from utils.errors import UsageError, on_main_process
from utils.hub import write_statement
from utils.ledger import (
    CHECKPOINT,
    WEIGHTS,
    Ledger,
    Page,
    charged_events,
    charged_steps,
    page_of,
)

LEDGER_NAME = "ledger.jsonl"


def private_folder(output_dir: str | Path) -> Path:
    return Path(output_dir) / "private"


def claim_output_dir(training: TrainingArguments) -> FileLock:
    """Make the folder of a new run, with its `private/` (mode 0700), or find that of the run to go
    on with. Nobody else can claim it while the lock that is returned lives.

    A folder is free if no run in it has released anything.

    Raises:
        UsageError: the folder holds another run or other files, holds none to resume, is in use, or
            cannot be written.
    """
    path, private = Path(training.output_dir), private_folder(training.output_dir)
    resumes = training.resume_from_checkpoint is not None
    if resumes and not private.is_dir():
        raise UsageError(f"--output_dir {path} holds no run to resume")
    if not resumes and not _is_free(path):
        raise UsageError(
            f"--output_dir {path} already holds files; name a new folder for this run, or go on "
            "with the run that it holds: --resume_from_checkpoint latest"
        )
    try:
        path.mkdir(parents=True, exist_ok=True)
        private.mkdir(mode=0o700, exist_ok=True)
        lock = FileLock(private / "in_use.lock", blocking=False)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"--output_dir {path} is in use by another process") from error
    except OSError as error:
        raise UsageError(f"cannot make --output_dir {path}: {error}") from error
    return lock


def _is_free(path: Path) -> bool:
    if not path.exists():
        return True
    if not path.is_dir() or {e.name for e in path.iterdir()} - {"private", "selection"}:
        return False
    own = {"cache", "latents", "logs", "checkpoints", "in_use.lock", "run", "run.tmp"}
    own |= {LEDGER_NAME, f"{LEDGER_NAME}.lock"}
    private = private_folder(path)
    if private.is_dir() and {entry.name for entry in private.iterdir()} - own:
        return False
    page = earlier_page(path)
    return page is None or charged_steps(page.ledger.records(), page.run, live=False) == 0


def earlier_page(output_dir: Path) -> Page | None:
    """The page of the run that this folder was used for, if it got as far as its reservation."""
    note = private_folder(output_dir) / "run"
    ledger = Ledger(private_folder(output_dir) / LEDGER_NAME)
    name = note.read_text().strip() if note.exists() else None
    known = any(record["run"] == name for record in ledger.records())
    return page_of(ledger, name) if known else None


@dataclass(frozen=True)
class Run:
    """A run that may spend.

    Attributes:
        output_dir: where it publishes; its checkpoints are in private/.
        page: where it is charged.
        agreed: all that a checkpoint must agree with to be gone on from.
        checkpoint: the one to go on from; None for a new run.
        recharged: steps that are charged beyond the plan, since an older checkpoint was gone on
            from.
    """

    output_dir: Path
    page: Page
    agreed: dict
    checkpoint: Path | None = None
    recharged: int = 0

    @property
    def checkpoints(self) -> Path:
        return private_folder(self.output_dir) / "checkpoints"

    def save(self, step: int, state_dict: Callable[[], dict], limit: int) -> None:
        """Write a checkpoint of what `state_dict` returns, and keep the `limit` newest.

        Raises:
            UsageError: the ledger or the disk does not take it; on every process.
        """
        on_main_process(lambda: self._save(step, state_dict, limit))

    def _save(self, step: int, state_dict: Callable[[], dict], limit: int) -> None:
        about = {"run": self.page.run, "agreed": self.agreed}
        announce_checkpoint(self.checkpoints, step)
        self.page.release(step, CHECKPOINT)
        save_checkpoint(self.checkpoints, step, state_dict(), about)
        self.page.wrote(step, CHECKPOINT)
        rotate(self.checkpoints, limit)

    def saved_state(self) -> dict:
        """What the checkpoint to go on from holds."""
        return read_state(self.checkpoint)

    def publish(self, export: Callable[[Path], None], plan: PrivacyPlan, is_private: bool) -> dict:
        """Export the weights, and write the statement that accounts for them; returns it.

        The weights appear in the output folder last, after their release is on record and
        privacy.json is there. Doing it again is safe.

        Raises:
            UsageError: the ledger or the disk does not take it.
        """
        staging = private_folder(self.output_dir) / "staging"
        self.page.release(plan.steps, WEIGHTS)
        with disk_errors_told(self.output_dir):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            export(staging)
            paths = sorted(path for path in staging.rglob("*") if path.is_file())
            files = {str(path.relative_to(staging)): sha256_of(path) for path in paths}
            for path in paths:
                sync_file(path)
            entry = self.page.wrote(plan.steps, WEIGHTS, files)
            statement = self._statement(plan, is_private, files, entry)
            write_statement(statement, self.output_dir)
            for path in staging.iterdir():
                target = self.output_dir / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
            staging.rmdir()
        return statement

    def _statement(self, plan: PrivacyPlan, is_private: bool, files: dict, entry: dict) -> dict:
        records = self.page.ledger.records()[: entry["index"] + 1]
        own = charged_events(records, [*plan.builds_on, self.page.run])
        everything = charged_events(records)
        statement = privacy_statement(plan, own, account(own, plan.delta), is_private)
        ledger = {"run": self.page.run, "entry": entry["hash"]}
        if len(everything) > len(own):
            epsilon = account(everything, plan.delta)
            ledger["everything"] = {"events": everything, "epsilon": epsilon.both_relations()}
        return statement | {"files": files, "ledger": ledger}


@contextmanager
def disk_errors_told(output_dir: Path) -> Iterator[None]:
    """A disk that takes no more becomes one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write to {output_dir}: {error}. Nothing is lost: make room, and go on with "
            "--resume_from_checkpoint latest"
        ) from error
