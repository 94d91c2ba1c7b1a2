"""Reserve what a run will spend, before an image is read; or find the run to resume."""

import json
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

from accelerate import PartialState

from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.errors import UsageError
from utils.files import CHECKPOINTS, LEDGER, explain_disk_errors, private_folder, write_durably
from utils.ledger.charges import (
    CHECKPOINT,
    check_admissible,
    compose_with_bases,
    count_charged_steps,
    select_run,
)
from utils.ledger.checkpoints import (
    SET_ASIDE,
    empty_unfinished,
    find_newest_intact,
    list_differences,
    list_steps,
    locate_checkpoint,
    read_about,
    sweep,
    was_left_unfinished,
)
from utils.ledger.checks import check_released
from utils.ledger.ledger import Ledger, find_branch, make_run_name
from utils.ledger.runs import NOTE, PRIVATE_DIGEST, Run, find_abandoned, find_earlier_branch
from utils.ledger.statement import Circumstances, begins_with
from utils.privacy.accounting import pld_epsilon, quote
from utils.privacy.plan import PrivacyPlan


def open_run(
    training: TrainingArguments,
    privacy: PrivacyArguments,
    plan: PrivacyPlan,
    agreed: dict,
    about: Circumstances,
) -> Run:
    """Reserve what `plan` will spend; or, to resume a run, find its checkpoint.

    Call before an image is read; `confirm` afterwards.

    Raises:
        UsageError: it would exceed --total_epsilon; there is no such checkpoint; or see `Ledger`.
    """
    output_dir = Path(training.output_dir)
    agreed = {**agreed, "plan": _round_trip(plan)}
    ledger, cap = find_ledger(output_dir, privacy, link=True), privacy.total_epsilon
    if training.resume_from_checkpoint is not None:
        checkpoint = _find_checkpoint(output_dir, training.resume_from_checkpoint)
        known = read_about(checkpoint)
        later = {"plan": None, PRIVATE_DIGEST: None}  # compared by `confirm`
        _refuse_changes(checkpoint, known["agreed"] | later, agreed | later)
        _check_is_whole(ledger, checkpoint.parent)
        ledger.check_resuming(known, cap)
        _check_base(ledger, [*plan.builds_on, known["run"]], about)
        return Run(output_dir, find_branch(ledger, known["run"]), agreed, about, checkpoint)
    with explain_disk_errors(output_dir):
        earlier = find_earlier_branch(output_dir)
        if earlier is not None:  # an attempt that ended before its first step
            earlier.give_up()
        shutil.rmtree(private_folder(output_dir) / CHECKPOINTS, ignore_errors=True)
        name = make_run_name()  # noted first, so that a reservation can always be found again
        write_durably(private_folder(output_dir) / NOTE, name)
        if privacy.privacy_ledger is not None and not ledger.path.exists():
            print(f"starting a new ledger, {ledger.path}")
        terms = plan.terms(about.is_private)
        _check_base(ledger, plan.builds_on, about)
        branch = ledger.reserve(terms, cap, name, made_with=about.made_with())
    return Run(output_dir, branch, agreed, about)


def _check_is_whole(ledger: Ledger, checkpoints: Path) -> None:
    """Raises: UsageError if results of the run lie there that the ledger does not have."""
    unknown = check_released(ledger.records(), checkpoints)
    if unknown:
        raise UsageError(
            f"cannot resume: {unknown[0]}, so {ledger.path} is older than this run, as a backup "
            "is, and would count too little: bring back the newest copy"
        )


def check_new(
    output_dir: Path, privacy: PrivacyArguments, plan: PrivacyPlan, about: Circumstances
) -> None:
    """Raises: UsageError if `open_run` would refuse to reserve a new run now."""
    ledger, terms = find_ledger(output_dir, privacy), plan.terms(about.is_private)
    _check_base(ledger, plan.builds_on, about)
    fields = {"kind": "reserve", "run": "new", "branch": 0, "from_step": 0} | terms
    records = [*_list_standing(ledger, output_dir), fields | {"made_with": about.made_with()}]
    check_admissible(records, terms, privacy.total_epsilon, ledger.path)


def _list_standing(ledger: Ledger, output_dir: Path) -> list[dict]:
    """The records of a ledger without those that `open_run` would hand back."""
    abandoned = find_abandoned(output_dir)
    return [r for r in ledger.records() if abandoned is None or r["run"] != abandoned.run]


def _refuse_changes(checkpoint: Path, then: dict, now: dict) -> None:
    changed = list_differences(then, now)
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(f"cannot resume {checkpoint}: {'; '.join(changed[:3])}{more}")


def confirm(run: Run, privacy: PrivacyArguments, plan: PrivacyPlan, digest: str) -> Run:
    """The run as it will be resumed, after the images were checked.

    Args:
        digest: of the private set (`PrivateSet.digest`), which checkpoints keep.

    Raises:
        UsageError: the checkpoint to resume from belongs to another plan, model, adapter or private
            set; or resuming would exceed --total_epsilon.
    """
    agreed = {**run.agreed, PRIVATE_DIGEST: digest}
    if run.checkpoint is None:
        return replace(run, agreed=agreed)
    ledger, cap = run.branch.ledger, privacy.total_epsilon
    terms, made_with = plan.terms(run.about.is_private), run.about.made_with()
    about = read_about(run.checkpoint)
    then = about["agreed"]
    _refuse_changes(run.checkpoint, then | {PRIVATE_DIGEST: digest}, agreed)
    if then.get(PRIVATE_DIGEST, digest) != digest:  # an older one has none
        raise UsageError(
            f"cannot resume {run.checkpoint}: the private images, their captions or their units "
            "are others than it was trained on"
        )
    settle(run)
    of_branch = about.get("branch")
    branch = ledger.reserve(terms, cap, run.branch.run, about["step"], made_with, of_branch)
    for step in list_steps(run.checkpoints):
        if step > about["step"]:  # damaged, or passed over: never the latest again
            aside = f"{SET_ASIDE}-{step}-of-branch-{branch.number - 1}"
            locate_checkpoint(run.checkpoints, step).rename(run.checkpoints / aside)
    steps = count_charged_steps(ledger.records(), branch.run)
    if steps > plan.steps:
        print(
            f"resuming from step {about['step']} charges {steps - plan.steps} steps once more: "
            f"their noisy results exist already. The run will come to epsilon "
            f"{quote(pld_epsilon(plan.events(steps), plan.delta))}"
        )
    return replace(run, branch=branch, agreed=agreed, recharged=steps - plan.steps)


@contextmanager
def handing_back(run: Run) -> Iterator[None]:
    """What ends within, by whatever error or Ctrl-C, hands back what a new run had reserved, of
    which nothing is drawn yet. To resume one, its checkpoint is there."""
    try:
        yield
    except BaseException:
        if run.checkpoint is None and PartialState().is_main_process:
            with suppress(UsageError):  # the first error is the one to tell
                find_branch(run.branch.ledger, run.branch.run).give_up()
        raise


def _check_base(ledger: Ledger, runs: Iterable[str], about: Circumstances) -> None:
    """Whether the base model that `about` names is that of `runs`: the weights tell nobody that
    they are a private result, if their privacy.json was left behind.

    Raises:
        UsageError: one of them is about a private base model, whose cost would be missing.
    """
    for record in ledger.records():
        then = record.get("made_with", {}).get("base") if record["run"] in runs else None
        if then is not None and not begins_with(about.base, then):
            raise UsageError(
                f"run {record['run']}, which this one builds on or resumes, was made from a base "
                "model that is a private result itself, and this base model has not its "
                "privacy.json: name the same one, with that"
            )


def _round_trip(plan: PrivacyPlan) -> dict:
    """The plan as a checkpoint remembers it: as it comes back from JSON."""
    return json.loads(json.dumps(asdict(plan)))


def settle(run: Run) -> None:
    """Bring the ledger up to date with the checkpoints on disk after a crash.

    If a released checkpoint has its unfinished folder, what that holds is destroyed unread, and the
    release is taken back. Else, if the checkpoint exists, it is recorded as written. Else it may
    have been moved, or this be a copy: it stays charged.
    """
    records, folder = run.branch.ledger.records(), run.checkpoints
    branch_records = [
        r
        for r in select_run(records, run.branch.run)
        if r["branch"] == run.branch.number and r.get("output") == CHECKPOINT
    ]
    settled = {r["step"] for r in branch_records if r["kind"] in ("wrote", "void")}
    places = {r["step"]: r.get("place") for r in branch_records if r["kind"] == "release"}
    empty_unfinished(folder)
    for step in sorted(places.keys() - settled):
        if was_left_unfinished(folder, step, places[step]):
            run.branch.void(step)
        elif locate_checkpoint(folder, step).exists():
            run.branch.wrote(step, CHECKPOINT)
    sweep(folder)


def check_room_for(
    output_dir: Path, privacy: PrivacyArguments, events: list[dict], about: Circumstances
) -> None:
    """Raises: UsageError if `events`, all to come and made as `about` says, the first in
    `output_dir`, would exceed `--total_epsilon`."""
    if privacy.total_epsilon is None:
        return
    ledger = find_ledger(output_dir, privacy)
    record = {"kind": "reserve", "branch": 0, "from_step": 0, "delta": privacy.target_delta}
    record["made_with"] = about.made_with()
    to_come = [record | {"run": f"to come, {n}", "event": e} for n, e in enumerate(events)]
    standing = _list_standing(ledger, output_dir)
    spent = pld_epsilon(*compose_with_bases([*standing, *to_come]))
    if spent > privacy.total_epsilon:
        raise UsageError(
            f"all stages would bring the ledger {ledger.path} to epsilon {quote(spent)}, above "
            f"--total_epsilon {privacy.total_epsilon:g}"
        )


def find_ledger(output_dir: Path, privacy: PrivacyArguments, link: bool = False) -> Ledger:
    """The ledger of a run: `--privacy_ledger`, or OUTPUT_DIR/private/ledger.jsonl.

    With `link` a shared one is linked to from OUTPUT_DIR/private, so that it can be found again.

    Raises:
        UsageError: the folder's run is in another ledger; or the shared one is not there, though a
            cap is to be measured on what it holds, nor is its folder; or nobody names it, and what
            is linked to is not there.
    """
    here, shared = private_folder(output_dir) / LEDGER, privacy.privacy_ledger
    is_gone = here.is_symlink() and not here.exists()
    if shared is None and is_gone:
        raise UsageError(
            f"the ledger of {output_dir}, {here.resolve()}, is not there: bring it back, or say "
            "with --privacy_ledger where it is now"
        )
    if shared is None or (here.resolve() == Path(shared).resolve() and not is_gone):
        return Ledger(here)
    if not Path(shared).resolve().parent.is_dir():
        raise UsageError(f"--privacy_ledger {shared}: its folder does not exist")
    if privacy.total_epsilon is not None and not (Path(shared).exists() or privacy.start_ledger):
        raise UsageError(
            f"--privacy_ledger {shared} is not there, so nothing that was spent before would count "
            "towards --total_epsilon: correct its name, or start it with --start_ledger"
        )
    if here.exists():
        raise UsageError(
            f"the run in {output_dir} is recorded in {here.resolve()}, not in {shared}"
        )
    if link:
        here.unlink(missing_ok=True)  # a link to a ledger that was moved
        here.symlink_to(Path(shared).resolve())
    return Ledger(shared)


def _find_checkpoint(output_dir: Path, wanted: str) -> Path:
    checkpoints = private_folder(output_dir) / CHECKPOINTS
    if wanted == "latest":
        path, sentences = find_newest_intact(checkpoints)
        for sentence in sentences:
            print(sentence)
        return path
    path = Path(wanted)
    if not path.is_absolute() and not path.is_dir():
        path = checkpoints / wanted
    named = re.fullmatch(rf"{CHECKPOINT}-\d+|{SET_ASIDE}-.*", path.name)
    if path.resolve().parent != checkpoints.resolve() or not named:
        known = ", ".join(f"checkpoint-{step}" for step in list_steps(checkpoints)) or "none"
        raise UsageError(
            f"--resume_from_checkpoint {wanted}: not a checkpoint of {output_dir}; it has: {known}"
        )
    return path
