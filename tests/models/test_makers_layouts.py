"""Bases as their makers ship them are loaded, trained on and drawn from, or refused with reason."""

import json
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

from tests.conftest import train_arguments, train_here
from tests.layouts import LAYOUTS, SIDE, build_layout
from utils.errors import UsageError
from utils.models.families import find_family
from utils.models.pipelines import choose_resolution, load_pipeline

DISTILLED = ("sdxl_turbo", "lcm")
BASES = [name for name in LAYOUTS if name not in DISTILLED]


def change_json(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refuse(*source) -> str:
    with pytest.raises(UsageError) as refused:
        load_pipeline(*source)
    return str(refused.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", BASES)
def test_a_base_is_loaded_as_it_is_shipped(tmp_path, name, suffix):
    folder = str(build_layout(name, tmp_path / name, suffix))
    pipeline = load_pipeline(folder)
    assert choose_resolution(pipeline, None) == SIDE
    plain = DiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, **({} if "xl" in name else {"safety_checker": None})
        | ({} if "xl" in name else {"feature_extractor": None})
    )  # fmt: skip
    assert type(pipeline) is type(plain)
    for part in ("unet", "vae", "text_encoder"):
        theirs = getattr(plain, part).state_dict()
        for key, value in getattr(pipeline, part).state_dict().items():
            assert value.dtype == torch.float32 or not value.is_floating_point()
            assert torch.equal(value, theirs[key])


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_weights_that_come_in_a_variant_only(tmp_path, name, suffix):
    folder = str(build_layout(name, tmp_path / name, suffix, "fp16"))
    assert "give --variant fp16" in refuse(folder)
    pipeline = load_pipeline(folder, None, "fp16")
    assert {p.dtype for p in pipeline.unet.parameters()} == {torch.float32}
    assert {p.dtype for p in pipeline.text_encoder.parameters()} == {torch.float32}
    assert "give --variant fp16" in refuse(folder, None, "bf16")
    plain = str(build_layout(name, tmp_path / "plain", suffix))
    assert "fp16" in refuse(plain, None, "fp16")


@pytest.mark.parametrize("name", DISTILLED)
def test_a_distilled_model_is_refused_unless_it_is_meant(tmp_path, name):
    folder = build_layout(name, tmp_path / "base")
    if name == "lcm":
        assert "LatentConsistencyModelPipeline" in refuse(str(folder))
        change_json(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    assert "distilled" in refuse(str(folder)) and "--allow_distilled" in refuse(str(folder))
    load_pipeline(str(folder), None, None, True)


def test_a_name_that_says_that_it_is_distilled(tmp_path):
    folder = build_layout("sdxl", tmp_path / "DreamShaper-XL_Lightning")
    assert "its name says lightning" in refuse(str(folder))
    shutil.move(folder, tmp_path / "lightnings")
    load_pipeline(str(tmp_path / "lightnings"))


def test_a_schedule_that_ends_in_pure_noise_is_not_taken_for_distilled(tmp_path):
    folder = build_layout("sdxl", tmp_path / "base")
    more = {"timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    change_json(folder / "scheduler" / "scheduler_config.json", rescale_betas_zero_snr=True, **more)
    load_pipeline(str(folder))


@pytest.mark.parametrize("size, asked", [([16, 16], 32), ([16, 24], None), (None, None)])
def test_a_sample_size_of_height_and_width(tmp_path, size, asked):
    folder = build_layout("sd15", tmp_path / "base")
    change_json(folder / "unet" / "config.json", sample_size=size)
    pipeline = load_pipeline(str(folder))
    if asked is not None:
        assert choose_resolution(pipeline, None) == asked
        return
    with pytest.raises(UsageError, match="give --resolution"):
        choose_resolution(pipeline, None)
    assert choose_resolution(pipeline, 48) == 48


def test_a_tiny_autoencoder_is_refused_before_anything_is_reserved(tmp_path, image_folder):
    folder = build_layout("sd15", tmp_path / "base")
    shutil.rmtree(folder / "vae")
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    tiny.save_pretrained(folder / "vae")
    change_json(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    shown = train_here(train_arguments(folder, image_folder, tmp_path / "run"))
    assert shown.startswith("error: ") and "AutoencoderTiny" in shown
    assert not (tmp_path / "run" / "private" / "ledger.jsonl").exists()


@pytest.mark.parametrize(
    "changes, said",
    [({"in_channels": 9}, "inpainting"), ({"num_class_embeds": 7}, "class embeddings")],
)
def test_a_u_net_of_another_task_is_refused(tmp_path, changes, said):
    folder = build_layout("sd21", tmp_path / "base")
    change_json(folder / "unet" / "config.json", **changes)
    pipeline = {"_class_name": "UNet2DConditionModel"}
    config = json.loads((folder / "unet" / "config.json").read_text()) | pipeline
    unet = diffusers.UNet2DConditionModel.from_config(config)
    unet.save_pretrained(folder / "unet")
    assert said in refuse(str(folder))


def test_latents_are_scaled_as_the_pipeline_of_xl_undoes_it(tmp_path):
    """Some autoencoders of XL come with the mean and the standard deviation of each channel."""
    folder = build_layout("sdxl", tmp_path / "base")
    mean, std = [0.5, -1.0, 2.0, 0.0], [2.0, 3.0, 0.5, 1.0]
    change_json(folder / "vae" / "config.json", latents_mean=mean, latents_std=std)
    pipeline = load_pipeline(str(folder))
    images = torch.rand(2, 3, SIDE, SIDE) * 2 - 1
    latents = find_family(pipeline).encode_images(images)
    undone = latents * torch.tensor(std).view(1, 4, 1, 1) / 0.13025
    undone += torch.tensor(mean).view(1, 4, 1, 1)
    torch.testing.assert_close(undone, pipeline.vae.encode(images).latent_dist.mode())


@pytest.mark.parametrize("name", BASES)
def test_it_trains_and_draws_from_what_it_left(tmp_path, image_folder, name):
    folder = build_layout(name, tmp_path / "base", variant="fp16" if name == "sdxl" else "")
    more = ["--variant", "fp16"] if name == "sdxl" else []
    output = tmp_path / "run"
    more += ["--num_inference_steps", 3, "--num_validation_images", 2]
    arguments = train_arguments(folder, image_folder, output, *more)
    assert "saved the weights" in train_here(arguments)
    settings = json.loads((output / "sampling.json").read_text())
    assert settings["num_inference_steps"] == 3 and settings["resolution"] == SIDE
    assert settings["guidance_scale"] == (5.0 if name == "sdxl" else 7.5)
    card = (output / "README.md").read_text()
    assert ('variant="fp16"' in card) == (name == "sdxl")
    assert np.isfinite(
        np.asarray(diffusers.utils.load_image(str(output / "samples/0000.png")))
    ).all()
