"""How images are drawn belongs to the model: sampling.json, and what reads it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from tests.conftest import build_tiny_pipeline, read_json, train_arguments, train_here
from tests.layouts import build_layout
from utils.arguments.sampling import DrawingArguments
from utils.arguments.training import DataArguments, ModelArguments
from utils.errors import UsageError
from utils.models.drawing import (
    adopt_template,
    choose_settings,
    read_settings,
    write_settings,
)
from utils.models.families import find_family
from utils.models.pipelines import load_pipeline

SIDE = 16


@pytest.fixture(scope="module")
def pipeline():
    return build_tiny_pipeline()


def test_what_is_asked_wins_then_the_adapter_then_its_base(pipeline):
    adapter = {"resolution": 32, "guidance_scale": 3.0, "negative_prompt": None}
    base = {"resolution": 64, "guidance_scale": 4.0, "num_inference_steps": 9}
    base["negative_prompt"] = "blurred"
    chosen = choose_settings(pipeline, DrawingArguments(guidance_scale=1.0), None, adapter, base)
    assert (chosen.resolution, chosen.guidance_scale, chosen.num_inference_steps) == (32, 1.0, 9)
    assert chosen.negative_prompt == "blurred"
    assert chosen.scheduler == find_family(pipeline).scheduler
    asked = DrawingArguments(negative_prompt="", num_inference_steps=2)
    chosen = choose_settings(pipeline, asked, 48, adapter, base)
    assert (chosen.resolution, chosen.num_inference_steps, chosen.negative_prompt) == (48, 2, "")


@pytest.mark.parametrize("name, guidance", [("sd15", 7.5), ("sd21", 7.5), ("sdxl", 5.0)])
def test_by_default_guidance_is_that_of_the_pipeline(tmp_path, name, guidance):
    base = load_pipeline(str(build_layout(name, tmp_path / "base")))
    chosen = choose_settings(base, DrawingArguments(), None)
    assert (chosen.guidance_scale, chosen.num_inference_steps) == (guidance, 25)
    chosen.use_scheduler(base)
    kept = base.scheduler.config
    assert (kept.beta_start, kept.beta_schedule) == (0.00085, "scaled_linear")
    assert kept.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")


def test_settings_come_back_as_they_were_written(pipeline, tmp_path):
    chosen = choose_settings(pipeline, DrawingArguments(negative_prompt="text"), None)
    write_settings(chosen, tmp_path)
    assert choose_settings(pipeline, DrawingArguments(), None, read_settings(tmp_path)) == chosen
    assert read_settings(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    "content",
    [
        "{", "[]", '{"resolution": "256"}', '{"num_inference_steps": 0}', '{"resolution": true}',
        '{"guidance_scale": "high"}',
        '{"patients": ["x"]}', '{"scheduler": "DDIMScheduler"}', '{"negative_prompt": [1]}',
        '{"scheduler": {"_class_name": "AutoencoderKL"}}', '{"scheduler": {}}',
    ],
)  # fmt: skip
def test_a_file_that_says_something_else_is_refused(tmp_path, content):
    (tmp_path / "sampling.json").write_text(content)
    with pytest.raises(UsageError, match="does not say how to draw images"):
        read_settings(tmp_path)


@pytest.mark.slow
def test_a_run_says_how_its_samples_were_drawn_and_sample_py_draws_so(
    tiny_base, image_folder, tmp_path, run_script
):
    """The adapter was trained at 32 pixels on a base of 16, with a negative prompt."""
    output = tmp_path / "run"
    arguments = train_arguments(tiny_base, image_folder, output, "--resolution", 32)
    arguments += ["--validation_prompt", "the digit 3", "--negative_prompt", "the digit 8"]
    arguments += ["--num_inference_steps", 3, "--guidance_scale", 4.5]
    assert "saved the weights" in train_here(arguments)
    settings = read_json(output / "sampling.json")
    assert settings["resolution"] == 32 and settings["num_inference_steps"] == 3
    assert settings["guidance_scale"] == 4.5 and settings["negative_prompt"] == "the digit 8"

    drawn = ["--pretrained_model_name_or_path", tiny_base, "--adapter", output]
    drawn += ["--prompts", "the digit 3", "--num_images", 2]
    run = run_script("sample.py", *drawn, "--output_dir", tmp_path / "drawn")
    assert run.returncode == 0, run.stderr
    for index in range(2):  # image i starts from the noise of a generator whose seed is i
        paths = (tmp_path / "drawn" / f"{index:06}.png", output / "samples" / f"{index:04}.png")
        ours, sample = (np.asarray(Image.open(path), float) for path in paths)
        # sample.py adds the LoRA to the weights first, which rounds otherwise: one level of 255.
        assert ours.shape == sample.shape and np.abs(ours - sample).max() <= 1
    recorded = read_json(tmp_path / "drawn" / "sampling.json")
    assert {name: recorded[name] for name in settings} == settings

    # Another adapter's settings, or other wishes, are images of other settings.
    again = run_script("sample.py", *drawn, "--output_dir", tmp_path / "drawn")
    assert again.returncode == 0, again.stderr
    (output / "sampling.json").write_text(json.dumps(settings | {"guidance_scale": 1.0}))
    other = run_script("sample.py", *drawn, "--output_dir", tmp_path / "drawn")
    assert other.returncode == 2 and "images of other settings" in other.stderr


@pytest.mark.slow
def test_captions_are_made_as_the_base_was_trained_and_prompts_as_the_adapter_was(
    tiny_base, image_folder, tmp_path, run_script, capsys
):
    base, output = tmp_path / "base", tmp_path / "run"
    shutil.copytree(tiny_base, base)
    known = json.loads((base / "sampling.json").read_text())
    known["caption_template"] = "the digit {label}"
    (base / "sampling.json").write_text(json.dumps(known))
    arguments = train_arguments(base, image_folder, output)
    at = arguments.index("--caption_template")
    without = [*arguments[:at], *arguments[at + 2 :]]
    assert "saved the weights" in train_here(without)
    assert "captions as the base model was trained: 'the digit {label}'" in capsys.readouterr().err
    assert read_json(output / "sampling.json")["caption_template"] == "the digit {label}"
    drawn = ["--adapter", output, "--class_names", 3, 1, "--num_images", 2]
    drawn += ["--pretrained_model_name_or_path", tiny_base, "--output_dir", tmp_path / "drawn"]
    assert run_script("sample.py", *drawn).returncode == 0
    lines = (tmp_path / "drawn" / "metadata.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["the digit 3", "the digit 1"]
    # What the command line says wins; nothing is said where there are captions already.
    model = ModelArguments(pretrained_model_name_or_path=str(base))
    for asked in ({"caption_template": "a {label}"}, {"label_column": None}):
        data = DataArguments(**({"label_column": "label"} | asked))
        assert adopt_template(data, model) == data
    assert adopt_template(DataArguments(), model).template == "a photo of a {label}"


@pytest.mark.parametrize("template", ["a photo", 7])
def test_a_template_without_a_place_for_the_class_is_refused(tmp_path, template):
    (tmp_path / "sampling.json").write_text(json.dumps({"caption_template": template}))
    with pytest.raises(UsageError, match="does not say how to draw images"):
        read_settings(tmp_path)
