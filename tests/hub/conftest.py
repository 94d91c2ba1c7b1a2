"""A Hub that stands on this machine, and runs that push to it."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT, train_arguments
from tests.forks import run_in_fork
from tests.hub_stand_in import TOKEN, hub_stand_in

SAMPLES = ["samples/0000.png", "samples/0001.png", "samples/grid.png"]
COMMON = ["README.md", "privacy.json", "sampling.json", *SAMPLES]
LORA_FILE = "pytorch_lora_weights.safetensors"
LODA_FILES = ["adapter_config.json", "adapter_model.safetensors", "loda.py", "pipeline.py"]
KINDS = {
    "lora": ("train_dp_lora.py", [LORA_FILE], ["--lora_alpha", 10]),
    "loda": ("train_dp_loda.py", LODA_FILES, ["--rank", 2]),
    "ldm": (
        "train_dp_ldm.py",
        ["unet/config.json", "unet/diffusion_pytorch_model.safetensors"],
        [],
    ),
    "text": (
        "train_dp_ldm.py",
        ["unet/config.json", "unet/diffusion_pytorch_model.safetensors", LORA_FILE],
        ["--train_text_encoder"],
    ),
}


@pytest.fixture(scope="session")
def hub(tiny_base):
    """The stand-in, with the base model in it."""
    with hub_stand_in() as made:
        made.put("model", "user/base", tiny_base)
        yield made


@pytest.fixture
def on_hub(hub, tmp_path_factory):
    """Run a script of the repository, or any Python, against the stand-in; what was downloaded
    stays for the tests after it."""
    home = tmp_path_factory.getbasetemp() / f"home_of_{hub.url.rsplit(':')[-1]}"

    def run(*command, token: str | None = TOKEN, cwd=ROOT, **more):
        environment = hub.environment(home, token) | more
        if str(command[0]).endswith(".py"):
            return run_in_fork(command, cwd, environment)
        return subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd, env=environment, capture_output=True, text=True,
        )  # fmt: skip

    return run


@pytest.fixture(scope="module")
def smiths(tmp_path_factory):
    """Private images whose names, captions and pixels all say whose they are."""
    folder = tmp_path_factory.mktemp("smith_family")
    rng = np.random.default_rng(7)
    lines = []
    for index in range(40):
        name = f"scan_of_smith_{index}.png"
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"smith, finding {index}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def push(on_hub, kind: str, smiths, output, *more):
    script, _, own = KINDS[kind]
    arguments = train_arguments("user/base", smiths, output, *own, *more)
    arguments += ["--caption_column", "text", "--resolution", 16, "--random_flip"]
    arguments += ["--validation_prompt", "the digit 0", "the digit 1", "--seed", 3]
    return on_hub(script, *arguments, "--push_to_hub", "--hub_model_id", f"user/{kind}")


def find_secrets(smiths, output) -> list[bytes]:
    """What must be in no file that is uploaded: names, captions, pixels, latents, ledger, paths."""
    private = output / "private"
    latents = next((private / "latents").glob("*/latents.f32")).read_bytes()
    return [
        *(b"smith", str(smiths).encode(), str(output.parent).encode(), TOKEN.encode()),
        b"home_of_",  # where the Hub's cache lies
        *(path.read_bytes()[50:100] for path in smiths.glob("*.png")),
        *(latents[start : start + 32] for start in range(0, len(latents), 4096)),
        *(line[:60] for line in (private / "ledger.jsonl").read_bytes().splitlines()),
        b"exp_avg",  # of AdamW
    ]


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of a finished run, to publish."""
    import shutil

    output = tmp_path / "finished"
    shutil.copytree(trained[0], output, symlinks=True)
    return output
