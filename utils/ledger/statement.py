"""privacy.json: the public statement of what a run spent."""

import json
from importlib.metadata import version
from pathlib import Path

from utils.files import STATEMENT, write_durably
from utils.privacy.accounting import Spent
from utils.privacy.plan import PrivacyPlan


def build_statement(plan: PrivacyPlan, events: list[dict], spent: Spent, is_private: bool) -> dict:
    """The public `privacy.json`: everything needed to recompute epsilon with public tools.

    `events` are what the run was charged for, and `spent` what they come to. A run with debug
    (reproducible) noise has no guarantee, and its statement gives no epsilon.
    """
    packages = ["torch", "diffusers", "peft", "accelerate", "dp-accounting", "opacus", "numpy"]
    statement = {
        "schema_version": 1,
        "private": is_private,
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
            "pretraining data",
            "choices made by looking at other private results",
            "the number of units, N",
            "prompts, class names and caption templates, which are published as they were given",
        ],
        "software": {name: version(name) for name in packages},
        "audit": None,
    }
    if not is_private:
        statement["epsilon"] = {"add_or_remove_one": None, "replace_one": None}
        for accountant in statement["accountants"].values():
            accountant["epsilon"] = None
        statement["warning"] = "NOT PRIVATE: trained with reproducible noise, for debugging only"
    return statement


def write_statement(statement: dict, output_dir: Path) -> None:
    """Write `privacy.json`; do so before the weights that it accounts for."""
    write_durably(output_dir / STATEMENT, json.dumps(statement, indent=2) + "\n")
