"""Captions to what conditions a denoiser, each the same whatever other captions there are."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline

from utils.models.families import find_family

AT_ONCE = 15  # captions in one pass through the text encoders


@contextmanager
def quiet() -> Iterator[None]:
    """Pipelines warn of what they cut off a caption, and show it, which may be private."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@torch.no_grad()
def embed_captions(
    pipeline: DiffusionPipeline, captions: Sequence[str], resolution: int
) -> dict[str, torch.Tensor]:
    """The conditioning by captions (`Family.encode_text`), each [n, ...], on the pipeline's device,
    as `Family.text_dtype`.

    Passes have one size, filled up with empty captions, of which each has one at least (without a
    caption to fill up, attention takes a shorter way); and are in the encoders' own precision also
    under autocast: else one more caption would change everyone's loss by its rounding.
    """
    family, parts = find_family(pipeline), []
    with torch.autocast(family.device.type, enabled=False), quiet():
        for start in range(0, len(captions), AT_ONCE):
            group = [str(captions[i]) for i in range(start, min(start + AT_ONCE, len(captions)))]
            filled = group + [""] * (AT_ONCE + 1 - len(group))
            text = family.encode_text(filled, resolution)
            parts.append({k: v[: len(group)].to(family.text_dtype) for k, v in text.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
