"""Every family there and back: trained, pushed, pulled, and drawn from by the card's own Python."""

import pytest

from tests.conftest import train_arguments
from tests.families import FAMILIES, SIDE, build_family
from tests.hub.conftest import COMMON, KINDS
from tests.hub.test_models import from_the_card

LORA = ["pytorch_lora_weights.safetensors"]
LODA = [name for name in KINDS["loda"][1] if name != "pipeline.py"]
WHOLE = ["transformer/config.json", "transformer/diffusion_pytorch_model.safetensors"]
CASES = [(name, "lora", LORA) for name in FAMILIES]
CASES += [("sana", "loda", LODA), ("sd35", "ldm", WHOLE)]


@pytest.mark.parametrize("name, kind, files", CASES)
def test_it_comes_back_from_the_hub(hub, on_hub, image_folder, tmp_path, name, kind, files):
    folder = tmp_path / "base"
    build_family(name).save_pretrained(folder)
    hub.put("model", f"user/{name}", folder)
    output, (script, _, own) = tmp_path / "run", KINDS[kind]
    arguments = train_arguments(f"user/{name}", image_folder, output, *own)
    arguments += ["--resolution", SIDE, "--num_inference_steps", 2, "--max_sequence_length", 40]
    arguments += ["--validation_prompt", "the digit 0", "the digit 1", "--seed", 3]
    pushed = on_hub(script, *arguments, "--push_to_hub", "--hub_model_id", f"user/{name}-{kind}")
    assert pushed.returncode == 0, pushed.stderr
    found = hub.repositories["model", f"user/{name}-{kind}"].files()
    assert sorted(found) == sorted(COMMON + files)
    card = found["README.md"].decode()
    from_the_card(on_hub, card, output)
    assert "max_sequence_length=40" in card
    if name != "sd35":  # what follows is the same code for all
        return
    verified = on_hub("privacy_report.py", "verify", f"user/{name}-{kind}")
    assert verified.returncode == 0, verified.stderr
    draw = ["--pretrained_model_name_or_path", f"user/{name}", "--adapter", f"user/{name}-{kind}"]
    draw += ["--prompts", "the digit 0", "--num_images", 1, "--output_dir", tmp_path / "images"]
    drawn = on_hub("sample.py", *draw)
    assert drawn.returncode == 0, drawn.stderr
    image, sample = tmp_path / "images" / "000000.png", output / "samples" / "0000.png"
    assert image.read_bytes() == sample.read_bytes()
