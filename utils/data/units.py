"""Whose each row is: the privacy units, which are sampled, clipped and accounted for whole."""

import unicodedata

import torch
from datasets import ClassLabel, Dataset, Value

from utils.data.rows import require_column
from utils.errors import UsageError

UNSEEN = ("VARIATION SELECTOR", "COMBINING GRAPHEME JOINER", "HANGUL JUNGSEONG FILLER")
UNSEEN += ("HANGUL CHOSEONG FILLER", "BRAILLE PATTERN BLANK")
HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")


def number_units(rows: Dataset, unit_column: str | None) -> torch.Tensor:
    """The privacy unit that each row belongs to: integers 0 ... N - 1, [rows].

    Rows with the same value in `unit_column` are one unit; without a column, each row is. The
    number -1 is no value, as in a column of classes.

    Raises:
        UsageError: the column is missing, or has rows without a value; or two values look alike.
    """
    if unit_column is None:
        return torch.arange(len(rows))
    require_column(rows, unit_column, "--privacy_unit_column")
    feature = rows.features[unit_column]
    if not isinstance(feature, Value | ClassLabel):
        raise UsageError(
            f"--privacy_unit_column {unit_column} holds {type(feature).__name__} values; a unit is "
            "named by a text or a number"
        )
    values = rows.with_format(None)[unit_column]  # a tensor is equal to nothing but itself
    if isinstance(feature, ClassLabel):  # a folder a person: they are told apart by their names
        names = dict(enumerate(feature.names))
        values = [names.get(value, value) for value in values]
    missing = sum(
        value in (None, -1) or value != value or (isinstance(value, str) and not _normalise(value))
        for value in values
    )
    if missing:
        raise UsageError(
            f"--privacy_unit_column {unit_column}: {missing} row(s) have no value, or -1, so "
            "nobody knows whose they are; fill them in or remove those rows"
        )
    number: dict = {}
    texts = {value for value in values if isinstance(value, str)}
    merged = len(texts) - len({_normalise(text) for text in texts})
    if merged:
        raise UsageError(
            f"--privacy_unit_column {unit_column}: {merged} value(s) differ from another only by "
            "spaces, or by how Unicode spells the same letters, which would make two units of one: "
            "mend them"
        )
    return torch.tensor([number.setdefault(value, len(number)) for value in values])


def _normalise(text: str) -> str:
    """A name as a reader takes it: without what cannot be seen, and in one spelling."""
    one = unicodedata.normalize("NFKC", text)
    shown = "".join(c for c in one if c.isspace() or not _is_unseen(c))
    return " ".join(shown.translate(HYPHENS).split())


def _is_unseen(character: str) -> bool:
    """Also what joins letters, or chooses among their forms."""
    if unicodedata.category(character) in ("Cf", "Cc"):
        return True
    return unicodedata.name(character, "").startswith(UNSEEN)
