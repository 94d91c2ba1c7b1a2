"""Whether a base model is a private result itself, which brings its epsilon along."""

import sys
from functools import cache
from pathlib import Path, PurePosixPath

from utils.errors import UsageError
from utils.fetching import fetch_file
from utils.files import DENOISERS, PRIVATE_MARK
from utils.ledger.checks import check_statement
from utils.ledger.verification import fetch_statement, find_changed, read_json, read_source


def read_base_statement(name: str, revision: str | None = None) -> tuple[dict | None, bool]:
    """`fetch_statement` of a base model, or of the folder of a single file: one that is a private
    result brings its epsilon along. Says so, once, if nobody can tell.

    Raises:
        UsageError: its statement does not hold, is of other weights, or was left behind.
    """
    file = Path(name).name if Path(name).is_file() else None
    name = name if file is None else str(Path(name).parent)
    statement, is_known = fetch_statement(name, revision)
    is_marked = _is_marked(name, revision)
    if statement is not None and statement.get("private") is not False:
        problems = check_statement(statement) or _check_weights(statement, name, revision)
        if not problems and file is not None and file not in statement["files"]:
            problems.append(
                f"{file}: it does not account for it; if that is public, move it elsewhere"
            )
        if not problems and is_marked and not _knows_denoiser(statement):
            problems.append("it is not of the denoiser, which was trained on private images")
        if problems:
            raise UsageError(f"the privacy.json of the base model {name}: {'; '.join(problems)}")
    if statement is None and is_marked:
        raise UsageError(
            f"the base model {name} was trained on private images, and the privacy.json that came "
            "with its weights is not there: put it beside model_index.json"
        )
    if statement is None and not is_known:
        _warn_of_unknown(name)
    return statement, is_known


def _check_weights(statement: dict, name: str, revision: str | None) -> list[str]:
    """Where the folders of a base model that its statement is about hold other files than were paid
    for, also on the Hub: a sentence each. Its other parts are public."""
    source, paid = read_source(name, revision), statement["files"]
    parts = {PurePosixPath(file).parts[0] for file in paid if "/" in file}
    unpaid = [f for f in source.extras if PurePosixPath(f).parts[0] in parts and f not in paid]
    problems = find_changed(statement, source.folder)
    return problems + [f"{file}: the statement does not account for it" for file in unpaid]


def _knows_denoiser(statement: dict) -> bool:
    """Whether it is about a whole denoiser, or about what was trained on one and counts that."""
    parts = {PurePosixPath(file).parts[0] for file in statement["files"]}
    return "base" in statement or not parts.isdisjoint(DENOISERS)


def _is_marked(name: str, revision: str | None) -> bool:
    """Whether the denoiser of a pipeline says that it was trained on private images."""
    for part in DENOISERS:
        config, _ = fetch_file(name, f"{part}/config.json", revision)
        if config is not None and read_json(config).get(PRIVATE_MARK):
            return True
    return False


@cache
def _warn_of_unknown(name: str) -> None:
    print(
        f"warning: without the Hub nobody can tell whether {name} is a private result itself, "
        "whose epsilon would have to be added; it is taken as public",
        file=sys.stderr,
    )
