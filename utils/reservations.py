"""Reserve what a run will spend, before an image is read; or find the run to go on with."""

import json
import re
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from utils.accounting import PrivacyPlan, pld_epsilon
from utils.arguments import PrivacyArguments, TrainingArguments
from utils.checkpoints import (
    differences,
    empty_unfinished,
    newest_intact,
    path_of,
    read_about,
    sha256_of,
    steps_on_disk,
    sweep,
    was_left_unfinished,
)
from utils.errors import UsageError
from utils.hub import write_durably
from utils.ledger import (
    CHECKPOINT,
    Ledger,
    charged_events,
    charged_steps,
    new_name,
    page_of,
)
from utils.runs import LEDGER_NAME, Run, disk_errors_told, earlier_page, private_folder
from utils.selection import read_saliency


def open_run(
    training: TrainingArguments,
    privacy: PrivacyArguments,
    plan: PrivacyPlan,
    agreed: dict,
    is_private: bool,
) -> Run | None:
    """Reserve what `plan` will spend; or, to go on with a run, find its checkpoint.

    Call before an image is read; `confirm` afterwards. With `--dry_run` it only looks.

    Raises:
        UsageError: it would exceed --total_epsilon; there is no such checkpoint; or see `Ledger`.
    """
    output_dir = Path(training.output_dir)
    agreed = {**agreed, "plan": _public(plan)}
    ledger, cap = ledger_of(output_dir, privacy, link=not privacy.dry_run), privacy.total_epsilon
    if privacy.dry_run:
        return ledger.check(plan.terms(is_private), cap)
    if training.resume_from_checkpoint is not None:
        checkpoint = _find_checkpoint(output_dir, training.resume_from_checkpoint)
        about = read_about(checkpoint)
        _refuse_changes(checkpoint, about["agreed"] | {"plan": None}, agreed | {"plan": None})
        ledger.check_resuming(about["run"], about["step"], cap)
        return Run(output_dir, page_of(ledger, about["run"]), agreed, checkpoint)
    with disk_errors_told(output_dir):
        earlier = earlier_page(output_dir)
        if earlier is not None:  # an attempt that ended before its first step
            earlier.give_up()
        shutil.rmtree(private_folder(output_dir) / "checkpoints", ignore_errors=True)
        name = new_name()  # noted first, so that a reservation can always be found again
        write_durably(private_folder(output_dir) / "run", name)
        if privacy.privacy_ledger is not None and not ledger.path.exists():
            print(f"starting a new ledger, {ledger.path}")
        page = ledger.reserve(plan.terms(is_private), cap, name)
    return Run(output_dir, page, agreed)


def _refuse_changes(checkpoint: Path, then: dict, now: dict) -> None:
    changed = differences(then, now)
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UsageError(f"cannot resume {checkpoint}: {'; '.join(changed[:3])}{more}")


def confirm(run: Run, privacy: PrivacyArguments, plan: PrivacyPlan, is_private: bool) -> Run:
    """The run with its final plan, now that the images were looked at.

    Raises:
        UsageError: the checkpoint to go on from belongs to another plan, model or adapter; or going
            on would exceed --total_epsilon.
    """
    agreed = {**run.agreed, "plan": _public(plan)}
    ledger, terms, cap = run.page.ledger, plan.terms(is_private), privacy.total_epsilon
    if agreed == run.agreed and run.checkpoint is None:
        return run
    if run.checkpoint is None:  # some images could not be read: fewer units
        page = ledger.reserve(terms, cap, run.page.run, step=0)
        return replace(run, page=page, agreed=agreed)
    about = read_about(run.checkpoint)
    _refuse_changes(run.checkpoint, about["agreed"], agreed)
    settle(run)
    page = ledger.reserve(terms, cap, run.page.run, about["step"])
    for step in steps_on_disk(run.checkpoints):
        if step > about["step"]:  # damaged, or passed over: never the latest again
            aside = f"set-aside-{step}-of-branch-{page.branch - 1}"
            path_of(run.checkpoints, step).rename(run.checkpoints / aside)
    steps = charged_steps(ledger.records(), page.run)
    if steps > plan.steps:
        print(
            f"going on from step {about['step']} charges {steps - plan.steps} steps once more: "
            f"their noisy results exist already. The run will come to epsilon "
            f"{pld_epsilon(plan.events(steps), plan.delta):.3f}"
        )
    return replace(run, page=page, agreed=agreed, recharged=steps - plan.steps)


def _public(plan: PrivacyPlan) -> dict:
    """The plan as a checkpoint remembers it: as it comes back from JSON."""
    return json.loads(json.dumps(asdict(plan)))


def settle(run: Run) -> None:
    """Bring the ledger up to date with the checkpoints on disk after a crash.

    A checkpoint that was announced and is there, whole, was written. One whose unfinished folder is
    still there did not come to be: what it holds is destroyed unread, and the release taken back.
    One of which nothing is there may be anywhere, and stays charged.
    """
    records, folder = run.page.ledger.records(), run.checkpoints
    own = [r for r in records if r["run"] == run.page.run and r["branch"] == run.page.branch]
    own = [r for r in own if r.get("output") == CHECKPOINT]
    settled = {r["step"] for r in own if r["kind"] in ("wrote", "void")}
    pending = sorted({r["step"] for r in own if r["kind"] == "release"} - settled)
    empty_unfinished(folder)
    for step in pending:
        if was_left_unfinished(folder, step):
            run.page.void(step)
        elif path_of(folder, step).exists():
            run.page.wrote(step, CHECKPOINT)
    sweep(folder)


def check_room_for(output_dir: Path, privacy: PrivacyArguments, events: list[dict]) -> None:
    """Raises: UsageError if `events`, all to come, would exceed `--total_epsilon`."""
    if privacy.total_epsilon is None:
        return
    ledger = ledger_of(output_dir, privacy)
    held = charged_events(ledger.records())
    spent = pld_epsilon([*held, *events], privacy.target_delta)
    if spent > privacy.total_epsilon:
        raise UsageError(
            f"both stages would bring the ledger {ledger.path} to epsilon {spent:.3f}, above "
            f"--total_epsilon {privacy.total_epsilon:g}"
        )


def ledger_of(output_dir: Path, privacy: PrivacyArguments, link: bool = False) -> Ledger:
    """The ledger of a run: `--privacy_ledger`, or that of the selection it builds on, or its own.

    With `link` a shared one is linked to from OUTPUT_DIR/private, so that it can be found again.

    Raises:
        UsageError: the folder's run is in another ledger.
    """
    own, shared = private_folder(output_dir) / LEDGER_NAME, privacy.privacy_ledger
    moved = own.is_symlink() and not own.exists()
    if shared is None and privacy.saliency_file is not None:
        beside = private_folder(Path(privacy.saliency_file).parent) / LEDGER_NAME
        shared = beside if beside.exists() else None  # a random choice has none
    if shared is None or own.resolve() == Path(shared).resolve():
        return Ledger(own)
    if own.exists():
        raise UsageError(f"the run in {output_dir} is recorded in {own.resolve()}, not in {shared}")
    if link:
        if moved:
            own.unlink()
        own.symlink_to(Path(shared).resolve())
    return Ledger(shared)


def selection_paid_for(
    output_dir: Path, privacy: PrivacyArguments, base_model_checksum: int
) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The event of `--saliency_file` and its run, as the ledger has them; nothing if it was free.

    Raises:
        UsageError: the selection is about another base model, or the ledger did not pay for it.
    """
    if privacy.saliency_file is None:
        return (), ()
    saliency = read_saliency(privacy.saliency_file)
    if saliency.base_model_checksum != base_model_checksum:
        raise UsageError(
            f"--saliency_file {privacy.saliency_file} was made with another base model: select anew"
        )
    if saliency.mechanism == "random":
        return (), ()
    ledger = ledger_of(output_dir, privacy)
    records = ledger.records()
    digest = sha256_of(Path(privacy.saliency_file))
    paid = [r for r in records if r["run"] == saliency.run and r["kind"] == "wrote"]
    if not any(record["files"].get("saliency.json") == digest for record in paid):
        raise UsageError(
            f"the ledger {ledger.path} did not pay for --saliency_file {privacy.saliency_file}: "
            "name the ledger that the selection is in, or select anew"
        )
    return tuple(charged_events(records, [saliency.run])), (saliency.run,)


def _find_checkpoint(output_dir: Path, wanted: str) -> Path:
    checkpoints = private_folder(output_dir) / "checkpoints"
    if wanted == "latest":
        path, sentences = newest_intact(checkpoints)
        for sentence in sentences:
            print(sentence)
        return path
    path = Path(wanted)
    if not path.is_absolute() and not path.is_dir():
        path = checkpoints / wanted
    named = re.fullmatch(r"checkpoint-\d+|set-aside-.*", path.name)
    if path.resolve().parent != checkpoints.resolve() or not named:
        there = ", ".join(f"checkpoint-{step}" for step in steps_on_disk(checkpoints)) or "none"
        raise UsageError(
            f"--resume_from_checkpoint {wanted}: not a checkpoint of {output_dir}; there: {there}"
        )
    return path
