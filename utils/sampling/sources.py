"""What images are generated from, and the verified privacy statement that covers them."""

import sys
from dataclasses import dataclass
from pathlib import Path

from accelerate import PartialState

from utils.arguments.sampling import SamplingArguments
from utils.arguments.training import ModelArguments
from utils.errors import UsageError, on_main_process
from utils.files import STATEMENT
from utils.ledger.bases import read_base_statement
from utils.ledger.statement import (
    BASE_CHECKSUM,
    UNKNOWN_BASE,
    add_base,
    add_doubts,
    list_all_events,
    list_base_entries,
    list_doubts,
)
from utils.ledger.verification import find_problems, read_source
from utils.models.adapters import fetch_adapter


@dataclass(frozen=True)
class ImageSource:
    """A base model, and perhaps an adapter.

    Attributes:
        adapter: its folder, which was downloaded if it is on the Hub, or a LoRA file; or None.
        statement: what covers the images, verified; None if there is none.
        is_public: without a statement: whether nothing private is known to be behind the images.
            An adapter without one may hold anything; so may a base on a Hub that was not reached.
    """

    adapter: Path | None = None
    statement: dict | None = None
    is_public: bool = True


def find_source(model: ModelArguments, sampling: SamplingArguments) -> ImageSource:
    """Find the adapter and the statements of it and of the base model, and verify them.

    Raises:
        UsageError: a statement does not hold for the weights beside it; or the base model and the
            adapter protect different units, so that one epsilon cannot cover both.
    """
    adapter = None
    if sampling.adapter is not None:
        adapter = fetch_adapter(sampling.adapter, sampling.adapter_revision)

    def verify() -> tuple[dict | None, bool]:
        name, revision = model.pretrained_model_name_or_path, model.revision
        base, is_known = read_base_statement(name, revision)
        if adapter is None:
            return base, is_known and base is None
        if not (adapter / STATEMENT).is_file():
            print(
                f"warning: {sampling.adapter} has no privacy.json, so nobody can tell what its "
                "images give away",
                file=sys.stderr,
            )
            return None, False
        source = read_source(str(adapter), None)
        statement = source.statement
        if statement.get("private") is not False:
            problems = find_problems(source)
            if problems:
                raise UsageError(f"--adapter {sampling.adapter}: {'; '.join(problems)}")
        covered = cover_both(statement, base)
        return (covered if is_known else add_doubts(covered, [UNKNOWN_BASE])), False

    statement, is_public = on_main_process(verify)
    return ImageSource(adapter, statement, is_public)


def cover_both(statement: dict, base: dict | None) -> dict:
    """The statement of an adapter's images, its base model's added if that is a private result.

    Raises:
        UsageError: they protect different units; or the adapter was trained on another private
            result, whose cost is not that of this one.
    """
    if base is None or not statement["private"]:
        return statement
    if base["private"] is not True:
        return base
    if "base" in statement:
        paid = list_base_entries(statement["base"]), statement["base"]["events"]
        if paid != (list_base_entries(base), list_all_events(base)):
            raise UsageError(
                "the adapter was trained on another private base model than this one, or on an "
                "earlier state of it: no statement covers the images of both; draw with that one"
            )
        return add_doubts(statement, list_doubts(base))
    if base["privacy_unit"] != statement["privacy_unit"]:
        raise UsageError(
            f"the base model protects '{base['privacy_unit']}', the adapter "
            f"'{statement['privacy_unit']}': one epsilon cannot cover the images of both"
        )
    return add_base(statement, base)


def warn_of_another_base(source: ImageSource, weights: int, name: str) -> None:
    """Say so if the base model, whose checksum is `weights`, is not the one that the adapter was
    trained on, as far as its statement tells."""
    trained_on = (source.statement or {}).get(BASE_CHECKSUM)
    if trained_on not in (None, weights) and PartialState().is_main_process:
        print(
            f"warning: {source.adapter} was trained on another base model than {name}, whose "
            "weights are others: the images may look like nothing that it learned",
            file=sys.stderr,
        )


def require_statement(source: ImageSource) -> None:
    """Raises: UsageError if images of `source` must not be published."""
    if source.adapter is not None and source.statement is None:
        raise UsageError(
            f"--push_to_hub: {source.adapter} has no privacy.json, so nobody can tell what its "
            "images give away"
        )
    if source.statement is not None and source.statement["private"] is not True:
        raise UsageError("--push_to_hub: what made these images is stamped NOT PRIVATE")
