"""The recipes of examples/: each can be parsed by its script, and its plan is possible."""

import csv
import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.commands.config.config_args import load_config_from_file
from datasets import ClassLabel, Dataset
from PIL import Image

from tests.conftest import ROOT, build_tiny_pipeline
from tests.families import build_family
from tests.layouts import build_layout
from utils.arguments.parsing import read_yaml
from utils.errors import UsageError
from utils.methods import stages
from utils.models import shapes
from utils.models.pipelines import prepare_pipeline

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


def read_arguments(script: str, monkeypatch, *words) -> dict:
    """What a script makes of its command line."""
    module = importlib.import_module(script)

    def parse(*groups, **more):
        parsed = whole(*groups, **more)
        raise Parsed({k: v for group in parsed for k, v in vars(group).items()})

    whole = module.parse
    monkeypatch.setattr(module, "parse", parse)
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *map(str, words)])
    with pytest.raises(Parsed) as found:
        module.main()
    return found.value.args[0]


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_its_script_understands_it(recipe, monkeypatch):
    script = {"base": "pretrain_ldm"}.get(recipe.stem, f"train_{recipe.stem}")
    arguments = read_arguments(script, monkeypatch, "--config", recipe)
    assert arguments["output_dir"].startswith(("runs/", "/shared/"))
    if script != "pretrain_ldm":
        assert arguments["label_column"] or arguments["caption_column"]


@pytest.mark.parametrize("script", ["curate", "relabel", "release_means"])
@pytest.mark.parametrize("recipe", [r for r in RECIPES if r.stem.startswith("dp_")], ids=str)
def test_the_stages_beside_training_understand_it(script, recipe, monkeypatch):
    words = ["--config", recipe, *([] if script == "release_means" else ["--synthetic", "set"])]
    arguments = read_arguments(script, monkeypatch, *words)
    assert arguments["output_dir"] == read_yaml(ROOT / recipe)["output_dir"]
    assert not {"rank", "trainable", "select_saliency"} & set(arguments)


@pytest.mark.usefixtures("no_device_yet")  # recipes differ in precision
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
    # The layers of Stable Diffusion take minutes on a CPU.
    monkeypatch.setattr(shapes, "build_stable_diffusion", lambda *a: build_tiny_pipeline())
    monkeypatch.setattr(stages, "choose_resolution", lambda *a: 32)
    base = read_yaml(ROOT / recipe)["pretrained_model_name_or_path"]
    if base in FLOWS:
        monkeypatch.setattr(
            stages, "load_shape", lambda *a: prepare_pipeline(build_family(FLOWS[base]), base)
        )
    module.main()
    shown = capsys.readouterr().out
    target = float(re.search(r"target_epsilon: (\S+)", (ROOT / recipe).read_text())[1])
    epsilon = float(re.search(r"is epsilon ([\d.]+)", shown)[1])
    assert target - 0.01 < epsilon <= target


def draw_images(count: int = 24) -> list[Image.Image]:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 255, (count, 40, 40, 3), np.uint8)
    return [Image.fromarray(image) for image in pixels]


def write_folder(folder: Path, table: str, header: list[str], rows: list[list]) -> list:
    folder.mkdir()
    for index, image in enumerate(draw_images(len(rows))):
        image.save(folder / f"{index}.png")
    with open(folder / table, "w", newline="") as file:
        if table.endswith(".csv"):
            csv.writer(file).writerows([header, *rows])
        else:
            file.writelines(json.dumps(dict(zip(header, row, strict=True))) + "\n" for row in rows)
    return ["--train_data_dir", folder]


def save_set(folder: Path, image: str, **columns) -> list:
    """As the Hub's set has it, once it is here."""
    names = {name: ClassLabel(names=value[0]) for name, value in columns.items() if value[0]}
    rows = Dataset.from_dict({image: draw_images(), **{k: v[1] for k, v in columns.items()}})
    for name, feature in names.items():
        rows = rows.cast_column(name, feature)
    rows.save_to_disk(folder)
    return ["--dataset_name", folder]


def make_private_set(name: str, folder: Path) -> list:
    """A small set such as the recipe is for, and the options that name it."""
    if name in ("captioned_folder", "sd35_medium", "sana", "z_image"):
        rows = [[f"{i}.png", "a photo"] for i in range(24)]
        return write_folder(folder, "metadata.jsonl", ["file_name", "text"], rows)
    if name == "chest_xrays":
        rows = [[f"{i}.png", "effusion", f"00{i // 2}"] for i in range(48)]
        return write_folder(folder, "metadata.csv", ["file_name", "text", "patient_id"], rows)
    if name == "two_nodes":
        return save_set(folder, "image", text=(None, ["a photo"] * 24))
    classes = {"celeba_hq": ["female", "male"]}.get(name, [str(d) for d in range(10)])
    labels = [i % len(classes) for i in range(24)]
    return save_set(folder, "img" if name == "cifar10" else "image", label=(classes, labels))


MAKERS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
}
FLOWS = {
    "stabilityai/stable-diffusion-3.5-medium": "sd35",
    "Efficient-Large-Model/Sana_600M_512px_diffusers": "sana",
    "Tongyi-MAI/Z-Image": "z_image",
}
SMALL = {
    "expected_batch_size": 10, "max_train_steps": 2, "noise_multiplicity": 2,
    "num_validation_images": 2, "num_inference_steps": 2, "target_delta": 1e-3, "rank": 2,
}  # fmt: skip


@pytest.mark.usefixtures("no_device_yet")
@pytest.mark.parametrize(
    "recipe", [r for r in RECIPES if not str(r).startswith(LOCAL) and r.stem != "base"], ids=str
)
def test_it_runs_to_the_end_on_a_small_model_of_its_makers_layout(recipe, monkeypatch, tmp_path):
    """The command in its head, all that it sets but the sizes; then its adapter draws."""
    train, _ = read_commands(recipe)
    module, arguments = find_main(train)
    base = read_yaml(ROOT / recipe)["pretrained_model_name_or_path"]
    small, side = tmp_path / "base", 32
    if base in MAKERS:
        small = build_layout(MAKERS[base], small)
    elif base in FLOWS:
        build_family(FLOWS[base]).save_pretrained(small)
    else:
        side = 16
        build_tiny_pipeline(text_length=77).save_pretrained(small)
    more = ["--pretrained_model_name_or_path", small, "--output_dir", tmp_path / "run"]
    more += ["--resolution", side, *make_private_set(recipe.parts[1], tmp_path / "private")]
    more += [word for name, value in SMALL.items() for word in (f"--{name}", value)]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [*arguments, *map(str, more)])
    module.main()
    run = tmp_path / "run"
    statement = json.loads((run / "privacy.json").read_text())
    assert statement["private"] is True and statement["num_units"] == 24
    assert len(list((run / "samples").glob("0*.png"))) == 2
    assert json.loads((run / "sampling.json").read_text())["resolution"] == side

    prompts = ["--prompts", "a photo", "--num_images", 1, "--output_dir", tmp_path / "drawn"]
    drawn = ["sample.py", *more[:2], "--adapter", run, *prompts]
    monkeypatch.setattr(sys, "argv", list(map(str, drawn)))
    importlib.import_module("sample").main()
    with Image.open(tmp_path / "drawn" / "000000.png") as image:
        assert image.size == (side, side)


def test_two_nodes_use_eight_processes():
    config = load_config_from_file(str(ROOT / "examples" / "two_nodes" / "accelerate.yaml"))
    assert (config.num_machines, config.num_processes) == (2, 8)
    assert str(config.distributed_type.value) == "MULTI_GPU"


def test_a_plan_says_what_is_missing(monkeypatch):
    import privacy_report

    monkeypatch.setattr(sys, "argv", ["privacy_report.py", "plan", "--num_units", "100"])
    with pytest.raises(UsageError, match="--expected_batch_size, --max_train_steps"):
        privacy_report.main()
