"""The public stage: an autoencoder, then text encoders and a denoiser.

Nothing here is private.
"""

import copy
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from utils.arguments.pretraining import PretrainArguments
from utils.arguments.sampling import DrawingArguments
from utils.arguments.training import DataArguments
from utils.data.images import ImageRows, keep_readable, scale_to_unit_range, tile_images
from utils.data.rows import load_rows
from utils.errors import UsageError
from utils.files import CHECKPOINTS, replace_file, write_durably
from utils.gradients.short_attention import use_fast_attention
from utils.ledger.checkpoints import list_differences
from utils.ledger.public_sets import refuse_as_public
from utils.memory import images_at_once
from utils.methods.public_objectives import OBJECTIVES, AutoencoderObjective, Objective
from utils.models.drawing import choose_settings, write_settings
from utils.models.families.stable_diffusion import tokenize_captions
from utils.models.public_models import build_autoencoder, build_tokenizer
from utils.sampling.batches import generate_all

# What suits small images; benchmarks/RESULTS.md has what 50 steps of DDIM would gain.
SMALL = {"num_inference_steps": 8, "guidance_scale": 2.0}
SMALL_FLOW = {"num_inference_steps": 12, "guidance_scale": 2.0}


def load_public_images(data: DataArguments) -> tuple[ImageRows, Mapping[str, int]]:
    """The images that can be read, and how many were left out, by reason (`keep_readable`).

    Raises:
        UsageError: see `load_rows`, `keep_readable`; or the set comes from private images.
    """
    refuse_as_public("the set", data.dataset_name or data.train_data_dir)
    images = ImageRows(load_rows(data), data.image_column, data.window)
    return keep_readable(images, data.strict_images)


def fit(accelerator, name, objective, sample_batch, steps, learning_rate, args) -> nn.Module:
    """Train `objective`, and return its moving average; `sample_batch(size)` gives its inputs.

    The rows of step t depend on the seed, t and the process alone: a resumed run continues exactly.
    """
    use_fast_attention()
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
    """Mean latents of uint8 images, unscaled: [N, c, r, r]."""
    batches = pixels.split(images_at_once(pixels.shape[-1]))
    encoded = [
        vae.encode(scale_to_unit_range(b.to(device))).latent_dist.mean.cpu() for b in batches
    ]
    return torch.cat(encoded)


def train_autoencoder(accelerator, pixels, args) -> AutoencoderKL:
    torch.manual_seed(args.seed)  # the same start, whether or not a stage was resumed
    vae = build_autoencoder(tuple(args.autoencoder_channels), latent_channels=args.latent_channels)
    objective = AutoencoderObjective(vae, args.kl_weight)

    def sample_batch(size):
        return (pixels[torch.randint(len(pixels), (size,))].to(accelerator.device),)

    steps, rate = args.autoencoder_steps, args.autoencoder_learning_rate
    return fit(accelerator, "autoencoder", objective, sample_batch, steps, rate, args).vae


def scale_latents(
    latents: torch.Tensor, vae: AutoencoderKL, args: PretrainArguments
) -> torch.Tensor:
    """As the denoiser sees them; their scale is noted in the autoencoder's configuration. With
    --start_from it is that of the base, which its denoiser knows."""
    is_flow = args.architecture == "sd3"
    if args.start_from is None:
        vae.register_to_config(scaling_factor=float(1 / latents.std()))
        if is_flow:
            vae.register_to_config(shift_factor=float(latents.mean()))
    shift = vae.config.shift_factor if is_flow else 0.0
    return (latents - shift) * vae.config.scaling_factor


def choose_tokenizer(
    captions: list[str], are_classes: bool, base, args: PretrainArguments
) -> CLIPTokenizer:
    """That of --start_from, or one that learns its words from the captions.

    Raises:
        UsageError: two captions become the same tokens: a prompt could mean either. Those that
            differ in capitals or spaces only are one caption, unless they are made of classes.
    """
    if base is None:
        tokenizer = build_tokenizer(captions, args.vocab_size, args.max_tokens)
        why = "--max_tokens is too small for them"
    else:
        tokenizer = base.tokenizer
        why = f"{args.start_from} lacks their words, or reads too few tokens"
    distinct, first = sorted(set(captions)), {}
    normalize = tokenizer.backend_tokenizer.normalizer.normalize_str
    for caption, ids in zip(distinct, tokenize_captions(tokenizer, distinct).tolist(), strict=True):
        other = first.setdefault(tuple(ids), caption)
        is_alike = normalize(other).strip() == normalize(caption).strip()
        if other == caption or (is_alike and not are_classes):
            continue
        hint = f"{why}; or give a shorter --caption_template"
        if is_alike:
            hint = "they differ in capitals or spaces only; give them other names"
        raise UsageError(
            f"the captions '{other}' and '{caption}' become the same tokens, so that no prompt "
            f"could tell them apart: {hint}"
        )
    return tokenizer


def train_denoiser(accelerator, latents, captions, tokenizer, base, args) -> Objective:
    """`latents` [N, c, r, r] are scaled; captions are dropped with the given probability.

    Args:
        tokenizer: of `choose_tokenizer`.
        base: the pipeline that training starts from; None for a new one.
    """
    torch.manual_seed(args.seed)  # the same start, whether or not a stage was resumed
    kind, _ = OBJECTIVES[args.architecture]
    if base is None:
        objective = kind.build(latents.shape[1:], tokenizer, args)
    else:
        objective = kind.take(base)
    objective.train().requires_grad_(True)
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
    images = generate_all(pipeline, [p for p in prompts for _ in range(8)], seed, drawing)
    pipeline.scheduler = scheduler
    tile_images(images, 8).save(output_dir / "samples.png")
    write_settings(drawing, output_dir)


def check_settings(
    output_dir: Path, pixels: torch.Tensor, captions: list[str], args: PretrainArguments, is_main
) -> None:
    """Raises: UsageError if the folder holds checkpoints of a run with other settings, or of other
    images or captions."""
    seen = hashlib.sha256(pixels.numpy())
    seen.update(json.dumps(captions).encode())
    about = {"resolution": pixels.shape[-1], "hash of images and captions": seen.hexdigest()[:16]}
    path, settings = output_dir / CHECKPOINTS / "settings.json", about | vars(args)
    if path.exists() and (changed := list_differences(json.loads(path.read_text()), settings)):
        raise UsageError(
            f"{output_dir} holds a run with other settings ({'; '.join(changed)}); name another "
            "--output_dir"
        )
    if is_main:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, json.dumps(settings, indent=2))
