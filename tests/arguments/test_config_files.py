"""A YAML file is read as strictly as the command line, and its values are the words it has."""

import sys
from dataclasses import dataclass
from functools import partial

import pytest
import torch

from utils.arguments import values
from utils.arguments.parsing import option, parse
from utils.arguments.training import TrainingArguments
from utils.errors import UsageError


@dataclass
class Options:
    """A few options of each kind."""

    mode: str = option("a choice", "no", choices=["no", "bf16"])
    names: list[str] | None = option("texts", None)
    rank: int = option("a whole number", 4)
    rate: float = option("a number", 0.5)
    widths: list[int] = option("whole numbers", [1, 2])
    flip: bool = option("a switch", False)
    needed: str = option("a text")


def read(monkeypatch, tmp_path, text: str | bytes, *more: str) -> Options:
    path = tmp_path / "run.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    monkeypatch.setattr(sys, "argv", ["script.py", "--config", str(path), *more])
    return parse(Options, description="a script")[0]


@pytest.mark.parametrize(
    "line, name, value",
    [
        ("mode: no", "mode", "no"),  # which YAML 1.1 reads as false
        ("mode: bf16", "mode", "bf16"),
        ("names: [0, 1]", "names", ["0", "1"]),
        ("names: [007, 1e3, no, 2024-01-01]", "names", ["007", "1e3", "no", "2024-01-01"]),
        ("names: ['', ~x]", "names", ["", "~x"]),
        ("names: one", "names", ["one"]),
        ("names: 'null'", "names", ["null"]),
        ("names: null", "names", None),
        ("rank: ~", "rank", 4),
        ("rank:", "rank", 4),
        ("rate: 1e-5", "rate", 1e-5),
        ("rate: 1.0e-5", "rate", 1e-5),
        ("rate: 3", "rate", 3.0),
        ("widths: [3, 4]", "widths", [3, 4]),
        ("widths: 3", "widths", [3]),
        ("flip: true", "flip", True),
        ("flip: yes", "flip", True),
        ("flip: off # a comment\nflop: 1", None, "unknown argument flop"),
        ("flip: no", "flip", False),
        ("flip: False", "flip", False),
        ("flip: maybe", None, "flip"),
        ("mode: fp8", None, "mode: fp8 is none of no, bf16"),
        ("mode: [no, bf16]", None, "is not one value"),
        ("rank: 1.5", None, "rank: 1.5 is not a whole number"),
        ("rank: five", None, "rank: five is not a whole number"),
        ("rank: [1]", None, "is not one value"),
        ("rank: {a: 1}", None, "is not one value"),
        ("rate: half", None, "rate: half is not a number"),
        ("widths: [1, x]", None, "x is not a whole number"),
        ("widths: []", None, "the list is empty"),
        ("names: [a, [b]]", None, "is not one value"),
        ("names: [a, ~]", None, "is not one value"),
        ("rank: 3\nrank: 4", None, "rank is there twice"),
        ("ranks: 3", None, "unknown argument ranks"),
        ("help: 3", None, "unknown argument help"),
        ("config: other.yaml", None, "unknown argument config"),
        ("- rank", None, "must map argument names to values"),
        ("1: 2", None, "unknown argument 1"),
        ("rank: 'x", None, "is not valid YAML"),
        ("rank: 3".encode("utf-16"), None, "is not UTF-8"),
        ("names: [Röntgen]".encode("cp1252"), None, "is not UTF-8 text: save it as UTF-8"),
        ("\ufeffrank: 5", "rank", 5),  # as Windows' editors save it
    ],
)
def test_a_value_is_the_word_in_the_file_or_refused(monkeypatch, tmp_path, line, name, value):
    text = line if isinstance(line, bytes) else line + "\nneeded: x\n"
    if line == "- rank" or line == "rank: 'x":
        text = line
    if name is None:
        with pytest.raises(UsageError, match=value) as refused:
            read(monkeypatch, tmp_path, text)
        assert "run.yaml" in str(refused.value)
    else:
        assert getattr(read(monkeypatch, tmp_path, text), name) == value


def test_the_command_line_wins_over_the_file(monkeypatch, tmp_path):
    found = read(monkeypatch, tmp_path, "rank: 3\nneeded: x\nflip: true", "--rank", "8")
    assert (found.rank, found.flip, found.needed) == (8, True, "x")


def test_a_file_satisfies_what_is_needed_and_null_does_not(monkeypatch, tmp_path, capsys):
    assert read(monkeypatch, tmp_path, "needed: 007").needed == "007"
    with pytest.raises(SystemExit):
        read(monkeypatch, tmp_path, "needed: null")
    assert "--needed" in capsys.readouterr().err


@pytest.mark.parametrize("launched, asked, chosen", [
    (None, None, "no"), ("bf16", None, "bf16"), ("bf16", "no", "no"), ("no", "bf16", "bf16"),
    ("BF16", None, "bf16"),
])  # fmt: skip
def test_the_precision_is_that_of_accelerate_launch_unless_it_is_asked_for(
    monkeypatch, launched, asked, chosen
):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    if launched is not None:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    assert TrainingArguments(output_dir="x", mixed_precision=asked).mixed_precision == chosen


@pytest.mark.parametrize("where", ["launch", "option"])
def test_fp16_is_explained_wherever_it_comes_from(monkeypatch, where):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16" if where == "launch" else "no")
    asked = "fp16" if where == "option" else None
    with pytest.raises(UsageError, match="loss scaling looks at the data; use bf16"):
        TrainingArguments(output_dir="x", mixed_precision=asked)


@pytest.mark.parametrize("precision, supported, said", [
    ("bf16", False, 1),
    ("bf16", True, 0),
    ("no", False, 0),
])  # fmt: skip
def test_a_processor_without_bf16_is_spoken_of_once(
    monkeypatch, capsys, precision, supported, said
):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    values._warn_of_slow_bf16.cache_clear()
    for _ in range(2):
        TrainingArguments(output_dir="x", mixed_precision=precision)
    assert capsys.readouterr().err.count("take --mixed_precision no") == said


def test_a_home_folder_is_found_where_no_shell_looks(monkeypatch, tmp_path):
    """In a file, and after an equals sign; other words with a tilde stay as they are."""
    monkeypatch.setenv("HOME", "/home/me")
    read_here = partial(read, monkeypatch, tmp_path)
    assert read_here("needed: ~/scans").needed == "/home/me/scans"
    assert read_here("names: [~/a, b~, ~x]", "--needed=~/b").names == ["/home/me/a", "b~", "~x"]
    assert read_here("rank: 1", "--needed=~/b").needed == "/home/me/b"
    assert read_here("rank: 1", "--needed", "~/b").needed == "/home/me/b"
    assert read_here("rank: 1", "--needed", "about ~/b").needed == "about ~/b"


@dataclass
class OfOthers:
    """What another script takes."""

    rank: int = option("both take it", 1)
    depth: int = option("only that takes it", 1)


def test_a_file_may_have_the_options_of_others(monkeypatch, tmp_path, capsys):
    """They are ignored there; on the command line they are mistakes, as is what nobody takes."""
    path = tmp_path / "run.yaml"
    words = ["script.py", "--config", str(path), "--needed", "x"]
    path.write_text("rank: 5\ndepth: any\n")
    monkeypatch.setattr(sys, "argv", words)
    (found,) = parse(Options, description="a script", others=[OfOthers])
    assert found.rank == 5 and not hasattr(found, "depth")
    monkeypatch.setattr(sys, "argv", [*words, "--depth", "2"])
    with pytest.raises(SystemExit):
        parse(Options, description="a script", others=[OfOthers])
    assert "unrecognized arguments: --depth 2" in capsys.readouterr().err
    path.write_text("rank: 5\nwidth: 2\n")
    with pytest.raises(UsageError, match="unknown argument width"):
        parse(Options, description="a script", others=[OfOthers])


def test_one_file_and_whole_names_only(monkeypatch, tmp_path, capsys):
    """Of two files the first would be forgotten; a file whose option is cut short, never read."""
    with pytest.raises(UsageError, match="--config is there 2 times: put all into one file"):
        read(monkeypatch, tmp_path, "rank: 8\nneeded: x", "--config", str(tmp_path / "other.yaml"))
    for words in (["--conf", "other.yaml"], ["--ran", "3"]):
        with pytest.raises(SystemExit):
            read(monkeypatch, tmp_path, "needed: x", *words)
        assert f"unrecognized arguments: {words[0]}" in capsys.readouterr().err
