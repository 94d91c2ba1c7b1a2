"""Which files of an adapter are found: a run's folder, its weights, or another program's LoRA."""

import re
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.families import build_family
from utils.arguments.methods import LoraArguments
from utils.errors import UsageError
from utils.models.adapters import fetch_adapter, load_adapter
from utils.models.lora import add_lora, save_lora
from utils.models.pipelines import load_pipeline, prepare_pipeline
from utils.sampling.generation import hash_adapter

NAME = "pytorch_lora_weights.safetensors"


def weights(pipeline) -> np.ndarray:
    return pipeline.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.numpy()


@pytest.fixture(scope="module")
def merged(tiny_base, trained):
    """What the adapter makes of one matrix."""
    pipeline = load_pipeline(str(tiny_base))
    before = weights(pipeline).copy()
    load_adapter(pipeline, trained[0])
    assert np.abs(weights(pipeline) - before).max() > 0
    return weights(pipeline)


@pytest.mark.parametrize("given", ["folder", "file", "other name", "other folder"])
def test_it_is_the_same_adapter(given, tiny_base, trained, merged, tmp_path):
    shutil.copy(trained[0] / NAME, tmp_path / "faces_v2.safetensors")
    where = {
        "folder": trained[0],
        "file": trained[0] / NAME,
        "other name": tmp_path / "faces_v2.safetensors",
        "other folder": tmp_path,
    }[given]
    found, pipeline = fetch_adapter(str(where)), load_pipeline(str(tiny_base))
    load_adapter(pipeline, found)
    assert np.array_equal(weights(pipeline), merged)
    is_ours = given in ("folder", "file")
    assert found == (trained[0] if is_ours else tmp_path / "faces_v2.safetensors")
    assert set(hash_adapter(found)) >= {NAME if is_ours else "faces_v2.safetensors"}


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_a_lora_on_a_text_encoder_too_is_loaded_whole(family, tmp_path):
    """As other programs write them; by itself FLUX.1 fuses the transformer's part alone."""
    torch.manual_seed(0)
    trained, layers = build_family(family), {}
    for part, targets in {"transformer": ["attn.to_q"], "text_encoder": ["q_proj"]}.items():
        model = getattr(trained, part)
        model.add_adapter(LoraConfig(r=2, init_lora_weights=False, target_modules=targets))
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model)
    trained.save_lora_weights(tmp_path, **layers)
    bare, plain, ours = (build_family(family) for _ in range(3))
    plain.load_lora_weights(tmp_path)
    load_adapter(ours, tmp_path / NAME)
    words = torch.arange(8)[None]
    bare, plain, ours = (p.text_encoder(words).last_hidden_state for p in (bare, plain, ours))
    torch.testing.assert_close(ours, plain)
    assert not torch.allclose(plain, bare, atol=1e-3)


def test_of_several_files_one_must_be_named(tmp_path, trained):
    for name in ("a.safetensors", "b.safetensors"):
        shutil.copy(trained[0] / NAME, tmp_path / name)
    with pytest.raises(UsageError, match="holds a.safetensors, b.safetensors: name one of them"):
        fetch_adapter(str(tmp_path))
    assert fetch_adapter(str(tmp_path / "b.safetensors")) == tmp_path / "b.safetensors"


def test_a_folder_that_lost_its_weights_is_not_taken_for_another(tmp_path, trained):
    """Beside a statement, a file of another name is not what the statement is about."""
    shutil.copytree(trained[0], tmp_path / "run")
    (tmp_path / "run" / NAME).rename(tmp_path / "run" / "mine.safetensors")
    assert fetch_adapter(str(tmp_path / "run")) == tmp_path / "run"
    assert fetch_adapter(str(tmp_path / "run" / "mine.safetensors")) == tmp_path / "run"


def save_adapted(name: str, folder, **settings) -> None:
    """A LoRA of a family, as training exports it, whose weights are not zero."""
    pipeline = prepare_pipeline(build_family(name), name)
    add_lora(pipeline, LoraArguments(rank=2, **settings))
    for parameter in pipeline.transformer.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter)
    folder.mkdir()
    save_lora(pipeline, folder)


def rename(folder, pattern: str, by: str) -> None:
    """Other names of the weights in the only file of a folder."""
    (path,) = folder.glob("*.safetensors")
    weights = {re.sub(pattern, by, key): value for key, value in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})


MISFITS = {
    "weights of a U-Net": ("sd3", "sd3", lambda f: rename(f, "^transformer", "unet")),
    "another transformer": ("flux", "sd3", lambda f: None),
    "names with a prefix": ("dit", "dit", lambda f: rename(f, "model.model", "model.model.part")),
    "names without one": ("dit", "dit", lambda f: rename(f, "^base_model.model.", "")),
    "with layers of another": ("pixart", "dit", lambda f: None),
    "one of diffusers, where it loads none": ("sd3", "pixart", lambda f: None),
    "of diffusers and of peft": (
        "sd3",
        "sd3",
        lambda f: (f / "adapter_config.json").write_text("{}"),
    ),
}


@pytest.mark.parametrize("misfit", MISFITS)
def test_an_adapter_that_does_not_fit_is_refused(misfit, tmp_path):
    """Rather than loaded in part, or not at all: the images would be those of the base."""
    made_for, used_on, change = MISFITS[misfit]
    save_adapted(made_for, tmp_path / "adapter")
    change(tmp_path / "adapter")
    pipeline = prepare_pipeline(build_family(used_on), used_on)
    with pytest.raises(UsageError, match="cannot load the adapter"):
        load_adapter(pipeline, tmp_path / "adapter")


def test_a_denoiser_is_not_read_from_a_pickle(tiny_base, tmp_path):
    """Which may run anything, and no statement names."""
    load_pipeline(str(tiny_base)).unet.save_pretrained(tmp_path / "unet", safe_serialization=False)
    assert list(tmp_path.glob("unet/*.bin"))
    with pytest.raises(UsageError, match="cannot load the adapter"):
        load_adapter(load_pipeline(str(tiny_base)), tmp_path)


def test_alpha_is_among_the_digests_of_a_peft_adapter(tmp_path):
    save_adapted("dit", tmp_path / "adapter", lora_alpha=5)
    before, path = hash_adapter(tmp_path / "adapter"), tmp_path / "adapter" / "adapter_config.json"
    path.write_text(path.read_text().replace('"lora_alpha": 5', '"lora_alpha": 6'))
    assert hash_adapter(tmp_path / "adapter") != before


@pytest.mark.parametrize("content", [b"", b"no safetensors at all"])
def test_a_broken_file_gets_a_sentence(tiny_base, tmp_path, content):
    (tmp_path / "lora.safetensors").write_bytes(content)
    with pytest.raises(UsageError, match="cannot load the adapter"):
        load_adapter(load_pipeline(str(tiny_base)), fetch_adapter(str(tmp_path)))


def test_a_lora_of_another_program_is_drawn_from_with_a_warning(
    run_script, tiny_base, trained, tmp_path
):
    shutil.copy(trained[0] / NAME, tmp_path / "faces_v2.safetensors")
    draw = ["--pretrained_model_name_or_path", tiny_base, "--prompts", "the digit 3"]
    draw += ["--num_images", 1, "--adapter", tmp_path / "faces_v2.safetensors"]
    run = run_script("sample.py", *draw, "--output_dir", tmp_path / "drawn")
    assert run.returncode == 0, run.stderr
    assert "has no privacy.json" in run.stderr
    with Image.open(tmp_path / "drawn" / "000000.png") as image:
        assert image.size == (16, 16)
