"""A single .safetensors file with a whole Stable Diffusion model, as other programs use it."""

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file

from tests.hub_stand_in import hub_stand_in
from tests.layouts import build_layout
from utils.errors import UsageError
from utils.models.pipelines import load_pipeline
from utils.models.processes import find_distillation, read_process

RESNET = {  # of the U-Net: as diffusers names it, as the makers' code did
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
UNET = {
    "conv_in": "input_blocks.0.0",
    "down_blocks.0.resnets.0": "input_blocks.1.0",
    "down_blocks.0.attentions.0": "input_blocks.1.1",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.2.0.op",
    "down_blocks.1.resnets.0": "input_blocks.3.0",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.resnets.0": "output_blocks.0.0",
    "up_blocks.0.resnets.1": "output_blocks.1.0",
    "up_blocks.0.upsamplers.0.conv": "output_blocks.1.1.conv",
    "up_blocks.1.resnets.0": "output_blocks.2.0",
    "up_blocks.1.attentions.0": "output_blocks.2.1",
    "up_blocks.1.resnets.1": "output_blocks.3.0",
    "up_blocks.1.attentions.1": "output_blocks.3.1",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
VAE = {
    "encoder.conv_norm_out": "encoder.norm_out",
    "decoder.conv_norm_out": "decoder.norm_out",
    **{f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1" for side in ("encoder", "decoder")},
    **{
        f"{side}.mid_block.resnets.{i}": f"{side}.mid.block_{i + 1}"
        for side in ("encoder", "decoder")
        for i in (0, 1)
    },
    "encoder.down_blocks.0.downsamplers.0.conv": "encoder.down.0.downsample.conv",
    "decoder.up_blocks.0.upsamplers.0.conv": "decoder.up.1.upsample.conv",
    **{f"encoder.down_blocks.{b}.resnets.0": f"encoder.down.{b}.block.0" for b in (0, 1)},
    **{
        f"decoder.up_blocks.{b}.resnets.{i}": f"decoder.up.{1 - b}.block.{i}"
        for b in (0, 1)
        for i in (0, 1)
    },
}


def rename(key: str, places: dict, inside: dict) -> str:
    place = next((p for p in sorted(places, key=len, reverse=True) if key.startswith(p + ".")), "")
    rest = key[len(place) + 1 :] if place else key
    for theirs, ours in inside.items():
        if place and rest.startswith(theirs + "."):
            rest = ours + rest[len(theirs) :]
            break
    return f"{places[place]}.{rest}" if place else key


def write_checkpoint(folder, path) -> None:
    """The weights of a tiny Stable Diffusion 1, in one file, under the names of its makers."""
    pipeline = load_pipeline(str(folder))
    weights = {}
    for key, value in pipeline.unet.state_dict().items():
        inside = RESNET if ".resnets." in key else {}
        weights[f"model.diffusion_model.{rename(key, UNET, inside)}"] = value
    for key, value in pipeline.vae.state_dict().items():
        if ".attentions." in key and "group_norm" not in key and key.endswith("weight"):
            value = value[..., None, None]  # a convolution of one pixel
        inside = ATTENTION if ".attentions." in key else {"conv_shortcut": "nin_shortcut"}
        weights[f"first_stage_model.{rename(key, VAE, inside)}"] = value
    for key, value in pipeline.text_encoder.state_dict().items():
        key = key if key.startswith("text_model.") else f"text_model.{key}"
        weights[f"cond_stage_model.transformer.{key}"] = value
    save_file({k: v.contiguous() for k, v in weights.items()}, path)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    build_layout("sd15", folder / "base")
    write_checkpoint(folder / "base", folder / "dreamy.safetensors")
    return folder


LOAD = """
import sys, torch
from utils.models.pipelines import load_pipeline
theirs, ours = (load_pipeline(path) for path in sys.argv[1:])
for part in ("unet", "vae", "text_encoder"):
    expected = getattr(ours, part).state_dict()
    found = getattr(theirs, part).state_dict()
    assert found.keys() == expected.keys(), (part, found.keys() ^ expected.keys())
    assert all(torch.equal(found[key], expected[key]) for key in expected), part
print("the same")
"""


def test_it_is_loaded_with_the_configuration_of_the_hub(checkpoint, tmp_path):
    with hub_stand_in() as hub:
        hub.put("model", "stable-diffusion-v1-5/stable-diffusion-v1-5", checkpoint / "base")
        command = [sys.executable, "-c", LOAD, checkpoint / "dreamy.safetensors"]
        run = subprocess.run(
            [*command, checkpoint / "base"],
            env=hub.environment(tmp_path / "home"), capture_output=True, text=True,
        )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "the same"


def refuse(path) -> str:
    with pytest.raises(UsageError) as refused:
        load_pipeline(str(path))
    return str(refused.value)


def test_without_the_hub_it_is_said_how_to_convert_it(checkpoint):
    said = refuse(checkpoint / "dreamy.safetensors")
    assert "configuration" in said and 'from_single_file("' in said and "save_pretrained" in said


def test_a_pickle_is_not_read(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "dreamy.ckpt")
    said = refuse(tmp_path / "dreamy.ckpt")
    assert ".safetensors" in said and "save_pretrained" in said


def test_a_file_that_is_no_whole_model(tmp_path):
    save_file({"lora_unet_x.weight": torch.zeros(1)}, tmp_path / "lora.safetensors")
    assert "no whole checkpoint" in refuse(tmp_path / "lora.safetensors")
    (tmp_path / "empty.safetensors").write_bytes(b"")
    assert "cannot load a pipeline" in refuse(tmp_path / "empty.safetensors")


V = {"v_pred": torch.zeros(0)}


@pytest.mark.parametrize(
    "more, said",
    [
        (V, 'from_config(p.scheduler.config, prediction_type="v_prediction"); p.save'),
        (V | {"ztsnr": torch.zeros(0)}, 'rescale_betas_zero_snr=True, timestep_spacing="trailing"'),
        ({"edm_vpred.sigma_max": torch.zeros(0)}, "it is sampled by EDM"),
        ({"cond_stage_model.model.ln_final.weight": torch.zeros(1)}, "does not say whether"),
    ],
)
def test_what_diffusers_would_not_heed_is_refused(checkpoint, tmp_path, more, said):
    """It gives a file the noise process of a usual base, which may be another than the file's."""
    weights = load_file(checkpoint / "dreamy.safetensors")
    save_file(weights | more, tmp_path / "vivid.safetensors")
    shown = refuse(tmp_path / "vivid.safetensors")
    assert said in shown
    if "v_pred" in more:  # does the line do it?
        given = SimpleNamespace(scheduler=load_pipeline(str(checkpoint / "base")).scheduler)
        (line,) = re.findall(r"p\.scheduler = .*?\);", shown)
        exec(line, {"p": given, "S": DDIMScheduler})
        assert read_process(given.scheduler).predicts == "v_prediction"
        assert given.scheduler.config.rescale_betas_zero_snr == ("ztsnr" in more)


@pytest.mark.parametrize(
    "name, word",
    [
        ("sd_xl_turbo_1.0_fp16.safetensors", "turbo"),
        ("dreamshaperXL_v21TurboDPMSDE.safetensors", "turbo"),
        ("dreamshaperXL_lightningDPMSDE.safetensors", "lightning"),
        ("juggernautXL_v9Rdphoto2Lightning.safetensors", "lightning"),
        ("tianweiy/DMD2", "dmd"),
        ("SDXLTurbo", "turbo"),
        ("ByteDance/Hyper-SD", "hyper"),
        ("mixHyperSDXL.safetensors", "hyper"),
        ("SDXL-LCMv2.safetensors", "lcm"),
        ("4stepTURBOv2.safetensors", "turbo"),
        ("HyperRealism_v3.safetensors", None),
        ("hyperRealistic_v10.safetensors", None),
        (f"/h/hub/models--Lykon--dreamshaper-xl-lightning/snapshots/{'0a' * 20}/", "lightning"),
        ("Lykon/dreamshaper-8", None),
        ("/scans/turbo/base", None),
        ("realisticVisionV51.safetensors", None),
    ],
)
def test_a_name_says_that_a_model_is_distilled(tiny_base, name, word):
    said = None if word is None else f"its name says {word}"
    assert find_distillation(load_pipeline(str(tiny_base)), name) == said


def test_a_folder_that_is_no_pipeline_is_named_for_what_it_is(tmp_path):
    with pytest.raises(UsageError, match="it holds no model_index.json"):
        load_pipeline(str(tmp_path))
    (tmp_path / "privacy.json").write_text("{}")
    with pytest.raises(UsageError, match="a training.s result: give it as --adapter"):
        load_pipeline(str(tmp_path))


def test_a_gated_model_is_not_only_taken_for_a_typing_mistake(monkeypatch):
    """diffusers says the same of both, and what to do in the line after."""
    said = "some/model is not a local folder and is not a valid model identifier listed on 'https:"
    said += "//huggingface.co/models'\nIf this is a private repository, make sure to pass a token"

    def refuse(*_, **__):
        raise OSError(said)

    monkeypatch.setattr("diffusers.DiffusionPipeline.load_config", refuse)
    with pytest.raises(UsageError, match="it is gated or private; ask for access on its page"):
        load_pipeline("some/model")
