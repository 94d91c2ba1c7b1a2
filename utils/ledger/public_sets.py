"""Whether images are known to come from private ones: neither public, nor a private set anew."""

import json
import sys
from pathlib import Path

from utils.errors import UsageError
from utils.fetching import fetch_file
from utils.files import SAMPLING_SETTINGS, STATEMENT, resolve_if_there
from utils.ledger.remembered import find_own_ledger
from utils.ledger.verification import fetch_statement
from utils.listing import find_reach

IS_PUBLIC = "is_public"  # in sampling.json: whether nothing private is behind the images


def refuse_as_public(argument: str, name: str | None, revision: str | None = None) -> None:
    """Refuse to take as public what sample.py, or a stage, made of private images; warn where that
    cannot be known, or of images that were charged to a ledger as private ones on this machine.

    Args:
        argument: what takes them as public, for messages. name: folder or Hub id; None: no set.

    Raises:
        UsageError: `name` carries a privacy statement, is part of what does, or holds it.
    """
    if name is None:
        return
    carrier, is_known = find_carrier(name, revision)
    if carrier is not None:
        raise UsageError(
            f"{argument} {name}: {carrier} has a privacy.json, so it was made of private images, "
            "and what is made of it here would be called public and lose that epsilon"
        )
    if not is_known:
        _warn(argument, name, "may have a privacy.json on the Hub, which cannot be reached")
    settings, _ = fetch_file(name, SAMPLING_SETTINGS, revision, "dataset")
    if settings is not None and not _is_public(settings.read_text()):
        _warn(
            argument, name, "was drawn by what nobody could tell to be public, or by a private run"
        )
    ledger = find_own_ledger(name)
    if ledger is not None:
        _warn(argument, name, f"was charged to the ledger {ledger} as private images")


def refuse_as_private(name: str) -> None:
    """Refuse to protect anew, as if they were somebody's, images that were made of private ones:
    whoever is behind them has the epsilon of those, which would be missing.

    Args:
        name: of the private set of a run: folder or Hub id.

    Raises:
        UsageError: `name` carries a privacy statement, is part of what does, or holds it.
    """
    carrier, _ = find_carrier(name)
    if carrier is not None:
        raise UsageError(
            f"the private set {name}: {carrier} has a privacy.json, so these images were made of "
            "private ones, and what those cost would be missing in what is made here; give them as "
            "--warm_start, which counts it (or move that elsewhere, if it only lies among the "
            "images)"
        )


def refuse_own_images(
    names: list[str], private: str, otherwise: str = "what is public must lie elsewhere"
) -> None:
    """Refuse to take a run's own private images as public.

    Args:
        names: what the run takes as public: folders or Hub ids. private: those of the images.
        otherwise: what to do.

    Raises:
        UsageError: one is `private`, is part of it, or holds it.
    """
    own, reach = Path(resolve_if_there(private)), find_reach(private)
    for name in names:
        other = Path(resolve_if_there(name))
        nested = own.is_relative_to(other) or other.is_relative_to(own)
        if nested or find_reach(name).meets(reach):
            raise UsageError(
                f"{name} is the private images' own folder, {private}, or one is in the other, or "
                f"leads to it by a link: {otherwise}"
            )


def find_carrier(name: str, revision: str | None = None) -> tuple[str | None, bool]:
    """What has the privacy statement of a folder or Hub id of images: that itself; what it is a
    part of (the data of a set, the samples of an adapter); or a folder in it, also behind a link.
    And whether the absence of all is known."""
    statement, is_known = fetch_statement(name, revision, "dataset")
    if statement is not None:
        return name, True
    folder = Path(name).resolve()
    if not folder.is_dir():
        return None, is_known
    reach = find_reach(name)
    read = [folder, *sorted(reach.places | {path.parent for path in reach.linked})]
    around = [path.parent for path in read if (path.parent / SAMPLING_SETTINGS).is_file()]
    around += [*read, *(path.parent for path in sorted(folder.rglob(STATEMENT)))]
    return next((str(path) for path in around if (path / STATEMENT).is_file()), None), True


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
