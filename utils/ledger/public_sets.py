"""Whether images that someone calls public are known to come from private ones."""

import json
import sys

from utils.errors import UsageError
from utils.fetching import fetch_file
from utils.files import SAMPLING_SETTINGS
from utils.ledger.remembered import find_own_ledger
from utils.ledger.verification import fetch_statement

IS_PUBLIC = "is_public"  # in sampling.json: whether nothing private is behind the images


def refuse_private_set(argument: str, name: str | None, revision: str | None = None) -> None:
    """Refuse to take as public what sample.py, or a stage, made of private images; warn where that
    cannot be known, or of images that were charged to a ledger as private ones on this machine.

    Args:
        argument: what takes them as public, for messages. name: folder or Hub id; None: no set.

    Raises:
        UsageError: `name` carries a privacy statement.
    """
    if name is None:
        return
    if fetch_statement(name, revision, "dataset")[0] is not None:
        raise UsageError(
            f"{argument} {name} has a privacy.json: it was made of private images, and what is "
            "made of it here would be called public and lose that epsilon"
        )
    settings, _ = fetch_file(name, SAMPLING_SETTINGS, revision, "dataset")
    if settings is not None and not _is_public(settings.read_text()):
        _warn(argument, name, "was drawn by what nobody could tell to be public, or not")
    ledger = find_own_ledger(name)
    if ledger is not None:
        _warn(argument, name, f"was charged to the ledger {ledger} as private images")


def _warn(argument: str, name: str, why: str) -> None:
    print(
        f"warning: {argument} {name} {why}; here it is taken as public, and what is made of it has "
        "no epsilon",
        file=sys.stderr,
    )


def _is_public(text: str) -> bool:
    """What a sampling.json says; one that does not say is none of sample.py's sets."""
    try:
        return json.loads(text).get(IS_PUBLIC, True) is True
    except (ValueError, AttributeError):
        return False
