"""Train a small latent diffusion model on PUBLIC captioned images: the public stage.

    accelerate launch pretrain_ldm.py --dataset_name runs/digits/public --label_column label \\
        --caption_template "the digit {label}" --resolution 32 --output_dir runs/digits/base

    # a minute on a laptop, to see that it runs
    accelerate launch pretrain_ldm.py --dataset_name runs/digits/public --label_column label \\
        --caption_template "the digit {label}" --resolution 32 --output_dir /tmp/base \\
        --autoencoder_steps 50 --denoiser_steps 50

Trains an autoencoder, then a text encoder and a U-Net together, and saves a
StableDiffusionPipeline folder that plain `DiffusionPipeline.from_pretrained` loads, with a grid of
reconstructions and a grid of samples. It gives NO privacy: only for images that may leak.
Run the same command again to go on after an interruption.
"""

import copy
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from utils.arguments import DataArguments, option, parse
from utils.data import captions_of, keep_readable, load_rows, pixel_batches, to_unit_range
from utils.errors import UsageError, run_script
from utils.generation import generate, image_grid
from utils.pipelines import denoising_loss, encode_captions
from utils.public_models import (
    assemble_pipeline,
    build_autoencoder,
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_unet,
    save_in_fp16,
)


@dataclass
class PretrainArguments:
    """Sizes and schedule of the public stage."""

    output_dir: str = option("where the pipeline folder goes")
    autoencoder_channels: list[int] = option(
        "autoencoder widths; n of them divide the resolution by 2^(n-1)", [16, 32, 64]
    )
    unet_channels: list[int] = option("U-Net widths, one a resolution", [64, 128])
    text_width: int = option("width of the text encoder", 128)
    text_layers: int = option("layers of the text encoder", 2)
    vocab_size: int = option("at most so many tokens are learned from the captions", 2000)
    max_tokens: int = option("longest caption, in tokens", 16)
    prediction_type: str = option("epsilon or v_prediction", "v_prediction")
    autoencoder_steps: int = option("optimizer steps of the autoencoder", 1000)
    denoiser_steps: int = option("optimizer steps of the U-Net and the text encoder", 2600)
    autoencoder_learning_rate: float = option("peak learning rate of the autoencoder", 1e-3)
    learning_rate: float = option("peak learning rate of the U-Net and the text encoder", 1e-3)
    kl_weight: float = option("weight of the autoencoder's KL term, per latent number", 1e-3)
    train_batch_size: int = option("images per process and step", 128)
    caption_dropout: float = option("share of captions replaced by '' (for guidance)", 0.1)
    ema_decay: float = option("decay of the moving average of the weights", 0.999)
    checkpointing_steps: int = option("save the state every so many steps", 1000)
    mixed_precision: str = option("no or bf16", "no")
    seed: int = option("seed of everything here (nothing here is private)", 0)


class AutoencoderObjective(nn.Module):
    """Pixel loss plus a light KL term, on uint8 images [batch, 3, R, R]."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, pixels):
        images = to_unit_range(pixels)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        kl = posterior.kl().mean() / latents[0].numel()
        return F.mse_loss(self.vae.decode(latents).sample, images) + self.kl_weight * kl


class DenoiserObjective(nn.Module):
    """The denoising loss of a U-Net and the text encoder that guides it."""

    def __init__(self, unet, text_encoder, scheduler):
        super().__init__()
        self.unet, self.text_encoder, self.scheduler = unet, text_encoder, scheduler

    def forward(self, latents, token_ids):
        embeddings = self.text_encoder(token_ids).last_hidden_state
        noise = torch.randn_like(latents)
        steps = self.scheduler.config.num_train_timesteps
        timesteps = torch.randint(steps, (len(latents),), device=latents.device)
        losses = denoising_loss(self.unet, self.scheduler, latents, embeddings, noise, timesteps)
        return losses.mean()


def fit(accelerator, name, objective, batch_of, steps, learning_rate, args) -> nn.Module:
    """Train `objective` and return its moving average; `batch_of(indices)` makes its inputs.

    The rows of step t depend on the seed, t and the process alone: a resumed run goes on exactly.
    """
    state_dir = Path(args.output_dir) / "checkpoints" / name
    optimizer = torch.optim.AdamW(objective.parameters(), learning_rate, weight_decay=1e-4)
    scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=min(500, steps // 10), num_training_steps=steps
    )
    average = copy.deepcopy(objective).to(accelerator.device)
    ema = EMAModel(average.parameters(), args.ema_decay, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    model, optimizer = accelerator.prepare(objective, optimizer)
    first = 0
    if (state_dir / "state.pt").exists():
        saved = torch.load(state_dir / "state.pt", map_location="cpu", weights_only=True)
        accelerator.unwrap_model(model).load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        scheduler.load_state_dict(saved["scheduler"])
        ema.load_state_dict(saved["ema"])
        first = saved["step"]
    bar = tqdm(range(steps), name, initial=first, disable=not accelerator.is_main_process)
    for step in range(first, steps):
        torch.manual_seed(
            args.seed + 1009 * (step * accelerator.num_processes + accelerator.process_index)
        )
        loss = model(*batch_of(args.train_batch_size))
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        ema.step(accelerator.unwrap_model(model).parameters())
        bar.update()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
        done = step + 1 == steps
        if accelerator.is_main_process and (done or (step + 1) % args.checkpointing_steps == 0):
            state = {
                "model": accelerator.unwrap_model(model).state_dict(),
                "optimizer": optimizer.state_dict(),
                "scheduler": scheduler.state_dict(),
                "ema": ema.state_dict(),
                "step": step + 1,
            }
            save_state(state, state_dir)
    ema.copy_to(average.parameters())
    return average.eval().requires_grad_(False)


def save_state(state: dict, state_dir: Path) -> None:
    state_dir.mkdir(parents=True, exist_ok=True)
    torch.save(state, state_dir / "state.tmp")
    (state_dir / "state.tmp").replace(state_dir / "state.pt")


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: torch.Tensor, device) -> torch.Tensor:
    """Mean latents of uint8 images, unscaled: [N, 4, r, r]."""
    batches = pixels.split(256)
    encoded = [vae.encode(to_unit_range(b.to(device))).latent_dist.mean.cpu() for b in batches]
    return torch.cat(encoded)


def train_autoencoder(accelerator, pixels, args) -> AutoencoderKL:
    torch.manual_seed(args.seed)  # the same start, whether or not a stage was resumed
    objective = AutoencoderObjective(
        build_autoencoder(tuple(args.autoencoder_channels)), args.kl_weight
    )

    def batch_of(size):
        return (pixels[torch.randint(len(pixels), (size,))].to(accelerator.device),)

    steps, rate = args.autoencoder_steps, args.autoencoder_learning_rate
    return fit(accelerator, "autoencoder", objective, batch_of, steps, rate, args).vae


def train_denoiser(accelerator, latents, captions, tokenizer, args) -> DenoiserObjective:
    """`latents` [N, 4, r, r] are scaled; captions are dropped with the given probability."""
    torch.manual_seed(args.seed)
    text_encoder = build_text_encoder(tokenizer, args.text_width, args.text_layers)
    unet = build_unet(latents.shape[-1], tuple(args.unet_channels), args.text_width)
    objective = DenoiserObjective(unet, text_encoder, build_scheduler(args.prediction_type))
    distinct = ["", *sorted(set(captions))]
    token_table = encode_captions(tokenizer, distinct)
    row_of = {caption: i for i, caption in enumerate(distinct)}
    caption_rows = torch.tensor([row_of[caption] for caption in captions])

    def batch_of(size):
        rows = torch.randint(len(latents), (size,))
        dropped = torch.rand(size) < args.caption_dropout
        ids = token_table[caption_rows[rows].masked_fill(dropped, 0)]
        return latents[rows].to(accelerator.device), ids.to(accelerator.device)

    return fit(
        accelerator, "denoiser", objective, batch_of, args.denoiser_steps, args.learning_rate, args
    )


def draw_grids(pipeline, pixels, captions, output_dir: Path, seed: int) -> None:
    """Save reconstructions.png (originals above their reconstructions) and samples.png."""
    originals = to_unit_range(pixels[:16].to(pipeline.device))
    with torch.no_grad():
        rebuilt = pipeline.vae(originals).sample.clamp(-1, 1)
    both = torch.cat([originals, rebuilt]).add(1).div(2).permute(0, 2, 3, 1).cpu().numpy()
    image_grid(pipeline.numpy_to_pil(both), 16).save(output_dir / "reconstructions.png")
    prompts = sorted(set(captions))[:16]
    images = generate(
        pipeline, [p for p in prompts for _ in range(8)], range(8 * len(prompts)), seed
    )
    image_grid(images, 8).save(output_dir / "samples.png")


def main():
    data, args = parse(DataArguments, PretrainArguments, description=__doc__)
    accelerator = Accelerator(mixed_precision=args.mixed_precision)
    set_seed(args.seed)
    output_dir = Path(args.output_dir)
    if (output_dir / "model_index.json").exists():
        raise UsageError(
            f"{output_dir} already holds a finished pipeline; name another --output_dir"
        )
    if data.resolution is None:
        raise UsageError("give --resolution, the side of the images in pixels")
    factor = 2 ** (len(args.autoencoder_channels) - 1)
    if data.resolution % (factor * 2 ** (len(args.unet_channels) - 1)):
        raise UsageError(f"--resolution {data.resolution} is not divisible by the models' factors")

    rows = load_rows(data.dataset_name, data.dataset_config_name, data.train_data_dir, data.split)
    rows, dropped = keep_readable(rows, data.image_column, data.strict_images)
    captions = captions_of(rows, data.caption_column, data.label_column, data.caption_template)
    accelerator.print(
        f"{len(rows)} public images, {len(set(captions))} captions, {dropped} unreadable"
    )
    pixels = torch.cat(list(pixel_batches(rows, data.image_column, data.resolution, 256)))
    settings = {"resolution": data.resolution, **vars(args)}
    check_settings(output_dir, settings, accelerator.is_main_process)

    vae = train_autoencoder(accelerator, pixels, args)
    latents = encode_all(vae, pixels, accelerator.device)
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    tokenizer = build_tokenizer(captions, args.vocab_size, args.max_tokens)
    latents = latents * vae.config.scaling_factor
    trained = train_denoiser(accelerator, latents, captions, tokenizer, args)

    if accelerator.is_main_process:
        pipeline = assemble_pipeline(
            vae, trained.text_encoder, tokenizer, trained.unet, trained.scheduler
        )
        pipeline.set_progress_bar_config(disable=True)
        draw_grids(pipeline, pixels, captions, output_dir, args.seed)
        save_in_fp16(pipeline, output_dir)
        print(f"saved the pipeline, reconstructions.png and samples.png in {output_dir}")
    accelerator.end_training()


def check_settings(output_dir: Path, settings: dict, is_main: bool) -> None:
    """Raises: UsageError if the folder holds checkpoints of a run with other settings."""
    path = output_dir / "checkpoints" / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UsageError(f"{output_dir} holds a run with other settings; name another --output_dir")
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(settings, indent=2))


if __name__ == "__main__":
    run_script(main)
