"""What a statement, a ledger's records and checkpoints must satisfy, each by itself and together.

Every check returns what is wrong: a sentence each, none if all is well.
"""

import math
from pathlib import Path

from utils.errors import UsageError
from utils.ledger.charges import (
    CHECKPOINT,
    WEIGHTS,
    compose_with_bases,
    count_charged_steps,
    list_charged_events,
    list_released_steps,
    recall_runs,
    select_run,
)
from utils.ledger.checkpoints import list_kept, list_steps, locate_checkpoint, read_about
from utils.ledger.statement import (
    NOT_STATED,
    SCHEMA_VERSION,
    STOPPED,
    UNKNOWN_BASE,
    Circumstances,
    begins_with,
    list_all_events,
)
from utils.privacy.accounting import (
    SMALLEST_DELTA,
    membership_power,
    pld_both_relations,
    prv_epsilon,
    prv_error,
)

# Versions of the accountants may differ this much, the second by so much of epsilon.
PLD_TOLERANCE, PRV_TOLERANCE, PRV_RELATIVE_TOLERANCE = 1e-3, 0.02, 2e-3


def check_statement(statement: dict) -> list[str]:
    """What is wrong with a statement by itself: a sentence each; none if it can be recomputed."""
    try:
        return _check_content(statement)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [f"the statement is malformed: {error!r}"]


def _check_content(statement: dict) -> list[str]:
    schema = statement.get("schema_version")
    if schema not in range(1, SCHEMA_VERSION + 1):
        return [f"the statement has schema version {schema}, none of 1 to {SCHEMA_VERSION}"]
    if statement.get("private") is not True:
        return ["the statement is stamped NOT PRIVATE"]
    missing = {"epsilon", "delta", "num_units", "privacy_unit", "events", "accountants", "files"}
    missing |= {"membership_inference"} if schema > 1 else set()
    missing -= set(statement)
    if missing:
        return [f"the statement lacks {', '.join(sorted(missing))}"]
    strange = [name for name in statement["files"] if not _is_plain(name)]
    if strange:
        return [f"the statement is about a file outside of its folder, {strange[0]!r}"]
    units, delta = statement["num_units"], statement["delta"]
    problems = []
    if not isinstance(units, int) or units < 1:
        return [f"the number of units is {units}"]
    if not SMALLEST_DELTA <= delta < 1 / units:
        problems.append(
            f"delta {delta:g} is not below 1/N = {1 / units:.3g}, or is so small, below "
            f"{SMALLEST_DELTA:g}, that no accountant is exact"
        )
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
        epsilon, at = everything["epsilon"], everything.get("delta", delta)
        problems += _check_epsilon(everything["events"], at, epsilon, "its ledger's total")
        own = statement["epsilon"]
        if at > delta or any(epsilon[relation] < own[relation] - PLD_TOLERANCE for relation in own):
            problems.append("its ledger's total is less than its own, or at a larger delta")
    if "base" in statement:
        total, events = statement["base"], list_all_events(statement)
        problems += _check_epsilon(events, total["delta"], total["epsilon"], "it and its base")
        if not total["delta"] <= delta:
            problems.append("it and its base are quoted at a larger delta than the statement")
    if not problems and schema > 1:
        problems += _check_power(statement)
    return problems


def _is_plain(name: str) -> bool:
    """Whether a name leads to a file of the folder itself, and can be shown as it is."""
    return name.isprintable() and not {"", "..", "."} & set(name.split("/"))


def _check_power(statement: dict) -> list[str]:
    claimed = statement["membership_inference"]
    return [
        f"it says that membership inference succeeds {claimed.get(rate)} of the time at a "
        f"false-positive rate of {rate}; its events allow {power:.4f}"
        for rate, power in membership_power(list_all_events(statement)).items()
        if not abs(claimed.get(rate, math.nan) - power) <= PLD_TOLERANCE
    ]


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
        if not -PLD_TOLERANCE * min(1, epsilon) <= claimed[relation] - epsilon <= PLD_TOLERANCE
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
    """Where a statement and the ledger that it refers to differ, as that is now."""
    problems, run = check_entry(statement, records), statement["ledger"]["run"]
    index = _find_entry(statement, records)
    if index is None:
        return problems
    before, now = (
        count_charged_steps(part, run, live=False) for part in (records[: index + 1], records)
    )
    if now > before:
        problems.append(f"the run has released {now - before} more steps since this statement")
    return problems


def _find_entry(statement: dict, records: list[dict]) -> int | None:
    entry = statement["ledger"]["entry"]
    return next((r["index"] for r in records if r["hash"] == entry), None)


def check_entry(statement: dict, records: list[dict]) -> list[str]:
    """Where a statement and a ledger differ, as that was when the statement was written."""
    run, index = statement["ledger"]["run"], _find_entry(statement, records)
    if index is None:
        return ["the ledger does not hold the entry that the statement refers to"]
    record, problems = records[index], []
    if (record["kind"], record["run"], record.get("output")) != ("wrote", run, WEIGHTS):
        return ["the statement refers to an entry that is not about its weights"]
    if record["files"] != statement["files"]:
        problems.append("the ledger paid for other files than the statement names")
    earlier = [r for r in records[:index] if r["kind"] == "reserve"]
    terms = [r for r in earlier if r["run"] == run][-1]
    behind = [r["delta"] for r in earlier if r["run"] in terms["builds_on"]]
    if terms["delta"] > min(behind, default=1):
        problems.append(f"its delta is above {min(behind):g}, that of a run that it builds on")
    charged = list_charged_events(records[: index + 1], [*terms["builds_on"], run])
    if charged != statement["events"]:
        problems.append("the ledger's events are not those of the statement")
    base = terms.get("made_with", {}).get("base")
    if base is not None and not begins_with(statement.get("base"), base):
        problems.append("the ledger has a private base model that the statement does not count")
    everything, delta = compose_with_bases(records[: index + 1], statement.get("base"))
    own = list_all_events(statement | {"events": charged})
    total = statement["ledger"].get("everything", {"events": own})
    if total["events"] != everything:
        problems.append("the statement's total is not that of the ledger")
    if "epsilon" in total and total.get("delta", statement["delta"]) != delta:
        problems.append("the statement's total is not quoted at the ledger's smallest delta")
    for key in ("delta", "num_units", "privacy_unit", "private"):
        if terms[key] != statement[key]:
            problems.append(f"the ledger says {key} {terms[key]}, the statement {statement[key]}")
    runs = [*terms["builds_on"], run]
    return problems + _check_circumstances(statement, records[: index + 1], runs)


def _check_circumstances(statement: dict, records: list[dict], runs: list[str]) -> list[str]:
    """Where a statement says otherwise than the ledger how `runs`, of which the last is its own,
    were made: what the guarantee rests on."""
    made, problems = recall_runs(Circumstances(audit={}), records, runs), []
    for key, there in (("randomness", made.randomness), ("precision", made.precision)):
        here = statement.get(key, NOT_STATED)
        if NOT_STATED not in there and here != there:
            problems.append(f"the ledger says {key} {there}, the statement {here}")
    if statement.get("audit") is not None and made.audit is None:
        problems.append("the statement has an audit, of which the ledger has none")
    doubts = {UNKNOWN_BASE: not made.is_base_known, STOPPED: made.is_stopped}
    return problems + [
        f"the statement does not say that it leaves out {doubt}"
        for doubt, is_due in doubts.items()
        if is_due and doubt not in statement.get("not_covered", ())
    ]


def check_checkpoints(records: list[dict], folder: Path) -> list[str]:
    """Checkpoints on disk that the ledger did not announce, or that are damaged."""
    problems = []
    for step in list_steps(folder):
        try:
            if read_about(locate_checkpoint(folder, step))["step"] != step:
                problems.append(f"{CHECKPOINT}-{step} is of another step")
        except UsageError as error:
            problems.append(str(error))
    return problems + check_released(records, folder)


def check_released(records: list[dict], folder: Path) -> list[str]:
    """Checkpoints on disk, those set aside too, that the ledger did not announce: so it is an older
    copy of itself."""
    problems = []
    for name, about in list_kept(folder):
        of_run = select_run(records, about["run"])
        if about["step"] not in list_released_steps(of_run, about.get("branch")):
            problems.append(f"the ledger did not release {name}")
    return problems
