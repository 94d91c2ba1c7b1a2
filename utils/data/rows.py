"""Rows of a `datasets` dataset: loading one split, and the caption and label of each.

Nothing here holds more than a few rows' captions at a time.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    get_dataset_split_names,
    load_dataset,
    load_from_disk,
)
from datasets.exceptions import DatasetsError

from utils.arguments.training import DataArguments
from utils.data.folders import is_image_folder, load_image_folder
from utils.data.parquet import require_all_parquet
from utils.errors import UsageError
from utils.files import resolve_if_there

# RuntimeError: of a folder with a loading script, which `datasets` no longer runs.
LOADING_ERRORS = (OSError, ValueError, KeyError, TypeError, RuntimeError, DatasetsError)
READ_AT_ONCE = 1000  # rows of captions


def load_rows(data: DataArguments, cache_dir: str | Path | None = None) -> Dataset:
    """The rows that the arguments name (`load_split`), at most `--max_train_samples` of them."""
    rows = load_split(
        data.dataset_name, data.dataset_config_name, data.train_data_dir, data.split, cache_dir
    )
    count = data.max_train_samples
    return rows if count is None or count >= len(rows) else rows.select(range(count))


def name_source(data: DataArguments) -> str:
    """The name under which a private set is remembered: its folder, or its Hub id."""
    name, config = data.train_data_dir or data.dataset_name, data.dataset_config_name
    known = resolve_if_there(name)
    return known if config is None or Path(name).exists() else f"{name}, {config}"


def load_split(
    dataset_name: str | None,
    dataset_config_name: str | None,
    train_data_dir: str | None,
    split: str | None,
    cache_dir: str | Path | None = None,
    revision: str | None = None,
) -> Dataset:
    """Load one split, from the Hub, a folder of parquet files, a saved dataset or an image folder;
    without a name, the split `test`, or the only one there is.

    Raises:
        UsageError: no source or two were named; the folder or the split is missing.
    """
    if (dataset_name is None) == (train_data_dir is None):
        raise UsageError("give exactly one of --dataset_name and --train_data_dir")
    folder = Path(train_data_dir or dataset_name)
    if not folder.is_dir() and (train_data_dir is not None or not _may_be_on_the_hub(dataset_name)):
        why = "is a file: name its folder" if folder.is_file() else "is not a folder"
        raise UsageError(f"the images: {folder} {why}")
    cache = None if cache_dir is None else os.fspath(cache_dir)
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            rows = load_saved(folder, split)
        elif folder.is_dir() and is_image_folder(folder):
            rows = load_image_folder(folder, split)
        else:
            name, how = dataset_name, {"revision": revision}
            if folder.is_dir():
                name = str(folder)
                require_all_parquet(folder, cache)
                # Its card may still have the counts of a set from which someone withdrew.
                how = {"verification_mode": "no_checks"}
            if split is None:
                split = choose_split(get_dataset_split_names(name, dataset_config_name))
            rows = load_dataset(name, dataset_config_name, split=split, cache_dir=cache, **how)
    except LOADING_ERRORS as error:
        reason = str(error) or type(error).__name__
        where = folder if folder.is_dir() else f"{folder} (no folder here, so a Hub id)"
        raise UsageError(f"cannot read {name_split(split)} of {where}: {reason}") from error
    if len(rows) == 0:
        raise UsageError(f"{folder} holds no images in {name_split(split)}")
    return rows


def load_saved(folder: Path, split: str | None) -> Dataset:
    """What `save_to_disk` left, without the format that it had: of tensors, or of some columns.

    Raises:
        ValueError: it is of another split.
    """
    rows = load_from_disk(str(folder))
    if isinstance(rows, DatasetDict):
        if split is not None and split not in rows:
            raise ValueError(f"it has the splits {', '.join(rows)}: give one as --split")
        rows = rows[split or choose_split(rows)]
    elif split not in (None, "train", str(rows.split)):  # `train` is asked for by default
        raise ValueError(f"it was saved as one split, {rows.split or 'without a name'}")
    return rows.with_format(None)


def _may_be_on_the_hub(name: str) -> bool:
    """Whether this can be the name of a repository, rather than a path that is not there."""
    return not Path(name).exists() and name.count("/") <= 1 and name[:1] not in ("/", ".")


def name_split(split: str | None) -> str:
    return "the test images" if split is None else f"split '{split}'"


def choose_split(names: Iterable[str]) -> str:
    """`test`, or the only one there is. Raises: ValueError if there are others."""
    known = list(names)
    if "test" in known or len(known) == 1:
        return "test" if "test" in known else known[0]
    raise ValueError(f"it has the splits {', '.join(known)}: name one")


def require_column(rows: Dataset, column: str, argument: str) -> None:
    """Raises: UsageError, naming the columns there are, if `column` is not one of them."""
    if column not in rows.column_names:
        known = ", ".join(rows.column_names)
        raise UsageError(f"{argument} {column}: there is no such column; the columns are {known}")


class Column(Sequence):
    """One text a row, read from disk when it is needed: [rows].

    `to_text` makes the text of one value of `column`.
    """

    def __init__(self, rows: Dataset, column: str, to_text: Callable[[object], str]):
        self.rows, self.column, self.to_text = rows.select_columns([column]), column, to_text

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, where):
        values = self.rows[where][self.column]
        return (
            [self.to_text(v) for v in values] if isinstance(where, slice) else self.to_text(values)
        )

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), READ_AT_ONCE):
            yield from self[start : start + READ_AT_ONCE]


def read_captions(rows: Dataset, data: DataArguments) -> Sequence[str]:
    """One caption a row: the same for all; or that of a caption column; or a template filled with
    the name of its label.

    Of a list of captions the first counts; a row without any has the empty caption. Numbers are
    refused: a column of them has one type, so one row's 1.5 would make "2.0" of another's 2.

    Raises:
        UsageError: a missing column, one that holds no texts, or a template without `{label}`.
    """
    if data.caption is not None:
        return [data.caption] * len(rows)
    if data.caption_column is not None:
        require_column(rows, data.caption_column, "--caption_column")
        if isinstance(find_item_feature(rows, data.caption_column), ClassLabel):
            raise UsageError(
                f"--caption_column {data.caption_column} holds classes, whose captions would be "
                "numbers: give --label_column and --caption_template instead"
            )
        return Column(rows, data.caption_column, partial(_choose_first, data.caption_column))
    if data.label_column is None:
        raise UsageError(
            "give --caption_column; or --label_column and --caption_template; or --caption TEXT, "
            "one caption for all images ('' for none). "
            f"The columns are {', '.join(rows.column_names)}"
        )
    labels, template = read_labels(rows, data.label_column), data.template
    fill_template(template, "")  # refused now, not at the first row
    return Column(rows, labels.column, lambda value: fill_template(template, labels.to_text(value)))


def refuse_unfilled(data: DataArguments) -> None:
    """Raises: UsageError if there is a template, but no column of labels to fill it with."""
    if data.caption_template is not None and data.label_column is None:
        raise UsageError("--caption_template is filled with labels: give their --label_column")


def find_used_template(data: DataArguments) -> str | None:
    """`--caption_template`, if captions are labels that it was filled with; else None."""
    others = data.caption is not None or data.caption_column is not None
    return None if data.label_column is None or others else data.template


def fill_template(template: str, label: str) -> str:
    """The caption, or the prompt, of a class: `--caption_template` with its name filled in.

    Raises:
        UsageError: the template has no `{label}`.
    """
    if "{label}" not in template:
        raise UsageError(f"--caption_template '{template}' has no {{label}} to fill in")
    return template.replace("{label}", label.replace("_", " "))


def find_item_feature(rows: Dataset, column: str) -> object:
    """What `datasets` says that a column holds; of lists, what they hold."""
    feature = rows.features[column]
    return getattr(feature, "feature", feature)


def _choose_first(column: str, value: object) -> str:
    if isinstance(value, list):
        value = value[0] if value else None
    if value is None or value != value:  # NaN is how pandas writes that there is none
        return ""
    if not isinstance(value, str):
        raise UsageError(
            f"--caption_column {column}: a row holds a {type(value).__name__}, not a text; make a "
            "column of texts of it, or give --label_column and --caption_template if they are "
            "numbers of classes"
        )
    return value


def read_labels(
    rows: Dataset, label_column: str, option: str = "--label_column", may_be_blank: bool = False
) -> Column:
    """The class name of every row (its number, as text, where the dataset names no classes); of
    several labels, the names with commas between.

    Args:
        may_be_blank: whether an empty text is a name, too: of an image without a finding.

    Raises:
        UsageError: there is no such column; a row has no label, one that is no number or name, or
            one twice.
    """
    require_column(rows, label_column, option)
    feature = find_item_feature(rows, label_column)

    def name(value) -> str:
        is_blank = isinstance(value, str) and not (value.strip() or may_be_blank)
        if value is None or value == -1 or value == [] or value != value or is_blank:
            raise UsageError(f"{option} {label_column}: a row has no label; fill it in")
        if isinstance(value, list):
            names = list(map(name, value))
            if len(set(names)) < len(names):
                raise UsageError(
                    f"{option} {label_column}: a row names a label twice; if it has a 0 or 1 for "
                    "every class, make a list of the classes that are 1 of it"
                )
            return ", ".join(names)
        if not isinstance(value, str | int | float):
            raise UsageError(
                f"{option} {label_column}: a row holds a {type(value).__name__}, not a label"
            )
        if isinstance(value, float):  # what pandas makes of whole numbers where some are missing
            if not value.is_integer():
                raise UsageError(
                    f"{option} {label_column}: a row holds {value:g}; a label is a name or a "
                    "whole number"
                )
            value = int(value)
        if not isinstance(feature, ClassLabel):
            return str(value)
        if not 0 <= int(value) < feature.num_classes:
            raise UsageError(
                f"{option} {label_column}: a row holds {value}, but the column names "
                f"{feature.num_classes} classes, 0 to {feature.num_classes - 1}: mend it"
            )
        return feature.int2str(int(value))

    return Column(rows, label_column, name)


def read_label_sets(rows: Dataset, label_column: str, separator: str) -> list[frozenset[str]]:
    """The names of the labels of every row, any number of them: of a list, its items; of a text,
    what is between separators.

    Raises:
        UsageError: there is no such column, or it holds neither numbers nor names.
    """
    labels = read_labels(rows, label_column, may_be_blank=True)

    def split(value) -> frozenset[str]:
        if value is None or value == []:
            return frozenset()
        if isinstance(value, list):
            return frozenset(map(labels.to_text, value))
        return frozenset(filter(None, map(str.strip, labels.to_text(value).split(separator))))

    parts = (
        labels.rows[start : start + READ_AT_ONCE] for start in range(0, len(rows), READ_AT_ONCE)
    )
    return [split(value) for part in parts for value in part[label_column]]
