"""The ceiling: an ordinary LoRA, without privacy, trained as the text-to-image example of diffusers
trains one.

    python benchmarks/nonprivate_lora.py --config examples/mnist/dp_lora.yaml \\
        --train_batch_size 64 --max_train_steps 900 --output_dir runs/mnist/nonprivate

Every step loads, resizes and perhaps flips its images, encodes them and their captions, adds
noise, and takes an AdamW step on the mean loss of a shuffled batch. What it leaves is loaded like
any other adapter, and protects nobody: it has no privacy.json. What a recipe says about privacy is
ignored.
"""

import sys
import time
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from datasets import Dataset
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from utils.arguments.methods import LoraArguments
from utils.arguments.parsing import parse
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.images import (
    ImageRows,
    crop_to_pixels,
    keep_readable,
    scale_to_unit_range,
)
from utils.data.rows import load_rows, read_captions
from utils.errors import UsageError, run_script
from utils.models.families.stable_diffusion import tokenize_captions
from utils.models.lora import add_lora, save_lora
from utils.models.pipelines import choose_resolution, load_pipeline

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Images(torch.utils.data.Dataset):
    """Row i as pixels [3, R, R] in [-1, 1] and token ids [T], read and prepared when asked for."""

    rows: Dataset
    image_column: str
    captions: list[str]
    tokenizer: object
    resolution: int
    flip: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = crop_to_pixels(self.rows[index][self.image_column], self.resolution)
        if self.flip and torch.rand(()) < 0.5:
            pixels = pixels.flip(-1)
        return scale_to_unit_range(pixels), tokenize_captions(
            self.tokenizer, [self.captions[index]]
        )[0]


def compute_loss(
    pipeline: DiffusionPipeline, pixels: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """The denoising loss of one batch: encode, add noise, predict."""
    vae_scale = pipeline.vae.config.scaling_factor
    with torch.no_grad():
        latents = pipeline.vae.encode(pixels).latent_dist.sample() * vae_scale
        words = pipeline.text_encoder(ids, return_dict=False)[0]
    noise, scheduler = torch.randn_like(latents), pipeline.scheduler
    timesteps = torch.randint(scheduler.config.num_train_timesteps, (len(latents),))
    timesteps = timesteps.to(latents.device)
    noisy = scheduler.add_noise(latents, noise, timesteps)
    wanted = noise
    if scheduler.config.prediction_type == "v_prediction":
        wanted = scheduler.get_velocity(latents, noise, timesteps)
    predicted = pipeline.unet(noisy, timesteps, words, return_dict=False)[0]
    return F.mse_loss(predicted.float(), wanted.float())


def main():
    kinds = (ModelArguments, DataArguments, PrivacyArguments, TrainingArguments, LoraArguments)
    model, data, _, training, lora = parse(*kinds, description=__doc__)
    folder, start = Path(training.output_dir), time.perf_counter()
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"--output_dir {folder} already holds files")
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    torch.manual_seed(training.seed or 0)
    pipeline = load_pipeline(*model.source)
    pipeline.to(accelerator.device)
    add_lora(pipeline, lora)
    trained = [p for p in pipeline.unet.parameters() if p.requires_grad]
    training = replace(
        training,
        learning_rate=training.learning_rate or 1e-3,
        max_train_steps=training.max_train_steps or 900,
    )
    optimizer = torch.optim.AdamW(trained, training.learning_rate)
    schedule = get_scheduler(
        training.lr_scheduler,
        optimizer,
        num_warmup_steps=training.lr_warmup_steps,
        num_training_steps=training.max_train_steps,
    )
    resolution = choose_resolution(pipeline, data.resolution)
    with TemporaryDirectory() as cache:
        images = ImageRows(load_rows(data, cache), data.image_column, data.window)
        rows = keep_readable(images)[0].rows
        captions = read_captions(rows, data)
        how = (pipeline.tokenizer, resolution, training.random_flip)
        images = Images(rows, data.image_column, list(captions), *how)
        loader = DataLoader(images, training.train_batch_size, shuffle=True, drop_last=True)
        if len(loader) == 0:
            raise UsageError(f"--train_batch_size is more than the {len(images)} images there are")
        steps = islice(chain.from_iterable(repeat(loader)), training.max_train_steps)
        for pixels, ids in tqdm(steps, "steps", training.max_train_steps):
            with accelerator.autocast():
                loss = compute_loss(
                    pipeline, pixels.to(accelerator.device), ids.to(accelerator.device)
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    folder.mkdir(parents=True, exist_ok=True)
    save_lora(pipeline, folder)
    seconds = time.perf_counter() - start
    drawn = training.max_train_steps * training.train_batch_size
    print(f"{folder}: {drawn} images in {seconds:.0f} seconds; NOT PRIVATE")


if __name__ == "__main__":
    run_script(main)
