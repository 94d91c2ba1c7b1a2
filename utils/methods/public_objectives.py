"""What the public stage trains: an autoencoder, a U-Net or a flow, new ones or those of a base.

Nothing here is private.
"""

from functools import partial

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
)
from torch import nn

from utils.arguments.pretraining import PretrainArguments
from utils.data.images import scale_to_unit_range
from utils.errors import UsageError
from utils.ledger.bases import read_base_statement
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.families.sd3 import StableDiffusion3
from utils.models.families.stable_diffusion import StableDiffusion, tokenize_captions
from utils.models.pipelines import load_pipeline
from utils.models.processes import Flow, read_process
from utils.models.public_models import (
    assemble_pipeline,
    assemble_sd3,
    build_scheduler,
    build_t5,
    build_text_encoder,
    build_text_encoder_pair,
    build_transformer,
    build_unet,
)


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

    def __init__(self, text_encoder, tokenizer, unet, scheduler):
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet
        self.tokenizer, self.scheduler = tokenizer, scheduler

    @classmethod
    def build(cls, latent_shape, tokenizer, args: PretrainArguments) -> "UNetObjective":
        """A new one, for latents of shape [channels, r, r]."""
        text_encoder = build_text_encoder(tokenizer, args.text_width, args.text_layers)
        channels, _, side = latent_shape
        unet = build_unet(side, tuple(args.unet_channels), args.text_width, channels)
        return cls(text_encoder, tokenizer, unet, build_scheduler(args.prediction_type))

    @classmethod
    def take(cls, pipeline: StableDiffusionPipeline) -> "UNetObjective":
        parts = (pipeline.text_encoder, pipeline.tokenizer, pipeline.unet)
        return cls(*parts, pipeline.scheduler)

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

    def __init__(self, text_encoders, tokenizer, t5_tokenizer, transformer):
        super().__init__()
        self.text_encoders, self.transformer = nn.ModuleList(text_encoders), transformer
        self.tokenizer, self.t5_tokenizer = tokenizer, t5_tokenizer

    @classmethod
    def build(cls, latent_shape, tokenizer, args: PretrainArguments) -> "FlowObjective":
        """A new one, for latents of shape [channels, r, r]."""
        channels, _, side = latent_shape
        pair = build_text_encoder_pair(tokenizer, args.text_width, args.text_layers)
        t5, t5_tokenizer = build_t5(args.text_width, args.max_tokens)
        size = (args.transformer_width, args.transformer_layers)
        transformer = build_transformer(side, *size, args.text_width, channels)
        return cls([*pair, t5], tokenizer, t5_tokenizer, transformer)

    @classmethod
    def take(cls, pipeline: StableDiffusion3Pipeline) -> "FlowObjective":
        encoders = [pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3]
        return cls(encoders, pipeline.tokenizer, pipeline.tokenizer_3, pipeline.transformer)

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


Objective = UNetObjective | FlowObjective
OBJECTIVES = {
    "unet": (UNetObjective, StableDiffusionPipeline),
    "sd3": (FlowObjective, StableDiffusion3Pipeline),
}


def take_base(
    args: PretrainArguments,
) -> tuple[DiffusionPipeline | None, AutoencoderKL | None]:
    """The pipeline of --start_from, and the autoencoder of that or of --autoencoder_from, of which
    nothing else is kept; None for what is to be made.

    Raises:
        UsageError: see `load_pipeline`; or it is a private result, or has another autoencoder.
    """
    base = args.start_from or args.autoencoder_from
    if base is None:
        return None, None
    option = "--autoencoder_from" if args.start_from is None else "--start_from"
    if read_base_statement(base, None)[0] is not None:
        raise UsageError(f"{option} {base} is a private result, and this stage is public")
    pipeline = load_pipeline(base)
    vae = pipeline.vae
    if not isinstance(vae, AutoencoderKL):
        raise UsageError(f"{option} {base}: an AutoencoderKL is wanted")
    return (None if args.start_from is None else pipeline), vae


def check_base(pipeline: DiffusionPipeline, resolution: int | None, args: PretrainArguments) -> int:
    """The side of the images of --start_from, in pixels.

    Raises:
        UsageError: it is of another architecture, or draws another size than was asked for.
    """
    base, (_, kind) = args.start_from, OBJECTIVES[args.architecture]
    if type(pipeline) is not kind:
        raise UsageError(
            f"--start_from {base} is a {type(pipeline).__name__}, and --architecture "
            f"{args.architecture} makes a {kind.__name__}: give the architecture that it has"
        )
    side = find_family(pipeline).native_resolution
    if resolution not in (None, side):
        raise UsageError(f"--start_from {base} draws {side} pixels: give --resolution {side}")
    return side
