"""The command line: dataclasses into options, one help line a field; a YAML file gives defaults."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from utils.errors import UsageError
from utils.files import read_text


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


def parse(*dataclasses: type, description: str, others: Sequence[type] = ()) -> tuple:
    """Parse the command line into one object a dataclass; `--config FILE.yaml` gives defaults.

    Args:
        others: dataclasses of other scripts, whose options the file may have, too: it may be
            theirs. They are ignored.

    Raises:
        UsageError: the YAML file is missing, is no mapping, or names an unknown argument; or there
            are several.
        SystemExit: the command line does (code 2).
    """
    for kind in dataclasses:  # each is a group of its own in --help
        kind._argument_group_name = kind.__doc__.strip().rstrip(".")
    parser = _Parser(
        list(dataclasses),
        usage="%(prog)s [--config FILE.yaml] [--argument VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", help="YAML file of arguments; the command line wins over it")
    sys.argv[1:] = map(_expand_home, sys.argv[1:])
    config = _find_config(sys.argv[1:])
    if config is not None:
        ignored = {field.name for kind in others for field in fields(kind)}
        _apply_yaml(parser, Path(config), ignored)
    parser.parse_args()  # ends with a sentence where the next line would raise a ValueError
    *parsed, _ = parser.parse_args_into_dataclasses(args_file_flag=None, look_for_args_file=False)
    _hide_token()
    return tuple(parsed)


def parse_command(commands: dict[str, type], description: str) -> object:
    """Parse `SCRIPT COMMAND ...` into an object of the dataclass that `commands` has for COMMAND;
    the docstring of that dataclass is its help line."""
    sys.argv[1:] = map(_expand_home, sys.argv[1:])
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
            allow_abbrev=False,
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


def _expand_home(word: str) -> str:
    """~/folder as a shell would give it: in a file, and after `--option=`, no shell does."""
    option, path = re.fullmatch(r"(--[\w-]+=)?(.*)", word, re.DOTALL).groups()
    return (option or "") + (os.path.expanduser(path) if path.startswith("~/") else path)


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
        hidden = default in (None, MISSING, argparse.SUPPRESS, False)
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
    """Raises: UsageError if several are named: of which value wins, two people think two things."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[])
    found = first.parse_known_args(argv)[0].config
    if len(found) > 1:
        raise UsageError(f"--config is there {len(found)} times: put all into one file")
    return found[0] if found else None


class _Words(yaml.SafeLoader):
    """Reads every value as the text that the file has, as a command line would: `no` and 007 are
    not turned into false and 7. Only an empty value, `~` and `null` are None."""

    yaml_implicit_resolvers = {
        first: [(tag, shape) for tag, shape in rules if tag.endswith((":null", ":merge"))]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node, deep=False):
        names = [name.value for name, _ in node.value]
        for name in names:
            if names.count(name) > 1:
                raise yaml.YAMLError(f"{name} is there twice")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path) -> dict:
    """The arguments in a YAML file: texts, lists of texts, or None.

    Raises:
        UsageError: it is missing, is not valid, or does not map names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    try:
        values = yaml.load(read_text(path), _Words)
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must map argument names to values")
    return values


def _apply_yaml(parser: HfArgumentParser, path: Path, ignored: set[str]) -> None:
    """Make the values of a file the defaults, as strictly read as the command line's."""
    values = read_yaml(path)
    actions = {action.dest: action for action in parser._actions if action.option_strings}
    values = {name: value for name, value in values.items() if name not in ignored - set(actions)}
    unknown = [str(name) for name in values if name not in actions or name in ("help", "config")]
    if unknown:
        raise UsageError(f"--config {path}: unknown argument {', '.join(sorted(unknown))}")
    for name, value in values.items():
        if value is None:  # as if it were not there
            continue
        try:
            actions[name].default = _read_value(actions[name], value)
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"--config {path}: {name}: {error}") from error
        actions[name].required = False


def _read_value(action: argparse.Action, value: str | list) -> object:
    """The value of an option, from the text that stands for it. Raises: ValueError."""
    if action.nargs == "+":
        words = value if isinstance(value, list) else [value]
        if not words:
            raise ValueError("the list is empty")
        return [_read_word(action, word) for word in words]
    return _read_word(action, value)


def _read_word(action: argparse.Action, word: object) -> object:
    if not isinstance(word, str):
        raise ValueError(f"{word!r} is not one value")
    kinds = {int: "a whole number", float: "a number"}
    try:
        value = _expand_home(word) if action.type in (None, str) else action.type(word)
    except ValueError as error:
        raise ValueError(f"{word} is not {kinds.get(action.type, 'valid')}") from error
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{word} is none of {', '.join(map(str, action.choices))}")
    return value
