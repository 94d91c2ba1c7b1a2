"""One training run: its folder, its branch in the ledger, its checkpoints, and what it publishes.

The order of things is the privacy argument (contract: "the ledger is ahead of the release"): the
plan is reserved before an image is read; a release is on record before the file that shows it
exists; a file is on record as written once it does.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from utils.arguments.training import TrainingArguments
from utils.errors import UsageError, on_main_process
from utils.files import (
    CACHE,
    CHECKPOINTS,
    DATA_REPORT,
    DATA_SHEET,
    LATENTS,
    LEDGER,
    LOGS,
    PRIVATE,
    SAMPLE_DIGESTS,
    explain_disk_errors,
    hash_file,
    make_private,
    private_folder,
    sync_file,
)
from utils.ledger.charges import (
    CHECKPOINT,
    WEIGHTS,
    compose_with_bases,
    count_charged_steps,
    is_live,
    list_charged_events,
    recall_runs,
)
from utils.ledger.checkpoints import (
    announce_checkpoint,
    list_steps,
    read_state,
    rotate,
    save_checkpoint,
)
from utils.ledger.ledger import Branch, Ledger, find_branch
from utils.ledger.statement import (
    Circumstances,
    build_statement,
    list_all_events,
    summarise_base,
    write_statement,
)
from utils.privacy.accounting import account, pld_both_relations
from utils.privacy.plan import PrivacyPlan

PRIVATE_DIGEST = "private_digest"  # in a checkpoint: of the private set that it was trained on
NOTE = "run"  # in private/: the name of the folder's run, noted before it is reserved
IN_USE = "in_use.lock"  # in private/: held by the process that works here
SELECTION, FIRST_MEANS = "selection", "means"  # the folders of stages before training


def claim_output_dir(training: TrainingArguments) -> FileLock:
    """Make the folder of a new run, with its `private/` (mode 0700), or find that of the run to
    resume. Nobody else can claim it while the lock that is returned lives.

    A folder is free if no run in it has released anything.

    Raises:
        UsageError: the folder holds another run or other files, holds none to resume, is in use, or
            cannot be written.
    """
    path, private = Path(training.output_dir), private_folder(training.output_dir)
    resumes = training.resume_from_checkpoint is not None
    if resumes and not private.is_dir():
        raise UsageError(f"--output_dir {path} holds no run to resume")
    if not resumes and not is_free(path):
        resume = ", or resume the run that it holds: --resume_from_checkpoint latest"
        raise UsageError(
            f"--output_dir {path} already holds files; name a new folder for this run"
            + (resume if (private / NOTE).exists() else "")
        )
    try:
        make_private(private)
        lock = FileLock(private / IN_USE, blocking=False)
        lock.acquire()
    except Timeout as error:
        raise UsageError(f"--output_dir {path} is in use by another process") from error
    except OSError as error:
        raise UsageError(f"cannot make --output_dir {path}: {error}") from error
    return lock


def is_free(path: Path) -> bool:
    """Whether no run in a folder has released anything, and nothing else is in it."""
    if not path.exists():
        return True
    if not path.is_dir() or {e.name for e in path.iterdir()} - {PRIVATE, SELECTION, FIRST_MEANS}:
        return False
    ours = {
        CACHE,
        LATENTS,
        LOGS,
        CHECKPOINTS,
        LEDGER,
        DATA_SHEET,
        DATA_REPORT,
        f"{LEDGER}.lock",
        IN_USE,
        NOTE,
        f"{NOTE}.tmp",
        SAMPLE_DIGESTS,
    }
    private = private_folder(path)
    if private.is_dir() and {entry.name for entry in private.iterdir()} - ours:
        return False
    if find_earlier_branch(path) is None:  # or its ledger is gone: a checkpoint was paid for
        return not any(list_steps(private / CHECKPOINTS))
    return find_abandoned(path) is not None


def find_earlier_branch(output_dir: Path) -> Branch | None:
    """The branch of the run that this folder was used for, if it got as far as its reservation."""
    note = private_folder(output_dir) / NOTE
    ledger = Ledger(private_folder(output_dir) / LEDGER)
    name = note.read_text().strip() if note.exists() else None
    known = any(record["run"] == name for record in ledger.records())
    return find_branch(ledger, name) if known else None


def find_abandoned(output_dir: Path) -> Branch | None:
    """The branch of an attempt in this folder that released nothing: the next attempt hands back
    what it reserved."""
    branch = find_earlier_branch(output_dir)
    if branch is None or count_charged_steps(branch.ledger.records(), branch.run, live=False):
        return None
    return branch


@dataclass(frozen=True)
class Run:
    """A run that may spend.

    Attributes:
        output_dir: where it publishes; its checkpoints are in private/.
        branch: where it is charged.
        agreed: all that a checkpoint must agree with to be resumed from.
        about: what its statement will say beside the mechanisms.
        checkpoint: the one to resume from; None for a new run.
        recharged: steps that are charged beyond the plan, since an older checkpoint was resumed
            from.
    """

    output_dir: Path
    branch: Branch
    agreed: dict
    about: Circumstances
    checkpoint: Path | None = None
    recharged: int = 0

    @property
    def behind(self) -> dict | None:
        """The events behind a private base model, and the smallest delta they were quoted at."""
        return None if self.about.base is None else summarise_base(self.about.base)

    @property
    def checkpoints(self) -> Path:
        return private_folder(self.output_dir) / CHECKPOINTS

    def save(self, step: int, state_dict: Callable[[], dict], limit: int) -> None:
        """Write a checkpoint of what `state_dict` returns, and keep the `limit` newest.

        Raises:
            UsageError: the ledger or the disk does not take it; on every process.
        """
        on_main_process(lambda: self._save(step, state_dict, limit))

    def _save(self, step: int, state_dict: Callable[[], dict], limit: int) -> None:
        about = {"run": self.branch.run, "branch": self.branch.number, "agreed": self.agreed}
        place = announce_checkpoint(self.checkpoints, step)
        self.branch.release(step, CHECKPOINT, place)
        save_checkpoint(self.checkpoints, step, state_dict(), about)
        self.branch.wrote(step, CHECKPOINT)
        rotate(self.checkpoints, limit)

    def repeat(self, name: str, steps: int, release: Callable[[list], object]) -> list:
        """What `release` gives, once a step, from what came before; each is kept in a checkpoint
        as soon as it exists, and an interrupted run does not pay for it twice.

        Raises:
            UsageError: see `save`.
        """
        done = [] if self.checkpoint is None else self.saved_state()[name]
        if self.checkpoint is None:
            self.save(0, lambda: {name: []}, 1)  # from here on, it can be resumed
        while len(done) < steps:
            done.append(release(done))
            self.save(len(done), lambda: {name: done}, 1)
        return done

    def saved_state(self) -> dict:
        """What the checkpoint to resume from holds."""
        return read_state(self.checkpoint)

    def publish(self, export: Callable[[Path], None], plan: PrivacyPlan) -> dict:
        """Export the weights after `plan.steps`, and write the statement that accounts for them;
        returns it. If the run had reserved more steps, they are handed back.

        The weights appear in the output folder last, after their release is on record and
        privacy.json is there. Doing it again is safe.

        Raises:
            UsageError: the ledger or the disk does not take it.
        """
        staging = private_folder(self.output_dir) / "staging"
        self.branch.release(plan.steps, WEIGHTS)
        with explain_disk_errors(self.output_dir):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            export(staging)
            paths = sorted(path for path in staging.rglob("*") if path.is_file())
            files = {str(path.relative_to(staging)): hash_file(path) for path in paths}
            for path in paths:
                sync_file(path)
            if is_live(self.branch.ledger.records(), self.branch.run):
                self.branch.give_up()
            entry = self.branch.wrote(plan.steps, WEIGHTS, files)
            statement = self._statement(plan, files, entry)
            write_statement(statement, self.output_dir)
            for path in staging.iterdir():
                target = self.output_dir / path.name
                if target.is_dir():
                    shutil.rmtree(target)
                os.replace(path, target)
            staging.rmdir()
        return statement

    def _statement(self, plan: PrivacyPlan, files: dict, entry: dict) -> dict:
        records = self.branch.ledger.records()[: entry["index"] + 1]
        runs = [*plan.builds_on, self.branch.run]
        about = recall_runs(self.about, records, runs)
        run_events = list_charged_events(records, runs)
        statement = build_statement(plan, run_events, account(run_events, plan.delta), about)
        everything, delta = compose_with_bases(records, statement.get("base"))
        ledger = {"run": self.branch.run, "entry": entry["hash"]}
        if statement["private"] and everything != list_all_events(statement):
            epsilon = pld_both_relations(everything, delta)
            ledger["everything"] = {"events": everything, "epsilon": epsilon, "delta": delta}
        return statement | {"files": files, "ledger": ledger}
