"""Which ledgers a private set was charged to, remembered outside all output folders.

Two ledgers about the same people know nothing of each other, though their budgets add up. This
file lets a new run warn of the others. It is a reminder and no proof: it knows only the runs of
this user on this machine.
"""

import json
import os
import sys
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from utils.errors import UsageError
from utils.files import make_private, resolve_if_there, write_durably
from utils.ledger.charges import compose_with_bases, select_run
from utils.ledger.ledger import Ledger
from utils.privacy.accounting import pld_epsilon, quote


def locate_memory() -> Path:
    """The file: in XDG_STATE_HOME, or in ~/.local/state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "private-adapters" / "ledgers.json"


def remember_run(source: str, ledger: Ledger, run: str, epsilon: float, delta: float) -> None:
    """Note that `source`, a folder or Hub id, is charged to `ledger` for `run`, unless it is known.

    Args:
        epsilon: what the run plans to spend, add or remove one, at `delta`.
    """
    path = locate_memory()
    entry = {"ledger": str(ledger.path), "run": run, "epsilon": epsilon, "delta": delta}
    entry["date"] = datetime.now(UTC).date().isoformat()
    try:
        make_private(path.parent)
        with FileLock(path.with_name(f"{path.name}.lock")):
            known = _read(path)
            entries = known.setdefault(source, [])
            if not any(e["ledger"] == entry["ledger"] and e["run"] == run for e in entries):
                entries.append(entry)
                write_durably(path, json.dumps(known, indent=2) + "\n")
    except OSError as error:
        print(f"warning: later runs cannot be warned of this ledger: {error}", file=sys.stderr)


def find_other_ledgers(source: str, ledger: Ledger) -> list[str]:
    """A sentence for each ledger but `ledger` that `source` was charged to, and for each run that
    was charged to a ledger which is gone; and what several such ledgers come to, if they protect
    the same unit."""
    entries, sentences = _read(locate_memory()).get(source, []), []
    spent, deltas, units = [], [], []
    for path in dict.fromkeys(entry["ledger"] for entry in entries):
        try:
            records = Ledger(path).records()
        except UsageError:  # damaged, or not to be read: as good as gone
            records = []
        charged = [entry for entry in entries if entry["ledger"] == path]
        events, delta = compose_with_bases(records)
        if path != str(ledger.path) and events:
            sentences.append(
                f"{source} was also charged to the ledger {path}, which stands at epsilon "
                f"{quote(pld_epsilon(events, delta))} at delta {delta:g}. For the same people both "
                f"add up: --privacy_ledger {path} would count them together"
            )
            spent, deltas = [*spent, *events], [*deltas, delta]
            units.append({r["privacy_unit"] for r in records if "privacy_unit" in r})
        sentences += [
            f"{source} was also charged to run {entry['run']} of {entry['date']} (planned epsilon "
            f"{quote(entry['epsilon'])} at delta {entry['delta']:g}), whose ledger {path} is gone. "
            "If anything that it made was kept or shown, that adds up"
            for entry in charged
            if not select_run(records, entry["run"])
        ]
    if len(deltas) > 1 and len(set.union(*units)) == 1:
        sentences.append(
            f"those {len(deltas)} ledgers come to at most epsilon "
            f"{quote(pld_epsilon(spent, min(deltas)))} at delta {min(deltas):g} together, without "
            "this run"
        )
    return sentences


def find_own_ledger(name: str) -> str | None:
    """A ledger that the images of a folder or Hub id, by any of its configurations, were charged
    to, if any is remembered."""
    known, own = _read(locate_memory()), resolve_if_there(name)
    found = [e for key in known if key == own or key.startswith(f"{own}, ") for e in known[key]]
    return found[-1]["ledger"] if found else None


def warn_of_other_ledgers(source: str, ledger: Ledger) -> None:
    """Say on stderr where else `source` was charged."""
    for sentence in find_other_ledgers(source, ledger):
        print(f"warning: {sentence}", file=sys.stderr)


def _read(path: Path) -> dict[str, list[dict]]:
    try:
        known = json.loads(path.read_text())
        return known if isinstance(known, dict) else {}
    except (OSError, ValueError):
        return {}
