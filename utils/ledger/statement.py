"""privacy.json: the public statement of what a run spent."""

import hashlib
import json
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from utils.files import STATEMENT, write_durably
from utils.privacy.accounting import Spent, account, membership_power, pld_both_relations, quote
from utils.privacy.plan import PrivacyPlan
from utils.version import VERSION, find_commit

SCHEMA_VERSION = 2
NOT_STATED = "not stated"
UNKNOWN_BASE = "the base model, of which nobody could tell offline whether it is a private result"
BASE_CHECKSUM = "base_model_checksum"
STOPPED = "the choice of the step to stop at, if that was made by looking at what the run had shown"
DOUBTS = (UNKNOWN_BASE, STOPPED)  # what is made of a result inherits them


@dataclass(frozen=True)
class Circumstances:
    """What a statement says beside its mechanisms; all of it is public.

    Attributes:
        is_private: False if the noise was reproducible.
        randomness: where noise and batches came from (`SecretRandomness.source`).
        precision: of the forward and backward pass: fp32 or bf16.
        audit: what an audit of this very set-up proved; None if there was none.
        base: the verified statement of the base model, if that is a private result itself.
        base_checksum: of the base model's weights (`training.checksum`); None without a model.
        is_base_known: whether anyone could tell that (`fetch_statement`).
        is_stopped: whether it, or what it builds on, was to take more steps: that would have been
            paid for whatever was looked at, and fewer are only if nobody chose how many by looking
            (Rogers et al. 2016: an odometer is no filter).
    """

    is_private: bool = True
    randomness: str = NOT_STATED
    precision: str = "fp32"
    audit: dict | None = None
    base: dict | None = None
    base_checksum: int | None = None
    is_base_known: bool = True
    is_stopped: bool = False

    def made_with(self) -> dict:
        """What the ledger records of these: some may change when a run is resumed, and a base model
        is not told from its weights to be a private result."""
        return {
            "randomness": self.randomness,
            "precision": self.precision,
            "is_audited": self.audit is not None,
            "is_base_known": self.is_base_known,
            "base": None if self.base is None else summarise_base(self.base),
        }


def recall(about: Circumstances, own: list[dict], every: list[dict]) -> Circumstances:
    """`about`, and how what it was resumed from, and what it builds on, was made.

    Args:
        own, every: `charges.list_made_with` of the run; of it and those that it builds on.
    """
    return replace(
        about,
        randomness="; ".join(dict.fromkeys(made["randomness"] for made in every)),
        precision=", then ".join(dict.fromkeys(made["precision"] for made in own)),
        audit=about.audit if all(made["is_audited"] for made in own) else None,
        is_base_known=about.is_base_known
        and all(made.get("is_base_known", True) for made in every),
    )


def build_statement(
    plan: PrivacyPlan, events: list[dict], spent: Spent, about: Circumstances
) -> dict:
    """The public `privacy.json`: everything needed to recompute epsilon with public tools.

    `events` are what the run was charged for, and `spent` what they come to. A run with debug
    (reproducible) noise has no guarantee, and its statement gives no epsilon.
    """
    packages = ["torch", "diffusers", "peft", "accelerate", "dp-accounting", "opacus", "numpy"]
    statement = {
        "schema_version": SCHEMA_VERSION,
        "private": about.is_private,
        "epsilon": spent.both_relations(),
        "delta": plan.delta,
        "privacy_unit": plan.unit_name,
        "num_units": plan.num_units,
        # Any number of a unit's rows may be sampled: the bound is on its gradient.
        "max_rows_per_unit": 1 if plan.unit_column is None else None,
        "events": events,
        "accountants": {
            "pld": {"version": version("dp-accounting"), "epsilon": spent.add_or_remove_one},
            "prv": {"version": version("opacus"), "epsilon": spent.prv},
        },
        "not_covered": [
            "pretraining data, of the base model and of networks that images are compared by",
            "choices made by looking at the private or held-out images, or at results on them",
            "the number of units, N",
            "prompts, class names and caption templates, which are published as they were given",
            *([] if about.is_base_known else [UNKNOWN_BASE]),
            *([STOPPED] if about.is_stopped else []),
        ],
        "made_by": {"version": VERSION, "commit": find_commit()},
        "date": datetime.now(UTC).date().isoformat(),
        "randomness": about.randomness,
        "precision": about.precision,
        "software": {name: version(name) for name in packages},
        "audit": about.audit,
    }
    if about.base_checksum is not None:
        statement[BASE_CHECKSUM] = about.base_checksum
    if not about.is_private:
        statement["epsilon"] = {"add_or_remove_one": None, "replace_one": None}
        for accountant in statement["accountants"].values():
            accountant["epsilon"] = None
        statement["warning"] = "NOT PRIVATE: trained with reproducible noise, for debugging only"
        return statement
    statement["membership_inference"] = membership_power(events)
    return statement if about.base is None else add_base(statement, about.base)


def list_all_events(statement: dict) -> list[dict]:
    """The events behind a result, those of its base model included."""
    return [*statement.get("base", {}).get("events", []), *statement["events"]]


def add_base(statement: dict, base: dict) -> dict:
    """The statement of a result whose base model is a private result, too.

    Its `base` has the events of the base model, and what all events come to together, at the
    smaller delta: an upper bound also if both are about the same people. The power of membership
    inference is that against both, too. What is doubted about the base is doubted about it.
    """
    behind = summarise_base(base)
    delta = min(statement["delta"], behind["delta"])
    together = [*behind["events"], *statement["events"]]
    total = behind | {"delta": delta, "epsilon": pld_both_relations(together, delta)}
    power = membership_power(together)
    return add_doubts(statement, list_doubts(base)) | {"base": total, "membership_inference": power}


def list_doubts(statement: dict | None) -> list[str]:
    """Which of `DOUBTS` a statement has under `not_covered`; none without a statement."""
    return [doubt for doubt in DOUBTS if doubt in (statement or {}).get("not_covered", ())]


def add_doubts(statement: dict, doubts: list[str]) -> dict:
    """`statement`, whose guarantee has these conditions, too."""
    if not doubts:
        return statement
    not_covered = dict.fromkeys([*statement.get("not_covered", []), *doubts])
    return statement | {"not_covered": list(not_covered)}


def summarise_base(base: dict) -> dict:
    """All events behind a base model, its own base's included, the smallest delta at which they
    were quoted, and the entries that they are paid by.

    Args:
        base: a statement, or the `base` of one.
    """
    delta = min(base["delta"], base.get("base", base)["delta"])
    entries = list_base_entries(base)
    return {"events": list_all_events(base), "delta": delta, "entries": entries}


def begins_with(paid: dict | None, behind: dict) -> bool:
    """Whether all that is `behind` a result comes first in what was `paid`.

    Args:
        paid, behind: a statement, its `base`, or what `summarise_base` made of either.
    """
    paid = {"events": [], "entries": []} if paid is None else summarise_base(paid)
    behind = summarise_base(behind)
    return all(paid[key][: len(behind[key])] == behind[key] for key in ("events", "entries"))


def list_base_entries(base: dict) -> list[str]:
    """The entries of ledgers that a base model's weights, and those of its own base, are paid by.

    Two runs of one recipe have the same events, but no entry in common; nor, where there is none,
    the digest of their files, which stands for it.

    Args:
        base: a statement, or the `base` of one.
    """
    before = base.get("base", {}).get("entries", [])
    files = json.dumps(base.get("files"), sort_keys=True)
    digest = hashlib.sha256(files.encode()).hexdigest()
    return base.get("entries", [*before, base.get("ledger", {}).get("entry") or f"files {digest}"])


def describe_cost(plan: PrivacyPlan, base: dict | None, recharged: int = 0) -> str:
    """Epsilon and delta of a plan, in words; with what its base model cost, if that is private.

    Args:
        base: its statement, or the `base` of one. recharged: steps charged beyond the plan.
    """
    events = plan.events(plan.steps + recharged)
    spent = account(events, plan.delta)
    said = f"epsilon {quote(spent.add_or_remove_one)} at delta {plan.delta:g}"
    if base is None:
        return said
    epsilon, delta = quote_plan(plan, base, recharged)
    total = epsilon["add_or_remove_one"]
    return f"{said}, {quote(total)} at delta {delta:g} with what its private base model cost"


def quote_plan(
    plan: PrivacyPlan, base: dict | None, recharged: int = 0
) -> tuple[dict[str, float], float]:
    """Epsilon under both relations, and delta, of a plan and of what is behind its base model.
    Arguments as of `describe_cost`."""
    events = plan.events(plan.steps + recharged)
    if base is None:
        return account(events, plan.delta).both_relations(), plan.delta
    total = add_base({"events": events, "delta": plan.delta}, base)["base"]
    return total["epsilon"], total["delta"]


def quote_total(statement: dict) -> tuple[float, float]:
    """Epsilon, for adding or removing one unit, and delta of a private result with its base."""
    total = statement.get("base", statement)
    return total["epsilon"]["add_or_remove_one"], total["delta"]


def write_statement(statement: dict, output_dir: Path) -> None:
    """Write `privacy.json`; do so before the weights that it accounts for."""
    write_durably(output_dir / STATEMENT, json.dumps(statement, indent=2) + "\n")
