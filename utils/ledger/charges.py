"""What a ledger's records come to: steps released, events charged, and what may join them.

Functions of the records alone; the file is `ledger.Ledger`. A run is charged branch by branch. It
starts with one; resuming from a checkpoint opens another, from that checkpoint's step. A branch is
charged up to the last step it released (the last one of a live run: up to its last planned step, so
that concurrent runs cannot spend one budget twice). So resuming from the last checkpoint costs
nothing extra, and resuming from an older one costs the steps in between once more: their noisy
results exist already.
"""

from dataclasses import replace
from pathlib import Path

from utils.errors import UsageError
from utils.ledger.statement import (
    NOT_STATED,
    Circumstances,
    begins_with,
    list_base_entries,
    recall,
)
from utils.privacy.accounting import pld_epsilon, quote

CHECKPOINT, WEIGHTS = "checkpoint", "weights"  # what a release shows


def select_run(records: list[dict], run: str) -> list[dict]:
    """The records of one run."""
    return [record for record in records if record["run"] == run]


def check_can_resume(
    records: list[dict], run: str, released: tuple[int | None, int], terms: dict, path: Path
) -> int:
    """The last branch of a run that may be resumed under `terms`.

    Args:
        released: the branch, if the checkpoint names it, and the step that it is of.

    Raises:
        UsageError: the ledger does not know the run, no checkpoint of that step, or the run has
            released steps under other terms.
    """
    run_records = select_run(records, run)
    if not run_records:
        raise UsageError(f"the ledger {path} has no run {run}: name the ledger it was started with")
    of_branch, step = released
    if step and step not in list_released_steps(run_records, of_branch):
        raise UsageError(f"the ledger {path} has no checkpoint of step {step} of run {run}")
    before = [r for r in run_records if r["kind"] == "reserve"][-1]
    changed = [key for key in terms if terms[key] != before[key]]
    if count_charged_steps(run_records, run, live=False) and changed:
        raise UsageError(f"run {run} was started with another {' and '.join(changed)}")
    return run_records[-1]["branch"]


def check_admissible(records: list[dict], terms: dict, cap: float | None, path: Path) -> None:
    """Raises: UsageError if `terms`, the last of `records`, may not join the others."""
    charged = {r["run"] for r in records[:-1] if count_charged_steps(records[:-1], r["run"])}
    charged -= {records[-1]["run"]}
    others = [r for r in records if r["kind"] == "reserve" and r["run"] in charged]
    if any(r["privacy_unit"] != terms["privacy_unit"] for r in others):
        raise UsageError(
            f"the ledger {path} is about another privacy unit than '{terms['privacy_unit']}'; "
            "give this run another --privacy_ledger"
        )
    behind = [r["delta"] for r in others if r["run"] in terms["builds_on"]]
    if terms["delta"] > min(behind, default=1):
        raise UsageError(
            f"--target_delta {terms['delta']:g} is above the {min(behind):g} of what this run "
            "builds on, whose epsilon would look smaller at it: give a --target_delta that is not"
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
    events, delta = compose_with_bases(records)
    spent = pld_epsilon(events, delta)
    if spent > cap:
        before, _ = compose_with_bases(records[:-1])
        held = pld_epsilon(before, delta) if before else 0.0
        raise UsageError(
            f"this run would bring the ledger {path} to epsilon {quote(spent)}, above "
            f"--total_epsilon {cap:g}; what is spent or reserved there comes to {quote(held)} at "
            f"delta {delta:g}, the smallest on record" + _describe_unfinished(records[:-1])
        )


def _describe_unfinished(records: list[dict]) -> str:
    live = [run for run in dict.fromkeys(r["run"] for r in records) if is_live(records, run)]
    if not live:
        return ""
    return (
        f" (unfinished: {', '.join(live)}; resume them, or hand back what they did not use with "
        "privacy_report.py give_up)"
    )


def list_released_steps(records: list[dict], of_branch: int | None = None) -> set[int]:
    """The steps that some branch, or that one, released and did not take back."""
    released = {(r["branch"], r["step"]) for r in records if r["kind"] == "release"}
    written = {(r["branch"], r["step"]) for r in records if r["kind"] == "wrote"}
    voided = {(r["branch"], r["step"]) for r in records if r["kind"] == "void"}
    return {s for b, s in released - (voided - written) if of_branch in (None, b)}


def is_live(records: list[dict], run: str) -> bool:
    """Whether some of what the run's last branch reserved is neither released nor handed back."""
    return count_charged_steps(records, run) > count_charged_steps(records, run, live=False)


def count_charged_steps(records: list[dict], run: str, live: bool = True) -> int:
    """The steps that a run is charged for; with `live`, those it still holds in reserve too."""
    return sum(steps for _, steps in _charge_branches(records, run, live))


def _charge_branches(records: list[dict], run: str, live: bool) -> list[tuple[dict, int]]:
    """The reservation of each branch of a run, and the steps that it is charged for."""
    run_records = select_run(records, run)
    reservations = [r for r in run_records if r["kind"] == "reserve"]
    last = run_records[-1]["branch"] if run_records else None
    handed_back = any(r["kind"] == "give_up" and r["branch"] == last for r in run_records)
    charged = []
    for reservation in reservations:
        branch_records = [r for r in run_records if r["branch"] == reservation["branch"]]
        until = max(list_released_steps(branch_records), default=reservation["from_step"])
        if live and reservation is reservations[-1] and not handed_back:
            until = max(until, reservation["event"]["steps"])
        charged.append((reservation, until - reservation["from_step"]))
    return charged


def is_stopped_short(records: list[dict], run: str) -> bool:
    """Whether the last weights that a run wrote are of fewer steps than it had reserved."""
    own = select_run(records, run)
    written = [r["step"] for r in own if r["kind"] == "wrote" and r["output"] == WEIGHTS]
    planned = [r["event"]["steps"] for r in own if r["kind"] == "reserve"]
    return bool(written) and written[-1] < planned[-1]


def list_made_with(records: list[dict], runs: list[str]) -> list[dict]:
    """How each branch of `runs` that released steps was made, oldest first
    (`Circumstances.made_with`)."""
    unknown = {"randomness": NOT_STATED, "precision": NOT_STATED, "is_audited": False}
    return [
        reservation.get("made_with", unknown)
        for run in runs
        for reservation, steps in _charge_branches(records, run, live=False)
        if steps
    ]


def recall_runs(about: Circumstances, records: list[dict], runs: list[str]) -> Circumstances:
    """`about` the last of `runs`, as the ledger knows how all its steps, and those of the runs that
    it builds on, were made, and whether one was stopped."""
    own, every = (list_made_with(records, which) for which in (runs[-1:], runs))
    stopped = about.is_stopped or any(is_stopped_short(records, run) for run in runs)
    return replace(recall(about, own, every), is_stopped=stopped)


def list_bases(records: list[dict]) -> list[dict]:
    """The private base models of the runs that a ledger is charged for, each once, with what they
    cost elsewhere (`statement.summarise_base`); none that this ledger itself has paid for."""
    here, found = {record["hash"] for record in records if "hash" in record}, {}
    for record in records:
        base = record.get("made_with", {}).get("base")
        if base is None or not count_charged_steps(records, record["run"]):
            continue
        if not set(base["entries"]) <= here:
            found[repr((base["entries"], base["events"]))] = base  # some have no entry to tell by
    return list(found.values())


def compose_with_bases(records: list[dict], own: dict | None = None) -> tuple[list[dict], float]:
    """All that a ledger is charged for, and what is behind the base models of its runs; and the
    smallest delta of those, at which all would come to the largest epsilon (1 of none).

    Args:
        own: the base of a statement, which may know more of it than the ledger, as one that was
            written before ledgers noted bases.
    """
    charged, bases = list_charged_events(records), list_bases(records)
    here = {record["hash"] for record in records if "hash" in record}
    if own is not None and not set(list_base_entries(own)) <= here:
        bases = [own, *(base for base in bases if not begins_with(own, base))]
    deltas = [find_smallest_delta(records)] if charged else []
    events = [event for base in bases for event in base["events"]]
    return [*events, *charged], min([*deltas, *(base["delta"] for base in bases)], default=1.0)


def list_charged_events(records: list[dict], only: list[str] | None = None) -> list[dict]:
    """The mechanisms that a ledger is charged for, one a run, oldest first; of `only` these runs.

    A run whose plan changed before its first step is charged by the plan that it was trained with.
    """
    events = []
    for run in dict.fromkeys(r["run"] for r in records):
        steps = count_charged_steps(records, run)
        if steps and (only is None or run in only):
            terms = [r for r in records if r["run"] == run and r["kind"] == "reserve"][-1]
            events.append({**terms["event"], "steps": steps})
    return events


def list_prior(
    records: list[dict], runs: tuple[str, ...]
) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """What a run that builds on `runs` composes with: their events, and the runs, each once."""
    if not runs:
        return (), ()
    return tuple(list_charged_events(records, list(runs))), tuple(dict.fromkeys(runs))


def find_smallest_delta(records: list[dict]) -> float:
    """The smallest delta of the runs that a ledger is charged for: everything together is quoted at
    it. Raises: ValueError if there is none."""
    return min(
        record["delta"]
        for record in records
        if record["kind"] == "reserve" and count_charged_steps(records, record["run"])
    )


def summarise_runs(records: list[dict]) -> list[dict]:
    """What each run of a ledger planned and released, and whether it is over."""
    runs = []
    for run in dict.fromkeys(r["run"] for r in records):
        run_records = select_run(records, run)
        given_up = run_records[-1]["kind"] == "give_up"
        state = "given up" if given_up else "unfinished" if is_live(records, run) else "finished"
        planned = [r for r in run_records if r["kind"] == "reserve"][-1]["event"]["steps"]
        released = count_charged_steps(records, run, live=False)
        runs.append({"run": run, "released": released, "planned": planned, "state": state})
    return runs
