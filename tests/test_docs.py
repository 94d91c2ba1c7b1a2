"""README and docs: every command is understood by its script, every link leads somewhere."""

import importlib.util
import math
import re
import shlex
import sys

import pytest

from tests.conftest import ROOT
from utils.arguments import parsing

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
ELSEWHERE = ("python3 -m venv", "hf upload")  # commands of others


class Parsed(Exception):
    """The arguments were read; nothing else is to happen."""


def find_commands(text: str) -> list[str]:
    """The commands in a page's bash blocks, continued lines joined."""
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line for line in lines if line.strip() and not line.startswith("#")]


COMMANDS = [(page.name, line) for page in PAGES for line in find_commands(page.read_text())]


def check_script(script: str, arguments: list[str], monkeypatch) -> None:
    """Let the script parse its arguments, and go no further.

    Raises:
        SystemExit, UsageError: it does not understand them.
    """

    def stop(whole):
        def parse(*groups, **more):
            whole(*groups, **more)
            raise Parsed

        return parse

    for name in ("parse", "parse_command"):
        monkeypatch.setattr(parsing, name, stop(getattr(parsing, name)))
    spec = importlib.util.spec_from_file_location(f"script_{script[:-3]}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.chdir(ROOT)
    with pytest.raises(Parsed):
        module.main()


def check(command: str, monkeypatch) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), words
        return
    assert words[0] in ("python", "accelerate", "torchrun"), words
    script = next(word for word in words if word.endswith(".py"))
    arguments = words[words.index(script) + 1 :]
    assert (ROOT / script).is_file(), script
    if "/" not in script:
        check_script(script, arguments, monkeypatch)
        return
    source = (ROOT / script).read_text()  # a benchmark: what it imports takes too long to start it
    for option in [word for word in arguments if word.startswith("--")]:
        assert option in source or f"    {option[2:]}: " in source, f"{script} has no {option}"


@pytest.mark.parametrize("page, command", COMMANDS, ids=[c[:60] for _, c in COMMANDS])
def test_every_command_is_understood(page, command, monkeypatch):
    if not command.startswith(ELSEWHERE):
        check(command, monkeypatch)


@pytest.mark.parametrize(
    "command",
    [
        "python train_dp_lora.py --config nowhere.yaml",
        "python sample.py --pretrained_model_name_or_path x --output_dir y --no_such_option 3",
        "python privacy_report.py shows runs/digits/adapter",
        "python benchmarks/throughput.py --shapes sd15",
        "make demonstration",
    ],
)
def test_a_command_that_is_wrong_is_caught(command, monkeypatch):
    with pytest.raises((AssertionError, SystemExit, parsing.UsageError)):
        check(command, monkeypatch)


def test_there_are_commands_and_readme_is_short():
    assert len(COMMANDS) > 30
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if not link.startswith("http"):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
    for target, anchor in re.findall(r"\]\(([^)#]*)#([^)]+)\)", text):
        other = page if not target else page.parent / target
        headings = re.findall(r"^#+ (.*)$", other.read_text(), re.M)
        anchors = [re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in headings]
        assert anchor in anchors, f"{page.name} links to {target}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_in_the_pages_compiles(page):
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S):
        compile(block, page.name, "exec")


def test_the_pages_name_every_recipe():
    text = "".join(page.read_text() for page in PAGES)
    for recipe in (ROOT / "examples").rglob("*.yaml"):
        if recipe.name not in ("accelerate.yaml", "base.yaml"):
            assert str(recipe.relative_to(ROOT)) in text, recipe


def test_the_privacy_page_answers_what_an_officer_asks():
    """And the tests that it names exist."""
    text = " ".join((ROOT / "docs" / "privacy.md").read_text().split())
    answers = {
        "who is protected?": "all rows of one person together",
        "against whom?": "against everybody",
        "how sure?": "2.8 in a hundred at epsilon 1",
        "a family?": "k times epsilon",
        "who sees the images?": "Whoever runs the training sees the images",
        "what is public?": "how many units there are (N)",
        "what is left out?": "What the base model learned from its own data",
        "and by watching the machine?": "no epsilon covers that",
        "what must be kept?": "**Keep the ledger**",
        "how do I check?": "python privacy_report.py verify",
        "who says so?": "not who wrote it",
    }
    assert [question for question, answer in answers.items() if answer not in text] == []
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", text)
    assert len(set(named)) >= 12
    assert [name for name in named if f"def {name}(" not in sources] == []
    arithmetic = {1: 2.8, 3: 21}  # e^epsilon times one in a hundred, rounded up
    for epsilon, percent in arithmetic.items():
        assert percent - 1 < math.exp(epsilon) <= percent and f"{percent} " in text
