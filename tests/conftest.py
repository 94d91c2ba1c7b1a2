"""Tiny real models and tiny image folders, made once per test run."""

import os
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp()  # the user's memory of ledgers is left alone

import contextlib
import gc
import importlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from tests.families import FAMILIES, save_family
from tests.forks import run_in_fork
from utils.errors import Stopped, UsageError
from utils.methods import private_run
from utils.models.public_models import (
    assemble_pipeline,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
)

ROOT = Path(__file__).resolve().parent.parent
CAPTION = ["--label_column", "label", "--caption_template", "the digit {label}"]
BUDGET = ["--target_epsilon", "8", "--target_delta", "1e-3"]


def pytest_collection_modifyitems(items):
    """What takes minutes goes first: no worker is left alone with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("promise") is None)


def pytest_collection_finish():
    gc.freeze()  # what was imported is never garbage, and no test need look through it


def few_fast(cases, fast: int = 1) -> list:
    """`cases` of a test, all but the first of which `make test` leaves to `make test-all`."""
    cases, marks = [c if isinstance(c, tuple) else (c,) for c in cases], pytest.mark.slow
    return [pytest.param(*c, marks=marks if i >= fast else ()) for i, c in enumerate(cases)]


def train_arguments(base, images, output, *more):
    return [
        *("--pretrained_model_name_or_path", base, "--train_data_dir", images, *CAPTION, *BUDGET),
        *("--expected_batch_size", 10, "--max_train_steps", 3, "--train_batch_size", 4),
        *("--noise_multiplicity", 2, "--num_validation_images", 2, "--output_dir", output, *more),
    ]


def build_tiny_pipeline(
    prediction_type: str = "v_prediction", channels: tuple = (8, 16), text_length: int = 8
):
    """A StableDiffusionPipeline of about 100,000 random weights, for 16 x 16 images."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer([f"the digit {d}" for d in range(10)], 600, text_length)
    return assemble_pipeline(
        build_autoencoder((8, 16)),
        build_text_encoder(tokenizer, 16, 1),
        tokenizer,
        build_unet(8, channels, 16),
        build_scheduler(prediction_type),
    )


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory) -> Path:
    """Folder of the tiny pipeline."""
    folder = tmp_path_factory.mktemp("base")
    build_tiny_pipeline().save_pretrained(folder)
    (folder / "sampling.json").write_text('{"num_inference_steps": 4, "guidance_scale": 2.0}')
    return folder


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """40 images of 4 classes, as an image folder with class sub-folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for label in range(4):
        (folder / str(label)).mkdir()
        for index in range(10):
            pixels = rng.integers(0, 60, (16, 16), dtype=np.uint8)
            pixels[:, 4 * label : 4 * label + 3] = 220
            Image.fromarray(pixels).save(folder / str(label) / f"{index}.png")
    return folder


@pytest.fixture(scope="session")
def trained(tiny_base, image_folder, tmp_path_factory):
    """One adapter, trained through `accelerate launch` with alpha unlike the rank."""
    output = tmp_path_factory.mktemp("runs") / "adapter"
    more = ["--rank", 4, "--lora_alpha", 10, "--random_flip", "--gradient_checkpointing"]
    more += ["--mixed_precision", "bf16", "--report_to", "tensorboard"]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    command += ["train_dp_lora.py", *train_arguments(tiny_base, image_folder, output, *more)]
    run = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return output, run.stdout + run.stderr


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    """Of PyTorch, as many."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def no_device_yet():
    """Neither device nor precision is chosen yet; afterwards those that tests share are back."""
    shared = [state._shared_state for state in (PartialState, AcceleratorState)]
    before = [dict(state) for state in shared]
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    for state, values in zip(shared, before, strict=True):
        state.update(values)


@pytest.fixture
def run_script():
    """Run a script of the repository as a user does; returns the completed process."""

    def run(script: str, *arguments, launch: bool = False, cwd: Path = ROOT):
        start = (
            ["-m", "accelerate.commands.launch", "--num_processes", 1, "--cpu"] if launch else []
        )
        return run_in_fork([*start, ROOT / script, *arguments], cwd, quiet_environment())

    return run


def quiet_environment() -> dict:
    """For a script in a process of its own: one thread, and no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def train_here(arguments: list, script: str = "train_dp_lora") -> str:
    """Run a training script in this process; returns what it printed, or its `UsageError`."""

    before, shown = sys.argv, io.StringIO()
    sys.argv = [f"{script}.py", *map(str, arguments)]
    try:
        with contextlib.redirect_stdout(shown):
            importlib.import_module(script).main()
        return shown.getvalue()
    except UsageError as error:
        return f"error: {error}"
    finally:
        sys.argv = before
        gc.collect()  # the folder's lock goes with the frames of the exception


@pytest.fixture
def stopped(tiny_base, image_folder, tmp_path, monkeypatch):
    """A run of 6 steps that a signal stopped after the second."""
    output = tmp_path / "run"
    whole = private_run.private_steps

    def interrupted(*args, **kwargs):
        for step in whole(*args, **kwargs):
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield step

    monkeypatch.setattr(private_run, "private_steps", interrupted)
    arguments = train_arguments(tiny_base, image_folder, output, "--max_train_steps", 6)
    with pytest.raises(Stopped, match="after step 2 of 6"):
        train_here(arguments)
    monkeypatch.setattr(private_run, "private_steps", whole)
    return output, [*arguments, "--resume_from_checkpoint", "latest"]


def read_json(path: Path) -> dict:
    return json.loads(Path(path).read_text())


@pytest.fixture(scope="session", params=FAMILIES)
def family_base(request, tmp_path_factory):
    """The folder of a tiny base, of each family."""
    folder = tmp_path_factory.mktemp(request.param)
    save_family(request.param, folder)
    return folder
