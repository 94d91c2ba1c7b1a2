"""Inputs for a model of any family, and what can train in it."""

import torch

from tests.families import SIDE
from utils.arguments.methods import LdmArguments, LoDAArguments, LoraArguments
from utils.models.loda.adapter import add_loda
from utils.models.lora import add_lora
from utils.models.own_weights import unfreeze
from utils.models.text import embed_captions

CAPTIONS = ["the digit 3", "a much longer caption of the digit 7, and more of it"]
CLASSES = ["3", "creature 207"]  # for DiT
ADAPTERS = {
    "lora": lambda p: add_lora(p, LoraArguments(rank=2, lora_alpha=5)),
    "loda": lambda p: add_loda(p, LoDAArguments(rank=2)),
    "attention": lambda p: unfreeze(p, LdmArguments()),
    "all": lambda p: unfreeze(p, LdmArguments(trainable="all")),
}


def list_captions(family) -> list[str]:
    """Two of unequal length."""
    return CLASSES if family.title == "DiT" else CAPTIONS


def draw_inputs(family, units: int = 2, draws: int = 1, seed: int = 0, side: int = SIDE):
    """Latents, noise and quantiles [units * draws, ...], and text of unequal captions."""
    generator = torch.Generator().manual_seed(seed)
    shape = (units * draws, *family.latent_shape(side))
    latents, noise = torch.randn(2, *shape, generator=generator)
    quantiles = torch.rand(len(latents), generator=generator)
    captions = [list_captions(family)[i % 2] for i in range(len(latents))]
    text = embed_captions(family.pipeline, captions, side)
    return latents, noise, quantiles, {name: values.float() for name, values in text.items()}
