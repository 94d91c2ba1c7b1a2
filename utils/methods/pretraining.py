"""The public stage: an autoencoder, then text encoders and a denoiser, trained from scratch.

Nothing here is private.
"""

import copy
import json
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusion3Pipeline, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from utils.arguments.pretraining import PretrainArguments
from utils.arguments.sampling import DrawingArguments
from utils.data.images import scale_to_unit_range, tile_images
from utils.errors import UsageError
from utils.files import CHECKPOINTS, replace_file, write_durably
from utils.ledger.verification import read_base_statement
from utils.models.denoising import denoising_loss
from utils.models.drawing import choose_settings, write_settings
from utils.models.families.sd3 import StableDiffusion3
from utils.models.families.stable_diffusion import StableDiffusion, tokenize_captions
from utils.models.pipelines import load_pipeline
from utils.models.processes import Flow, read_process
from utils.models.public_models import (
    assemble_pipeline,
    assemble_sd3,
    build_autoencoder,
    build_scheduler,
    build_t5,
    build_text_encoder,
    build_text_encoder_pair,
    build_transformer,
    build_unet,
)
from utils.sampling.generation import generate

# What suits small images; benchmarks/RESULTS.md has what 50 steps of DDIM would gain.
SMALL = {"num_inference_steps": 8, "guidance_scale": 2.0}
SMALL_FLOW = {"num_inference_steps": 12, "guidance_scale": 2.0}


class AutoencoderObjective(nn.Module):
    """Pixel loss plus a light KL term, on uint8 images [batch, 3, R, R]."""

    def __init__(self, vae: AutoencoderKL, kl_weight: float):
        super().__init__()
        self.vae, self.kl_weight = vae, kl_weight

    def forward(self, pixels):
        images = scale_to_unit_range(pixels)
        posterior = self.vae.encode(images).latent_dist
        latents = posterior.sample()
        kl = posterior.kl().mean() / latents[0].numel()
        return F.mse_loss(self.vae.decode(latents).sample, images) + self.kl_weight * kl


class UNetObjective(nn.Module):
    """The denoising loss of a U-Net and the text encoder that guides it."""

    def __init__(self, latent_side: int, tokenizer, args: PretrainArguments):
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer, args.text_width, args.text_layers)
        self.unet = build_unet(latent_side, tuple(args.unet_channels), args.text_width)
        self.scheduler, self.tokenizer = build_scheduler(args.prediction_type), tokenizer

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids: [n, T]."""
        return tokenize_captions(self.tokenizer, captions)

    def forward(self, latents, token_ids):
        text = {"encoder_hidden_states": self.text_encoder(token_ids).last_hidden_state}
        noise, process = torch.randn_like(latents), read_process(self.scheduler)
        quantiles = torch.rand(len(latents), device=latents.device)
        predict = partial(StableDiffusion.predict, self.unet)
        return denoising_loss(predict, process, latents, text, noise, quantiles).mean()

    def assemble(self, vae) -> StableDiffusionPipeline:
        parts = (self.text_encoder, self.tokenizer, self.unet, self.scheduler)
        return assemble_pipeline(vae, *parts)


class FlowObjective(nn.Module):
    """The flow-matching loss of a transformer and the text encoders that guide it; noise levels are
    logit-normal (Esser et al. 2024, section 3.1)."""

    def __init__(self, latent_side: int, tokenizer, args: PretrainArguments):
        super().__init__()
        pair = build_text_encoder_pair(tokenizer, args.text_width, args.text_layers)
        t5, self.t5_tokenizer = build_t5(args.text_width, args.max_tokens)
        self.text_encoders = nn.ModuleList([*pair, t5])
        size = (args.transformer_width, args.transformer_layers)
        self.transformer = build_transformer(latent_side, *size, args.text_width)
        self.tokenizer = tokenizer

    def tokenize(self, captions: list[str]) -> torch.Tensor:
        """Token ids, CLIP's and then T5's: [n, 2, T]."""
        both = (self.tokenizer, self.t5_tokenizer)
        return torch.stack([tokenize_captions(tokenizer, captions) for tokenizer in both], 1)

    def forward(self, latents, token_ids):
        *pair, t5 = self.text_encoders
        outputs = [encoder(token_ids[:, 0], output_hidden_states=True) for encoder in pair]
        hidden = torch.cat([output.hidden_states[-2] for output in outputs], -1)
        words = t5(token_ids[:, 1]).last_hidden_state
        text = {
            "encoder_hidden_states": torch.cat([hidden, words], 1),
            "pooled_projections": torch.cat([output.text_embeds for output in outputs], -1),
        }
        noise = torch.randn_like(latents)
        quantiles = torch.randn(len(latents), device=latents.device).sigmoid()
        predict = partial(StableDiffusion3.predict, self.transformer)
        return denoising_loss(predict, Flow(1.0), latents, text, noise, quantiles).mean()

    def assemble(self, vae) -> StableDiffusion3Pipeline:
        tokenizers = [self.tokenizer, self.tokenizer, self.t5_tokenizer]
        return assemble_sd3(vae, list(self.text_encoders), tokenizers, self.transformer)


OBJECTIVES = {"unet": UNetObjective, "sd3": FlowObjective}


def fit(accelerator, name, objective, sample_batch, steps, learning_rate, args) -> nn.Module:
    """Train `objective`, and return its moving average; `sample_batch(size)` gives its inputs.

    The rows of step t depend on the seed, t and the process alone: a resumed run continues exactly.
    """
    state_dir = Path(args.output_dir) / CHECKPOINTS / name
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
        loss = model(*sample_batch(args.train_batch_size))
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
    with replace_file(state_dir / "state.pt") as aside:
        torch.save(state, aside)


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pixels: torch.Tensor, device) -> torch.Tensor:
    """Mean latents of uint8 images, unscaled: [N, 4, r, r]."""
    batches = pixels.split(256)
    encoded = [
        vae.encode(scale_to_unit_range(b.to(device))).latent_dist.mean.cpu() for b in batches
    ]
    return torch.cat(encoded)


def train_autoencoder(accelerator, pixels, args) -> AutoencoderKL:
    torch.manual_seed(args.seed)  # the same start, whether or not a stage was resumed
    objective = AutoencoderObjective(
        build_autoencoder(tuple(args.autoencoder_channels)), args.kl_weight
    )

    def sample_batch(size):
        return (pixels[torch.randint(len(pixels), (size,))].to(accelerator.device),)

    steps, rate = args.autoencoder_steps, args.autoencoder_learning_rate
    return fit(accelerator, "autoencoder", objective, sample_batch, steps, rate, args).vae


def take_autoencoder(base: str) -> AutoencoderKL:
    """That of another pipeline.

    Raises:
        UsageError: see `load_pipeline`; or it is a private result, or has other latents.
    """
    if read_base_statement(base, None)[0] is not None:
        raise UsageError(f"--autoencoder_from {base} is a private result, and this stage is public")
    vae = load_pipeline(base).vae
    if not isinstance(vae, AutoencoderKL) or vae.config.latent_channels != 4:
        raise UsageError(f"--autoencoder_from {base}: an AutoencoderKL of 4 channels is wanted")
    return vae


def train_denoiser(
    accelerator, latents, captions, tokenizer, args
) -> UNetObjective | FlowObjective:
    """`latents` [N, 4, r, r] are scaled; captions are dropped with the given probability."""
    torch.manual_seed(args.seed)
    objective = OBJECTIVES[args.architecture](latents.shape[-1], tokenizer, args)
    distinct = ["", *sorted(set(captions))]
    token_table = objective.tokenize(distinct)
    numbers = {caption: i for i, caption in enumerate(distinct)}
    caption_rows = torch.tensor([numbers[caption] for caption in captions])

    def sample_batch(size):
        rows = torch.randint(len(latents), (size,))
        dropped = torch.rand(size) < args.caption_dropout
        ids = token_table[caption_rows[rows].masked_fill(dropped, 0)]
        return latents[rows].to(accelerator.device), ids.to(accelerator.device)

    return fit(
        accelerator,
        "denoiser",
        objective,
        sample_batch,
        args.denoiser_steps,
        args.learning_rate,
        args,
    )


def save_grids(
    pipeline, pixels, captions, output_dir: Path, seed: int, template: str | None
) -> None:
    """Save reconstructions.png (originals above their reconstructions), samples.png, and how those
    were drawn; `template` made the captions of class names, if there are any."""
    originals = scale_to_unit_range(pixels[:16].to(pipeline.device))
    with torch.no_grad():
        rebuilt = pipeline.vae(originals).sample.clamp(-1, 1)
    both = torch.cat([originals, rebuilt]).add(1).div(2).permute(0, 2, 3, 1).cpu().numpy()
    tile_images(pipeline.numpy_to_pil(both), 16).save(output_dir / "reconstructions.png")
    prompts, scheduler = sorted(set(captions))[:16], pipeline.scheduler
    recorded = {"caption_template": template}
    if isinstance(pipeline, StableDiffusionPipeline):
        recorded |= SMALL
    else:
        recorded |= SMALL_FLOW | {"max_sequence_length": pipeline.tokenizer_3.model_max_length}
    drawing = choose_settings(pipeline, DrawingArguments(), None, recorded)
    drawing.use_scheduler(pipeline)
    images = generate(
        pipeline, [p for p in prompts for _ in range(8)], range(8 * len(prompts)), seed, drawing
    )
    pipeline.scheduler = scheduler
    tile_images(images, 8).save(output_dir / "samples.png")
    write_settings(drawing, output_dir)


def check_settings(output_dir: Path, settings: dict, is_main: bool) -> None:
    """Raises: UsageError if the folder holds checkpoints of a run with other settings."""
    path = output_dir / CHECKPOINTS / "settings.json"
    if path.exists() and json.loads(path.read_text()) != settings:
        raise UsageError(f"{output_dir} holds a run with other settings; name another --output_dir")
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(settings, indent=2))
