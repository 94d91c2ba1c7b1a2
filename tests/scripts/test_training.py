"""Every script, started as a user starts it, on tiny real models; and every mistake."""

import json
import os
import shutil
import stat
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import load_dataset
from PIL import Image

from tests.conftest import BUDGET, few_fast, read_json, train_arguments
from utils.arguments.methods import LoraArguments
from utils.arguments.training import DataArguments
from utils.data.images import ImageRows, find_readable_rows
from utils.data.latents import Objective, encode_units, unit_losses
from utils.data.private_set import PrivateSet
from utils.data.rows import load_split, read_captions
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.adapters import load_adapter
from utils.models.lora import add_lora, save_lora
from utils.models.pipelines import collect_trained_modules, load_pipeline
from utils.privacy.accounting import pld_epsilon, quote
from utils.privacy.randomness import SecretRandomness
from utils.privacy.training import clipped_gradient_sum


def test_training_leaves_what_it_promises(trained):
    output, shown = trained
    there = {path.name for path in output.iterdir()}
    assert there == {
        *("pytorch_lora_weights.safetensors", "privacy.json", "README.md", "samples", "private"),
        "sampling.json",
    }
    assert stat.S_IMODE(os.stat(output / "private").st_mode) == 0o700
    statement = read_json(output / "privacy.json")
    assert statement["private"] is True and statement["num_units"] == 40
    recomputed = pld_epsilon(statement["events"], statement["delta"])
    assert recomputed == pytest.approx(statement["epsilon"]["add_or_remove_one"], abs=1e-9)
    assert recomputed <= 8
    assert f"{quote(recomputed)}" in (output / "README.md").read_text()
    assert "loss" not in shown.lower()


def test_sampling_and_evaluation(run_script, tiny_base, trained, image_folder, tmp_path):
    folder = tmp_path / "images"
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--adapter", trained[0]]
    arguments += ["--class_names", 0, 1, 2, 3, "--caption_template", "the digit {label}"]
    arguments += ["--num_images", 10, "--num_inference_steps", 2, "--output_dir", folder]
    run = run_script("sample.py", *arguments, "--batch_size", 4, launch=True)
    assert run.returncode == 0, run.stderr
    rows = load_dataset(
        "imagefolder", data_dir=str(folder), split="train", cache_dir=tmp_path / "c"
    )
    assert rows["label"] == list("0123012301")
    assert rows[0]["text"] == "the digit 0"
    assert (folder / "grid.png").exists()

    # Interrupted and started again, with another batch size, it ends with the same images.
    before = {i: np.asarray(Image.open(folder / f"{i:06}.png"), int) for i in range(10)}
    for index in (3, 4, 9):
        (folder / f"{index:06}.png").unlink()
    run = run_script("sample.py", *arguments, "--batch_size", 3)
    assert run.returncode == 0, run.stderr
    for index, pixels in before.items():
        again = np.asarray(Image.open(folder / f"{index:06}.png"), int)
        assert np.abs(again - pixels).max() <= 1

    # Other settings do not mix into the same folder.
    run = run_script("sample.py", *arguments, "--seed", 5)
    assert run.returncode == 2 and "other settings" in run.stderr

    arguments = [
        "--synthetic",
        folder,
        "--test_data_dir",
        image_folder,
        "--test_split",
        "train",
    ]
    arguments += ["--classifier_steps", 3, "--classifier_seeds", 2, "--evaluation_resolution", 16]
    arguments += ["--metrics", "utility"]
    run = run_script("evaluate.py", *arguments)
    assert run.returncode == 0, run.stderr
    metrics = read_json(folder / "metrics.json")["accuracy"]
    assert 0 <= metrics["value"] <= 1 and metrics["covered_by_epsilon"] is False


LODA_FILES = {"adapter_config.json", "adapter_model.safetensors", "loda.py", "pipeline.py"}
OTHER_METHODS = [
    ("train_dp_loda.py", ["--rank", 2, "--ema_decay", 0.9], LODA_FILES),
    ("train_dp_ldm.py", ["--optimizer", "adam_bc", "--timestep_sampling", "high_noise"], {"unet"}),
    ("train_dp_ldm.py", ["--trainable", "all", "--optimizer", "sgd", "--snr_gamma", 5], {"unet"}),
    ("train_dp_ldm.py", ["--train_text_encoder"], {"unet", "pytorch_lora_weights.safetensors"}),
]


@pytest.mark.parametrize("script, more, files", few_fast(OTHER_METHODS))
def test_every_method_trains_and_what_it_leaves_can_be_sampled(
    run_script, tiny_base, image_folder, tmp_path, script, more, files
):
    arguments = train_arguments(tiny_base, image_folder, tmp_path / "run", *more)
    run = run_script(script, *arguments)
    assert run.returncode == 0, run.stderr
    there = {path.name for path in (tmp_path / "run").iterdir()}
    assert there == files | {"privacy.json", "sampling.json", "README.md", "samples", "private"}
    assert read_json(tmp_path / "run" / "privacy.json")["private"] is True
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--adapter", tmp_path / "run"]
    arguments += ["--prompts", "the digit 3", "--num_images", 2, "--num_inference_steps", 2]
    run = run_script("sample.py", *arguments, "--output_dir", tmp_path / "images")
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "images" / "000001.png").exists()

    # evaluate.py draws with it too, as it does with no adapter at all.
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--adapter", tmp_path / "run"]
    arguments += ["--class_names", 0, 1, "--num_images", 4, "--num_inference_steps", 2]
    arguments += ["--synthetic", tmp_path / "set", "--test_data_dir", image_folder]
    arguments += ["--test_split", "train", "--classifier_steps", 2, "--classifier_seeds", 1]
    run = run_script("evaluate.py", *arguments)
    assert run.returncode == 0, run.stderr
    assert read_json(tmp_path / "set" / "metrics.json")["accuracy"]["num_synthetic"] == 4


def test_the_text_encoder_trains_under_the_same_clip_and_reloads(
    tiny_base, image_folder, tmp_path, accelerator
):
    """LoRA on the text encoder: its gradients are recorded, and what is saved draws the same."""
    from tests.worlds import build_plan
    from utils.arguments.methods import LdmArguments
    from utils.gradients.per_unit_gradients import PerUnitGradients
    from utils.models.adapters import load_adapter
    from utils.models.own_weights import save_denoiser, unfreeze
    from utils.models.pipelines import load_pipeline

    pipeline = load_pipeline(str(tiny_base))
    torch.manual_seed(0)
    unfreeze(pipeline, LdmArguments(train_text_encoder=True))
    for name, parameter in pipeline.text_encoder.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.3)
    engine = PerUnitGradients(collect_trained_modules(pipeline), num_draws=2)
    assert any("text_encoder" in name for name in engine.names)
    rows = load_split(None, None, str(image_folder), "train", tmp_path / "cache")
    captions = read_captions(
        rows, DataArguments(label_column="label", caption_template="the digit {label}")
    )
    private_set = PrivateSet(
        rows, "image", captions, torch.arange(40), {}, find_readable_rows(ImageRows(rows)).digests
    )
    units, _ = encode_units(pipeline, private_set, 16, tmp_path / "latents")

    def losses(indices):
        return unit_losses(pipeline, units, indices, Objective(2), SecretRandomness(7))

    plan = build_plan(max_grad_norm=0.01)
    total = clipped_gradient_sum(
        accelerator, engine, losses, torch.arange(3), plan, micro_batch_size=1
    )
    assert 0.0 < total.norm() <= 3 * 0.01
    starts = torch.tensor([0, *[p.numel() for p in engine.parameters]]).cumsum(0)
    text = [i for i, name in enumerate(engine.names) if "text_encoder" in name]
    assert all(total[starts[i] : starts[i + 1]].abs().sum() > 0 for i in text)

    def draw(pipeline):
        latents = torch.ones(1, 4, 8, 8)
        pipeline.set_progress_bar_config(disable=True)
        return pipeline("the digit 3", latents=latents, num_inference_steps=2, output_type="np")

    (tmp_path / "saved").mkdir()
    save_denoiser(pipeline, tmp_path / "saved")
    again = load_pipeline(str(tiny_base))
    plain = draw(again).images
    load_adapter(again, tmp_path / "saved")
    assert np.abs(draw(again).images - draw(pipeline).images).max() <= 1e-4
    assert np.abs(draw(again).images - plain).max() > 1e-4


def test_attention_blocks_are_chosen_by_name(tiny_base):
    from utils.arguments.methods import LdmArguments
    from utils.models.own_weights import unfreeze

    sizes = {}
    for blocks in (None, ["mid_block"], ["down_blocks.0", "up_blocks.1"]):
        pipeline = load_pipeline(str(tiny_base))
        unfreeze(pipeline, LdmArguments(trainable_blocks=blocks))
        engine = PerUnitGradients(pipeline.unet)
        assert all(".attentions." in name for name in engine.names)
        assert all(name.startswith(tuple(blocks or [""])) for name in engine.names)
        sizes[str(blocks)] = engine.num_parameters
    assert len(set(sizes.values())) == 3 and max(sizes.values()) == sizes["None"]
    with pytest.raises(UsageError, match="there are: down_blocks.0"):
        unfreeze(load_pipeline(str(tiny_base)), LdmArguments(trainable_blocks=["down_block"]))


PLAIN_DIFFUSERS = """
import sys
import numpy as np, torch
from diffusers import StableDiffusionPipeline
base, adapter, latents, output = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights(adapter)
latents = torch.from_numpy(np.load(latents))
prompts = ["the digit 3"] * 2
images = pipeline(prompts, latents=latents, num_inference_steps=4, output_type="np").images
assert not any(name.split(".")[0] in ("utils", "train_dp_lora") for name in sys.modules)
np.save(output, images)
"""


@pytest.mark.parametrize("alpha", [None, 1, 32])
def test_plain_diffusers_generates_what_the_trained_model_did(tiny_base, tmp_path, alpha):
    """In a process that cannot import this project, also with alpha unlike the rank; and so does
    what sample.py loads, where the adapter is added to the weights."""
    from utils.models.pipelines import load_pipeline

    pipeline = load_pipeline(str(tiny_base))
    add_lora(pipeline, LoraArguments(rank=4, lora_alpha=alpha))
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    torch.manual_seed(0)
    scaling = (alpha or 4) / 4
    for parameter in trained:  # as strong at every alpha: more would amplify rounding to anything
        parameter.data.normal_(std=0.3 / scaling**0.5)
    save_lora(pipeline, tmp_path / "adapter")
    latents = torch.randn(2, 4, 8, 8)
    prompts = ["the digit 3"] * 2
    ours = pipeline(prompts, latents=latents, num_inference_steps=4, output_type="np").images
    pipeline.unet.disable_adapters()
    without = pipeline(prompts, latents=latents, num_inference_steps=4, output_type="np").images
    np.save(tmp_path / "latents.npy", latents.numpy())
    command = [sys.executable, "-c", PLAIN_DIFFUSERS, tiny_base, tmp_path / "adapter"]
    command += [tmp_path / "latents.npy", tmp_path / "images.npy"]
    run = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    theirs = np.load(tmp_path / "images.npy")
    assert np.abs(theirs - ours).max() <= 1e-4
    assert np.abs(without - ours).max() > 1e-2
    again = load_pipeline(str(tiny_base))
    load_adapter(again, tmp_path / "adapter")
    assert not any("lora" in name for name, _ in again.unet.named_modules())
    merged = again(prompts, latents=latents, num_inference_steps=4, output_type="np").images
    assert np.abs(merged - ours).max() <= 1e-4


def test_a_frozen_a_stays_where_it_was_and_is_exported(tiny_base, tmp_path):
    from utils.gradients.per_unit_gradients import PerUnitGradients

    pipeline = load_pipeline(str(tiny_base))
    add_lora(pipeline, LoraArguments(rank=4, freeze_lora_a=True))
    assert all("lora_B" in name for name in PerUnitGradients(pipeline.unet).names)
    save_lora(pipeline, tmp_path / "adapter")
    again = load_pipeline(str(tiny_base))
    again.load_lora_weights(tmp_path / "adapter")
    before, after = (
        {n.split(".lora_A")[0]: p for n, p in unet.named_parameters() if ".lora_A." in n}
        for unet in (pipeline.unet, again.unet)
    )
    assert before and before.keys() == after.keys()
    for name, parameter in before.items():
        torch.testing.assert_close(after[name], parameter)


@pytest.fixture
def patients(image_folder, tmp_path):
    """The 40 images as those of 12 patients: one has one image, one has many."""
    folder = tmp_path / "patients"
    folder.mkdir()
    lines = []
    for index, path in enumerate(sorted(image_folder.rglob("*.png"))):
        name, patient = f"{index}.png", f"p{min(index // 2, 11) if index else 'first'}"
        shutil.copy(path, folder / name)
        lines.append({"file_name": name, "text": "the digit 1", "patient": patient})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def test_patients_are_units(run_script, tiny_base, patients, tmp_path):
    arguments = ["--pretrained_model_name_or_path", tiny_base, "--train_data_dir", patients]
    arguments += ["--caption_column", "text", "--privacy_unit_column", "patient", *BUDGET]
    arguments += ["--expected_batch_size", 6, "--max_train_steps", 2, "--noise_multiplicity", 3]
    arguments += ["--num_validation_images", 1, "--clipping", "automatic", "--secure_noise"]
    run = run_script("train_dp_lora.py", *arguments, "--output_dir", tmp_path / "run")
    assert run.returncode == 0, run.stderr
    statement = read_json(tmp_path / "run" / "privacy.json")
    assert statement["num_units"] == 13 and statement["privacy_unit"] == "all images of one patient"
    assert statement["events"][0]["sampling_rate"] == pytest.approx(6 / 13)
    assert statement["events"][0]["clipping"] == "automatic"
    assert "13 private units" in (tmp_path / "run" / "README.md").read_text()

    lines = (patients / "metadata.jsonl").read_text().splitlines()
    nobody = json.loads(lines[5]) | {"patient": None}
    (patients / "metadata.jsonl").write_text(
        "\n".join([*lines[:5], json.dumps(nobody), *lines[6:]])
    )
    run = run_script("train_dp_lora.py", *arguments, "--output_dir", tmp_path / "again")
    assert run.returncode == 2 and "1 row(s) have no value" in run.stderr
