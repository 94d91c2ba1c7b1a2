"""The arguments that the scripts parse: dataclasses, one help line a field, CLI over YAML."""

import sys
from argparse import RawDescriptionHelpFormatter
from dataclasses import MISSING, dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from utils.errors import UsageError


def option(help: str, default=MISSING, choices: list | None = None):
    """A dataclass field with a help line; without a default it is required."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if default is MISSING:
        return field(metadata=metadata, kw_only=True)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """Where the images and their captions come from."""

    dataset_name: str | None = option("Hub id, folder of parquet files or saved dataset", None)
    dataset_config_name: str | None = option("configuration of a Hub dataset", None)
    train_data_dir: str | None = option("image folder, instead of --dataset_name", None)
    split: str = option("split to read", "train")
    image_column: str = option("column that holds the images", "image")
    caption_column: str | None = option("column that holds the captions", None)
    label_column: str | None = option("column that holds class labels, instead of captions", None)
    caption_template: str = option("caption of a label", "a photo of a {label}")
    resolution: int = option("images are resized and centre-cropped to this many pixels", 32)
    strict_images: bool = option("refuse a set with an unreadable image, rather than skip it", False)


def parse(*dataclasses: type, description: str) -> tuple:
    """Parse the command line into one object a dataclass; `--config FILE.yaml` gives defaults.

    Raises:
        UsageError: the YAML file is missing, is no mapping, or names an unknown argument.
    """
    parser = HfArgumentParser(
        list(dataclasses), description=description, formatter_class=_HelpFormatter
    )
    parser.add_argument("--config", help="YAML file of arguments; the command line wins over it")
    config, _ = _config_option(sys.argv[1:])
    if config is not None:
        _apply_yaml(parser, Path(config))
    *parsed, _ = parser.parse_args_into_dataclasses(args_file_flag=None, look_for_args_file=False)
    return tuple(parsed)


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Keeps the script's docstring as written and shows every option's default."""

    def _get_help_string(self, action):
        shown = action.default not in (None, MISSING) and action.option_strings
        return f"{action.help} (default: {action.default})" if shown else action.help


def _config_option(argv: list[str]) -> tuple[str | None, list[str]]:
    from argparse import ArgumentParser

    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    return known.config, rest


def _apply_yaml(parser: HfArgumentParser, path: Path) -> None:
    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must map argument names to values")
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(actions))
    if unknown:
        raise UsageError(f"--config {path}: unknown argument {', '.join(unknown)}")
    for name, value in values.items():
        action = actions[name]
        if value is not None and action.type in (int, float) and not isinstance(value, list):
            value = action.type(value)  # YAML reads 1e-5 as text
        action.default, action.required = value, False
