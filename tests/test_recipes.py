"""The recipes of examples/: each can be parsed by its script, and its plan is possible."""

import importlib
import re
import shlex
import sys

import pytest
from accelerate.commands.config.config_args import load_config_from_file

from tests.conftest import ROOT
from utils.errors import UsageError

RECIPES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "examples").rglob("*.yaml")
    if path.name not in ("accelerate.yaml",)
)
LOCAL = "examples/digits/"  # these need nothing but the repository; other tests run them


def read_commands(path) -> list[list[str]]:
    """The commands in its head."""
    lines = (ROOT / path).read_text().splitlines()
    return [shlex.split(line[1:]) for line in lines if re.match(r"#   (python|accelerate) ", line)]


def find_main(command: list[str]):
    script = next(word for word in command if word.endswith(".py"))
    return importlib.import_module(script[:-3]), command[command.index(script) :]


class Parsed(Exception):
    """The arguments were read; nothing else is to happen."""


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_its_script_understands_it(recipe, monkeypatch):
    script = {"base": "pretrain_ldm"}.get(recipe.stem, f"train_{recipe.stem}")
    module = importlib.import_module(script)

    def parse(*groups, **more):
        parsed = whole(*groups, **more)
        raise Parsed({k: v for group in parsed for k, v in vars(group).items()})

    whole = module.parse
    monkeypatch.setattr(module, "parse", parse)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", "--config", str(recipe)])
    with pytest.raises(Parsed) as found:
        module.main()
    arguments = found.value.args[0]
    assert arguments["output_dir"].startswith(("runs/", "/shared/"))
    if script != "pretrain_ldm":
        assert arguments["label_column"] or arguments["caption_column"]


@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if not str(r).startswith(LOCAL) and r.stem != "base"], ids=str
)
def test_its_plan_is_possible(recipe, monkeypatch, tmp_path, capsys):
    """The two commands in its head: they name this very file, and the second plans it."""
    train, plan = read_commands(recipe)
    assert str(recipe) in train and str(recipe) in plan
    assert find_main(train)[1][0] == f"train_{recipe.stem}.py"
    module, arguments = find_main(plan)
    monkeypatch.chdir(ROOT)
    plot = ["--plot", str(tmp_path / "plan.png")]
    monkeypatch.setattr(sys, "argv", [*arguments, *plot, "--json"])
    monkeypatch.setattr("utils.privacy.plan.calibrate_table", lambda *a: [])  # of other epsilons
    monkeypatch.setattr("utils.privacy.plots.plot_noise_trade_off", lambda *a: None)
    module.main()
    shown = capsys.readouterr().out
    target = float(re.search(r"target_epsilon: (\S+)", (ROOT / recipe).read_text())[1])
    epsilon = float(re.search(r"is epsilon ([\d.]+)", shown)[1])
    assert target - 0.01 < epsilon <= target


def test_two_nodes_use_eight_processes():
    config = load_config_from_file(str(ROOT / "examples" / "two_nodes" / "accelerate.yaml"))
    assert (config.num_machines, config.num_processes) == (2, 8)
    assert str(config.distributed_type.value) == "MULTI_GPU"


def test_a_plan_says_what_is_missing(monkeypatch):
    import privacy_report

    monkeypatch.setattr(sys, "argv", ["privacy_report.py", "plan", "--num_units", "100"])
    with pytest.raises(UsageError, match="--expected_batch_size, --max_train_steps"):
        privacy_report.main()
