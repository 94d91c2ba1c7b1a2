"""Stable Diffusion 1.5, 2.1 and XL: the same code trains, exports and reloads each layout."""

import gc
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from tests.conftest import read_json, train_arguments, train_here
from tests.hub_stand_in import hub_stand_in
from utils.arguments.methods import LoraArguments
from utils.models.lora import add_lora, save_lora
from utils.models.pipelines import load_pipeline
from utils.models.public_models import (
    STABLE_DIFFUSION,
    build_autoencoder,
    build_scheduler,
    build_stable_diffusion,
    build_text_encoder,
    build_tokenizer,
)
from utils.models.text import embed_captions

WORDS = [f"the digit {d}" for d in range(10)]


def build_tiny_xl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL's layout (two text encoders, pooled text, sizes) for 16 x 16 images."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(WORDS, 600, 8)
    first = build_text_encoder(tokenizer, 16, 2)
    config = first.config.to_dict() | {"hidden_size": 32, "projection_dim": 24}
    second = CLIPTextModelWithProjection(CLIPTextConfig(**config | {"intermediate_size": 64}))
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        cross_attention_dim=48,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24 + 6 * 8,
        norm_num_groups=4,
    )
    return StableDiffusionXLPipeline(
        vae=build_autoencoder((8, 16)),
        text_encoder=first,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=build_scheduler("epsilon"),
        add_watermarker=False,
    )


@pytest.fixture(scope="module")
def xl_base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("xl")
    build_tiny_xl().save_pretrained(folder)
    return folder


def test_the_u_net_of_xl_is_conditioned_as_the_pipeline_does(xl_base):
    pipeline = load_pipeline(str(xl_base))
    told = embed_captions(pipeline, ["the digit 3", ""], 16)
    for row, prompt in enumerate(("the digit 3", "")):
        words, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
        torch.testing.assert_close(told["encoder_hidden_states"][[row]], words)
        torch.testing.assert_close(told["text_embeds"][[row]], pooled)
    width = pipeline.text_encoder_2.config.projection_dim
    sizes = pipeline._get_add_time_ids(
        (16, 16), (0, 0), (16, 16), torch.float32, text_encoder_projection_dim=width
    )
    torch.testing.assert_close(told["time_ids"], sizes.expand(2, 6))


CONVOLUTIONS = ["--target_modules", "to_q", "to_v", "to_out.0", "proj_in", "conv1", "conv2"]


def test_xl_trains_exports_and_generates(xl_base, image_folder, tmp_path, run_script):
    arguments = train_arguments(xl_base, image_folder, tmp_path / "run", *CONVOLUTIONS)
    assert "saved the weights" in train_here([*arguments, "--lora_alpha", 10])
    card = (tmp_path / "run" / "README.md").read_text()
    assert "StableDiffusionXLPipeline.from_pretrained" in card
    arguments = ["--pretrained_model_name_or_path", xl_base, "--adapter", tmp_path / "run"]
    arguments += ["--prompts", "the digit 3", "--num_images", 1, "--num_inference_steps", 2]
    run = run_script("sample.py", *arguments, "--output_dir", tmp_path / "images")
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "script, more", [("train_dp_loda", []), ("train_dp_ldm", ["--train_text_encoder"])]
)
def test_what_xl_cannot_do_is_said(xl_base, image_folder, tmp_path, script, more):
    shown = train_here(train_arguments(xl_base, image_folder, tmp_path / "run", *more), script)
    assert shown.startswith("error: ") and "Stable Diffusion XL" in shown


PLAIN_DIFFUSERS = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
base, adapter, latents, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(base)
pipeline.load_lora_weights(adapter)
noise = torch.from_numpy(np.load(latents))
images = pipeline(["the digit 3"] * 2, latents=noise, num_inference_steps=4, height=16, width=16,
                  output_type="np").images
np.save(output, images)
"""


@pytest.mark.parametrize("layout", ["sd", "xl"])
def test_plain_diffusers_generates_the_same_from_the_hub(tiny_base, xl_base, tmp_path, layout):
    """By repository name, in a process without this project; convolutions too, alpha not rank."""
    base = {"sd": tiny_base, "xl": xl_base}[layout]
    pipeline = load_pipeline(str(base))
    targets = CONVOLUTIONS[1:]
    add_lora(pipeline, LoraArguments(rank=4, lora_alpha=10, target_modules=targets))
    torch.manual_seed(0)
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    save_lora(pipeline, tmp_path / "adapter")
    noise = torch.randn(2, 4, 8, 8)
    settings = {"num_inference_steps": 4, "height": 16, "width": 16, "output_type": "np"}
    ours = pipeline(["the digit 3"] * 2, latents=noise, **settings).images
    pipeline.unet.disable_adapters()
    without = pipeline(["the digit 3"] * 2, latents=noise, **settings).images
    np.save(tmp_path / "latents.npy", noise.numpy())
    with hub_stand_in() as hub:
        hub.put("model", "user/base", base)
        hub.put("model", "user/adapter", tmp_path / "adapter")
        command = [sys.executable, "-c", PLAIN_DIFFUSERS, "user/base", "user/adapter"]
        run = subprocess.run(
            [*command, "latents.npy", "images.npy"],
            cwd=tmp_path, env=hub.environment(tmp_path / "home"), capture_output=True, text=True,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert np.abs(np.load(tmp_path / "images.npy") - ours).max() <= 1e-4
    assert np.abs(without - ours).max() > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("version", STABLE_DIFFUSION)
def test_stable_diffusion_trains_exports_and_reloads_at_full_size(version, image_folder, tmp_path):
    """860 million weights, at 64 pixels: about a minute, 6 GB of memory and 2 GB of disk."""
    base, output = tmp_path / "base", tmp_path / "run"
    build_stable_diffusion(version, WORDS).save_pretrained(base)
    gc.collect()
    arguments = train_arguments(base, image_folder, output, "--resolution", 64, "--rank", 2)
    arguments += ["--expected_batch_size", 2, "--max_train_steps", 2]
    arguments += ["--noise_multiplicity", 1, "--num_validation_images", 0, "--lora_alpha", 5]
    assert "saved the weights" in train_here(arguments)
    assert read_json(output / "privacy.json")["private"] is True
    gc.collect()
    pipeline = load_pipeline(str(base))
    shutil.rmtree(base)
    pipeline.load_lora_weights(output)
    lora = {n: p for n, p in pipeline.unet.named_parameters() if "lora_B" in n}
    # q, k, v and out of two attentions in each of 16 transformers, and their two projections
    assert len(lora) == 16 * (2 * 4 + 2) and all(p.abs().max() > 0 for p in lora.values())
    assert {m.scaling["default_0"] for m in pipeline.unet.modules() if hasattr(m, "scaling")} == {
        2.5
    }
