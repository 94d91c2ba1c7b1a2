"""What several benchmarks share: models of a shape, images of noise, and a plan of one step."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from datasets import Dataset, Features, Image, Value
from diffusers import StableDiffusionPipeline
from PIL import Image as PILImage

from utils.arguments.methods import LoraArguments
from utils.models.lora import add_lora
from utils.models.public_models import build_stable_diffusion
from utils.privacy.plan import PrivacyPlan

ROOT = Path(__file__).resolve().parent.parent
CAPTIONS = [f"the digit {i}" for i in range(10)]


def build_pipeline(shape: str, load: Callable):
    """The pipeline of a shape, as `load` loads it from its folder, with a LoRA."""
    torch.manual_seed(0)
    if shape == "tiny":
        pipeline = load(str(ROOT / "examples" / "digits" / "base"))
    else:
        with TemporaryDirectory() as folder:
            build_stable_diffusion("1.5", CAPTIONS).save_pretrained(folder)
            pipeline = load(folder)
    add_lora(pipeline, LoraArguments(rank=4))
    return pipeline


def load_plainly(folder: str) -> StableDiffusionPipeline:
    """A pipeline as the example of diffusers loads it: frozen."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder, dtype=torch.float32, safety_checker=None
    )
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False)
    return pipeline


def make_rows(count: int, side: int) -> Dataset:
    """PNG images of noise, with captions."""
    pixels = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    columns = {
        "image": [PILImage.fromarray(image) for image in pixels],
        "text": [CAPTIONS[i % len(CAPTIONS)] for i in range(count)],
    }
    features = Features({"image": Image(), "text": Value("string")})
    return Dataset.from_dict(columns, features=features)


def plan_one_step(num_units: int, batch_size: float, **changes) -> PrivacyPlan:
    """One step on `batch_size` expected units; `changes` are other fields of `PrivacyPlan`."""
    numbers = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "delta": 0.1 / num_units}
    return PrivacyPlan(
        num_units=num_units, expected_batch_size=batch_size, steps=1, **(numbers | changes)
    )
