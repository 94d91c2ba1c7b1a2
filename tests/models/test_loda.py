"""LoDA: the tuner, three ways to load it, and that with identity activation it is a LoRA."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from tests.conftest import build_tiny_pipeline
from tests.worlds import unet_losses
from utils.arguments.methods import LoDAArguments
from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.models.adapters import load_adapter
from utils.models.loda import loda
from utils.models.loda.adapter import add_loda, save_loda
from utils.models.loda.loda import LoDAConfig, LoDALayer, load_loda
from utils.models.pipelines import load_pipeline

TARGETS = ["to_q", "to_k", "to_out.0", "ff.net.2", "conv1", "conv_shortcut"]


def adapted(base, **config):
    """The tiny pipeline with a LoDA whose weights are not zero."""
    pipeline = load_pipeline(str(base))
    add_loda(pipeline, LoDAArguments(target_modules=TARGETS, **config))
    torch.manual_seed(0)
    for parameter in pipeline.unet.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(std=0.3)
    return pipeline


def generate_images(pipeline) -> np.ndarray:
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    prompts = ["the digit 3"] * 2
    return pipeline(prompts, latents=latents, num_inference_steps=3, output_type="np").images


@pytest.fixture(scope="module")
def saved(tiny_base, tmp_path_factory):
    """A published folder, and the images that its model drew before."""
    folder = tmp_path_factory.mktemp("loda") / "adapter"
    folder.mkdir()
    pipeline = adapted(tiny_base)
    save_loda(pipeline, folder)
    return folder, generate_images(pipeline)


def test_it_starts_from_the_public_model_exactly(tiny_base):
    pipeline = load_pipeline(str(tiny_base))
    before = generate_images(pipeline)
    add_loda(pipeline, LoDAArguments())
    assert np.array_equal(generate_images(pipeline), before)
    assert all("loda_" in name for name in PerUnitGradients(pipeline.unet).names)


def test_this_repository_loads_it_without_a_flag(tiny_base, saved):
    pipeline = load_pipeline(str(tiny_base))
    plain = generate_images(pipeline)
    load_adapter(pipeline, saved[0])
    assert np.abs(generate_images(pipeline) - saved[1]).max() <= 1e-4
    assert np.abs(plain - saved[1]).max() > 1e-2


PEFT_ALONE = """
import sys
import numpy as np, torch
sys.path.insert(0, sys.argv[2])  # the published folder, for its loda.py
import loda
from diffusers import StableDiffusionPipeline
from peft import PeftModel
base, adapter, output = sys.argv[1:]
pipeline = StableDiffusionPipeline.from_pretrained(base)
pipeline.unet = PeftModel.from_pretrained(pipeline.unet, adapter).base_model.model
"""
CUSTOM_PIPELINE = """
import sys
import numpy as np, torch
from diffusers import DiffusionPipeline
base, adapter, output = sys.argv[1:]
pipeline = DiffusionPipeline.from_pretrained(base, custom_pipeline=adapter, trust_remote_code=True)
pipeline.load_loda(adapter)
"""
DRAW = """
latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))
draw = dict(latents=latents, num_inference_steps=3, output_type="np")
images = pipeline(["the digit 3"] * 2, **draw).images
assert not any(name.split(".")[0] in ("utils", "train_dp_loda") for name in sys.modules)
np.save(output, images)
"""


@pytest.mark.parametrize("code", [PEFT_ALONE, CUSTOM_PIPELINE], ids=["peft", "custom_pipeline"])
def test_strangers_generate_the_same_images(tiny_base, saved, tmp_path, code):
    """In a process that cannot import this project."""
    command = [sys.executable, "-c", code + DRAW, tiny_base, saved[0], tmp_path / "images.npy"]
    run = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert np.abs(np.load(tmp_path / "images.npy") - saved[1]).max() <= 1e-4


def test_the_published_files_import_nothing_of_this_project():
    for name in ("loda.py", "pipeline.py"):
        text = Path(loda.__file__).with_name(name).read_text()
        assert "utils." not in text.replace("peft.utils", "")
    assert "from peft.tuners.lora" not in Path(loda.__file__).read_text()


def test_peft_round_trip_with_several_adapters(tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Flatten(), nn.Linear(6 * 4 * 4, 5))
    x = torch.randn(2, 3, 8, 8)
    plain = base(x)
    model = get_peft_model(base, LoDAConfig(r=2, target_modules=["0", "2"]), "first")
    model.add_adapter("second", LoDAConfig(r=3, target_modules=["2"], activation="gelu"))
    torch.testing.assert_close(model(x), plain)
    for name, parameter in model.named_parameters():
        if "loda_B" in name:
            nn.init.normal_(parameter)
    outputs = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        outputs[name] = model(x)
        trainable = [n for n, p in model.named_parameters() if p.requires_grad]
        assert trainable and all("loda_" in n and f".{name}." in n for n in trainable)
    assert not torch.allclose(outputs["first"], outputs["second"])
    with model.disable_adapter():
        torch.testing.assert_close(model(x), plain)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.Flatten(), nn.Linear(6 * 4 * 4, 5))
    again = PeftModel.from_pretrained(again, tmp_path / "second", "second")
    torch.testing.assert_close(again(x), outputs["second"])
    again.load_adapter(tmp_path / "first", "first")
    again.set_adapter("first")
    torch.testing.assert_close(again(x), outputs["first"])
    for layer in again.modules():
        if isinstance(layer, LoDALayer):
            layer.set_scale("first", 0.0)
    torch.testing.assert_close(again(x), plain)
    for merge in (again.merge_and_unload, again.merge_adapter):
        with pytest.raises(ValueError, match="cannot be merged"):
            merge()


def test_diffusers_scales_disables_and_deletes_it():
    unet = build_tiny_pipeline().unet.requires_grad_(False)
    inputs = torch.randn(1, 4, 8, 8), 3, torch.randn(1, 8, 16)
    plain = unet(*inputs).sample
    unet.add_adapter(LoDAConfig(target_modules=["to_q", "conv1"]), "one")
    for name, parameter in unet.named_parameters():
        if "loda_B" in name:
            nn.init.normal_(parameter, std=0.3)
    adapted = unet(*inputs).sample
    assert (adapted - plain).abs().max() > 0.1
    unet.set_adapters("one", 0.0)
    torch.testing.assert_close(unet(*inputs).sample, plain)
    unet.set_adapters("one", 1.0)
    torch.testing.assert_close(unet(*inputs).sample, adapted)
    unet.disable_adapters()
    torch.testing.assert_close(unet(*inputs).sample, plain)
    unet.enable_adapters()
    torch.testing.assert_close(unet(*inputs).sample, adapted)
    unet.delete_adapters("one")
    torch.testing.assert_close(unet(*inputs).sample, plain)


def paired_unets():
    """The same U-Net with a LoRA of scale 1, and with a LoDA whose activation is the identity."""
    lora = build_tiny_pipeline().unet.requires_grad_(False)
    lora.add_adapter(LoraConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=TARGETS))
    loda = build_tiny_pipeline().unet.requires_grad_(False)
    loda.add_adapter(LoDAConfig(r=4, activation="identity", target_modules=TARGETS))
    named = dict(lora.named_parameters())
    for name, parameter in loda.named_parameters():
        if "loda_" in name:
            parameter.data.copy_(named[name.replace("loda_", "lora_")])
    return lora, loda


def test_with_identity_it_equals_a_lora_in_outputs_and_per_unit_gradients():
    generator = torch.Generator().manual_seed(0)
    latents, noise = torch.randn(2, 6, 4, 8, 8, generator=generator)
    words = torch.randn(6, 8, 16, generator=generator)
    steps = torch.randint(1000, (6,), generator=generator)
    scheduler, found = build_tiny_pipeline().scheduler, []
    for unet in paired_unets():
        engine = PerUnitGradients(unet, num_draws=2)
        with engine.recording(3) as record:
            losses = unet_losses(unet, scheduler, latents, words, noise, steps)
            losses.view(3, 2).mean(1).sum().backward()
        named = [name.replace("lora_", "loda_") for name in engine.names]
        found.append((losses.detach(), record.rows(), named))
    assert found[0][2] == found[1][2]
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)


def test_wrong_loads_fail_with_a_sentence(tiny_base, saved, tmp_path):
    pipeline = load_pipeline(str(tiny_base))
    with pytest.raises(Exception, match="Invalid LoRA checkpoint"):
        pipeline.load_lora_weights(str(saved[0]), local_files_only=True)

    other_rank = shutil.copytree(saved[0], tmp_path / "rank")
    config = json.loads((other_rank / "adapter_config.json").read_text())
    (other_rank / "adapter_config.json").write_text(json.dumps(config | {"r": 7}))
    with pytest.raises(UsageError, match=r"does not fit this model \(r = 7\)"):
        load_adapter(load_pipeline(str(tiny_base)), other_rank)

    other_model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="does not fit this model"):
        load_loda(other_model, str(saved[0]))

    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UsageError, match="no LoRA, no LoDA and no unet"):
        load_adapter(pipeline, empty)

    missing_import = (
        "from peft import PeftConfig; PeftConfig.from_pretrained(__import__('sys').argv[1])"
    )
    run = subprocess.run(
        [sys.executable, "-c", missing_import, str(saved[0])],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode != 0 and "import loda, the file beside this adapter" in run.stderr

    with pytest.raises(ValueError, match="at least 1"):
        LoDAConfig(r=0)
    with pytest.raises(ValueError, match="leaky_relu, gelu, identity"):
        LoDAConfig(activation="tanh")
