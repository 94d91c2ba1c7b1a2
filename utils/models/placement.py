"""Where the parts of a pipeline are, and how precise its frozen weights are: as training needs
them, and as drawing does."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn

from utils.models.families import find_family
from utils.models.pipelines import list_parts, trains_text


def halve_frozen(pipeline: DiffusionPipeline, public: Iterable[nn.Parameter]) -> None:
    """Keep the frozen matrices and convolutions of the denoiser in bf16, half the memory; norms and
    biases are small, and stay in fp32, as all of an adapter and all that trains does. All weights
    of text encoders are kept in bf16, as their makers run them, unless one trains.

    Args:
        public: the weights of the public model.
    """
    within, public = set(find_family(pipeline).denoiser.parameters()), set(public)
    for parameter in within & public:
        if not parameter.requires_grad and parameter.ndim > 1:
            parameter.data = parameter.data.to(torch.bfloat16)
    for encoder in [] if trains_text(pipeline) else find_family(pipeline).encoders:
        for parameter in encoder.parameters():  # no buffers: positions need fp32
            parameter.data = parameter.data.to(torch.bfloat16)


def park(pipeline: DiffusionPipeline, text_too: bool) -> None:
    """Move the autoencoder, and perhaps the text encoders, off a GPU: all is encoded."""
    _, *encoders, vae = list_parts(pipeline)
    if find_family(pipeline).device.type != "cpu":
        for part in [vae, *(encoders if text_too else [])]:
            part.to("cpu")


@contextmanager
def ready_to_draw(pipeline: DiffusionPipeline) -> Iterator[None]:
    """Within this context every part is on the denoiser's device, and all weights are in fp32, as
    whoever loads the adapter has them; afterwards, where and as they were."""
    device, parts = find_family(pipeline).device, list_parts(pipeline)
    parked = [part for part in parts if next(part.parameters()).device != device]
    halved = [p for part in parts for p in part.parameters() if p.dtype == torch.bfloat16]
    for part in parked:
        part.to(device)
    for parameter in halved:
        parameter.data = parameter.data.float()
    try:
        yield
    finally:
        for parameter in halved:
            parameter.data = parameter.data.to(torch.bfloat16)
        for part in parked:
            part.to("cpu")
