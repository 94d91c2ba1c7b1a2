"""Every family there and back: trained, pushed, pulled, and drawn from by the card's own Python."""

import pytest
import torch

from tests.conftest import few_fast, train_arguments
from tests.families import FAMILIES, SIDE, save_family
from tests.hub.conftest import COMMON, KINDS
from tests.hub.test_models import assert_alike, from_the_card

LORA = ["pytorch_lora_weights.safetensors"]
LODA = [name for name in KINDS["loda"][1] if name != "pipeline.py"]
WHOLE = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
OF_PEFT = ["adapter_config.json", "adapter_model.safetensors"]  # where diffusers loads no LoRA
CASES = [(n, "lora", OF_PEFT if n in ("pixart", "dit") else LORA) for n in FAMILIES]
CASES += [("sana", "loda", LODA), ("sd35", "ldm", WHOLE)]


@pytest.mark.parametrize("name, kind, files", few_fast(CASES, 0))
def test_it_comes_back_from_the_hub(hub, on_hub, image_folder, tmp_path, name, kind, files):
    folder = tmp_path / "base"
    save_family(name, folder, torch.bfloat16)
    hub.put("model", f"user/{name}", folder)
    output, (script, _, own) = tmp_path / "run", KINDS[kind]
    arguments = train_arguments(f"user/{name}", image_folder, output, *own)
    arguments += ["--resolution", SIDE, "--num_inference_steps", 2, "--seed", 3]
    if name == "dit":  # which takes a class
        arguments += ["--caption_template", "{label}", "--validation_prompt", "creature 1", "0"]
    else:
        arguments += ["--validation_prompt", "the digit 0", "the digit 1"]
        arguments += ["--max_sequence_length", 40]
    pushed = on_hub(script, *arguments, "--push_to_hub", "--hub_model_id", f"user/{name}-{kind}")
    assert pushed.returncode == 0, pushed.stderr
    found = hub.repositories["model", f"user/{name}-{kind}"].files()
    assert sorted(found) == sorted(COMMON + files)
    card = found["README.md"].decode()
    assert f"base_model_relation: {'finetune' if kind == 'ldm' else 'adapter'}" in card
    from_the_card(on_hub, card, output)
    assert ("class_labels=[1]" if name == "dit" else "max_sequence_length=40") in card
    if name not in ("sd35", "dit"):  # what follows is the same code for all
        return
    verified = on_hub("privacy_report.py", "verify", f"user/{name}-{kind}")
    assert verified.returncode == 0, verified.stderr
    draw = ["--pretrained_model_name_or_path", f"user/{name}", "--adapter", f"user/{name}-{kind}"]
    prompt = "creature 1" if name == "dit" else "the digit 0"
    draw += ["--prompts", prompt, "--num_images", 1, "--output_dir", tmp_path / "images"]
    drawn = on_hub("sample.py", *draw)
    assert drawn.returncode == 0, drawn.stderr
    assert_alike(tmp_path / "images" / "000000.png", output / "samples" / "0000.png")
