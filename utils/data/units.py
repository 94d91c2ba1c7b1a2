"""Whose each row is: the privacy units, which are sampled, clipped and accounted for whole."""

import re
import string
import sys
import unicodedata

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, Value

from utils.data.rows import require_column
from utils.errors import UsageError

UNSEEN = ("VARIATION SELECTOR", "COMBINING GRAPHEME JOINER", "HANGUL JUNGSEONG FILLER")
UNSEEN += ("HANGUL CHOSEONG FILLER", "BRAILLE PATTERN BLANK")
# What programs and people write where there is no value; in small letters, without punctuation.
NOBODY = {"", "nan", "na", "nat", "null", "nil", "none", "missing", "unknown", "anonymous"}
MARKS = dict.fromkeys(map(ord, string.punctuation + " "))
HYPHENS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212"), "-")


def number_units(rows: Dataset, unit_column: str | None) -> torch.Tensor:
    """The privacy unit that each row belongs to: integers 0 ... N - 1, [rows].

    Rows with the same value in `unit_column` are one unit; without a column, each row is. The
    number -1 is no value, as in a column of classes; nor is a word for none, such as NA.

    Raises:
        UsageError: the column is missing, or has rows without a value; or two values look alike.
    """
    if unit_column is None:
        return torch.arange(len(rows))
    values = _read_names(rows, unit_column)
    nobody = set(filter(_is_nobody, set(values)))
    if missing := sum(value in nobody for value in values):
        raise UsageError(
            f"--privacy_unit_column {unit_column}: {missing} row(s) have no value, or -1, or a "
            "word for none (NA, null, unknown, ...), so nobody knows whose they are; fill them in "
            "or remove those rows"
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


def warn_of_similar_units(rows: Dataset, unit_column: str | None) -> None:
    """Say so if two units may be one: P1 and p1, 007 and 7, or 7 and 7.0."""
    if unit_column is None or not PartialState().is_main_process:
        return
    names = {value for value in _read_names(rows, unit_column) if isinstance(value, str)}
    if len({_loosen(name) for name in names}) < len(names):
        print(
            f"warning: in --privacy_unit_column {unit_column} some values differ from another only "
            "by capitals or zeros, as P1 and p1 do, or 007 and 7. They count as different units; "
            "whoever is in several is protected less: if they are one, write them alike",
            file=sys.stderr,
        )


def _read_names(rows: Dataset, unit_column: str) -> list:
    """The value of each row; of classes, their names."""
    require_column(rows, unit_column, "--privacy_unit_column")
    feature = rows.features[unit_column]
    if not isinstance(feature, Value | ClassLabel):
        raise UsageError(
            f"--privacy_unit_column {unit_column} holds {type(feature).__name__} values; a unit is "
            "named by a text or a number"
        )
    values = list(rows.with_format(None)[unit_column])  # a tensor is equal to nothing but itself
    if isinstance(feature, ClassLabel):  # a folder a person: they are told apart by their names
        names = dict(enumerate(feature.names))
        values = [names.get(value, value) for value in values]
    return values


def _is_nobody(value: object) -> bool:
    if not isinstance(value, str):
        return value in (None, -1) or value != value
    text = _normalise(value).casefold()
    return text.translate(MARKS) in NOBODY or text in ("-1", "-1.0")


def _loosen(text: str) -> str:
    """A name without what spreadsheets add to it or take away, and in small letters."""
    text = re.sub(r"(?<!\d)0+(?=\d)", "", _normalise(text).casefold())
    return re.sub(r"^(\d+)\.0+$", r"\1", text)


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
