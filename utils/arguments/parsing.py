"""The command line: dataclasses into options, one help line a field; a YAML file gives defaults."""

import argparse
import re
import sys
from dataclasses import MISSING, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from utils.errors import UsageError


def option(help: str, default=MISSING, choices: list | None = None, positional: bool = False):
    """A dataclass field with a help line; without a default it is required.

    A positional one is given by its place on the command line, without its name.
    """
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    metadata |= {"positional": True} if positional else {}
    if default is MISSING:
        return field(metadata=metadata, kw_only=True)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(*dataclasses: type, description: str) -> tuple:
    """Parse the command line into one object a dataclass; `--config FILE.yaml` gives defaults.

    Raises:
        UsageError: the YAML file is missing, is no mapping, or names an unknown argument.
        SystemExit: the command line does (code 2).
    """
    for kind in dataclasses:  # each is a group of its own in --help
        kind._argument_group_name = kind.__doc__.strip().rstrip(".")
    parser = _Parser(
        list(dataclasses),
        usage="%(prog)s [--config FILE.yaml] [--argument VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of arguments; the command line wins over it")
    config = _find_config(sys.argv[1:])
    if config is not None:
        _apply_yaml(parser, Path(config))
    parser.parse_args()  # ends with a sentence where the next line would raise a ValueError
    *parsed, _ = parser.parse_args_into_dataclasses(args_file_flag=None, look_for_args_file=False)
    _hide_token()
    return tuple(parsed)


def parse_command(commands: dict[str, type], description: str) -> object:
    """Parse `SCRIPT COMMAND ...` into an object of the dataclass that `commands` has for COMMAND;
    the docstring of that dataclass is its help line."""
    parser = argparse.ArgumentParser(description=description, formatter_class=_HelpFormatter)
    subparsers = parser.add_subparsers(
        required=True, metavar="COMMAND", dest="command", parser_class=_Parser
    )
    for name, kind in commands.items():
        line = kind.__doc__.strip().rstrip(".")
        subparsers.add_parser(
            name,
            dataclass_types=[kind],
            help=line,
            description=line,
            formatter_class=_HelpFormatter,
        )
    values = vars(parser.parse_args())
    kind = commands[values["command"]]
    return kind(**{field.name: values[field.name] for field in fields(kind)})


class _Parser(HfArgumentParser):
    """Knows positional fields, too."""

    @staticmethod
    def _parse_dataclass_field(parser, field):
        if field.metadata.get("positional"):
            parser.add_argument(field.name, help=field.metadata["help"])
        else:
            HfArgumentParser._parse_dataclass_field(parser, field)


def _hide_token() -> None:
    """Trackers publish the command line; a token must not be on it."""
    for index, word in enumerate(sys.argv[:-1]):
        if word in ("--hub_token", "--hub-token"):
            sys.argv[index + 1] = "***"
    sys.argv[:] = [
        f"{word.partition('=')[0]}=***" if re.match("--hub[_-]token=", word) else word
        for word in sys.argv
    ]


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the script's docstring as written; one short line an option, with its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        default = action.default
        hidden = default in (None, MISSING, argparse.SUPPRESS, False, [""])
        if not action.option_strings or hidden:
            return action.help
        text = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} (default: {text})"

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        name = "-h, --help" if action.dest == "help" else action.option_strings[0]
        if action.nargs in (0, "?"):  # a switch
            return name
        value = {int: "N", float: "X"}.get(action.type, "TEXT")
        if action.choices:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{name} {value}" + (" ..." if action.nargs == "+" else "")


def _find_config(argv: list[str]) -> str | None:
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    return first.parse_known_args(argv)[0].config


def read_yaml(path: str | Path) -> dict:
    """The arguments in a YAML file.

    Raises:
        UsageError: it is missing, is not valid, or does not map names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must map argument names to values")
    return values


def _apply_yaml(parser: HfArgumentParser, path: Path) -> None:
    values = read_yaml(path)
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(actions))
    if unknown:
        raise UsageError(f"--config {path}: unknown argument {', '.join(unknown)}")
    for name, value in values.items():
        action = actions[name]
        if value is not None and action.nargs == "+" and not isinstance(value, list):
            value = [value]
        if value is not None and action.type in (int, float) and not isinstance(value, list):
            try:
                value = action.type(value)  # YAML reads 1e-5 as text
            except ValueError as error:
                raise UsageError(f"--config {path}: {name} is not a number: {value}") from error
        action.default, action.required = value, False
