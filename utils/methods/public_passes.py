"""What passes on public noise say of a model, before any private image is read."""

import re
import sys

import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline
from torch import nn

from utils.errors import UsageError
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.gradients.recording import MixedRows
from utils.methods.stages import Stage
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.pipelines import collect_trained_modules, trains_text
from utils.models.processes import read_process
from utils.models.text import quiet
from utils.privacy.precision import highest_precision


def leave_out_unused(
    pipeline: DiffusionPipeline, resolution: int, silently: bool = False
) -> nn.Module:
    """Freeze the layers that this model never uses (the queries of the text in a last block, say),
    and say so: nothing but noise would train there. No gradient reaches them, or zeros alone.

    Returns the parts of the pipeline that hold what still trains.

    Raises:
        UsageError: there is nothing else.
    """
    modules = collect_trained_modules(pipeline)
    engine = PerUnitGradients(modules)
    # Of several words: among the keys of one there is nothing to attend to.
    captions = [find_family(pipeline).public_captions[-1]]
    try:
        with engine.watching() as reached:
            losses = compute_public_losses(pipeline, resolution, captions)
            if losses.requires_grad:
                losses.sum().backward()
    except MixedRows:
        return modules  # `rehearse` says what is wrong
    layers = [re.split(r"\.lo(?:ra|da)_[AB]\.|\.(?=\w+$)", name)[0] for name in engine.names]
    each = list(zip(layers, engine.parameters, strict=True))
    used = {layer for layer, parameter in each if parameter in reached}
    unused = [layer for layer in dict.fromkeys(layers) if layer not in used]
    if not used:
        raise UsageError(f"this model uses none of what is to train, such as {unused[0]}")
    for layer, parameter in each:
        parameter.requires_grad_(layer in used)
    if unused and not silently and PartialState().is_main_process:
        names = ", ".join(unused)
        print(f"left out, since this model never uses them: {names}", file=sys.stderr)
    return modules


def rehearse(
    pipeline: DiffusionPipeline,
    engine: PerUnitGradients,
    resolution: int,
    norms_only: bool = False,
) -> None:
    """Passes on public noise, before any private image is read, of two rows at most.

    Two units with captions of unequal length must get the same gradient alone and together: else
    the model mixes the rows of a batch.

    Raises:
        UsageError: a trainable layer is not used by this model, its gradients are not finite, or it
            mixes rows.
    """

    def measure(captions: list[str]) -> torch.Tensor:
        recording = engine.recording(len(captions), norms_only, num_draws=1)
        with highest_precision(), recording as record:
            compute_public_losses(pipeline, resolution, captions).sum().backward()
        return record.squared_norms().sum(1)

    captions = list(find_family(pipeline).public_captions[:2])
    try:
        alone = torch.cat([measure([caption]) for caption in captions])
    except MixedRows as error:
        raise UsageError(
            f"{error}: leave that layer out (--target_modules, --scope, --trainable); this model "
            "packs the tokens of all rows together there"
        ) from error
    if not alone.isfinite().all():
        raise UsageError(
            "this model's gradients are not finite, on public noise: its weights are damaged, or "
            "too large for --mixed_precision; load it in diffusers, and draw with it, first"
        )
    if not torch.allclose(alone, measure(captions), rtol=1e-3, atol=0.0):
        raise UsageError(
            "this model gives a unit another gradient beside other units than alone: it mixes the "
            "rows of a batch, so that no unit's gradient can be bounded by itself"
        )
    draws = min(2, engine.num_draws)  # of one unit
    with engine.recording(1, norms_only, draws):
        compute_public_losses(pipeline, resolution, [""] * draws).mean().backward()


def measure_unit(stage: Stage, engine: PerUnitGradients, norms_only: bool = False) -> int:
    """The memory that the gradients of one unit take in a private step, in bytes: by such a pass of
    one unit, on public noise."""
    captions = [""] * engine.num_draws
    with engine.recording(1, norms_only) as record:
        with stage.accelerator.autocast():
            loss = compute_public_losses(stage.pipeline, stage.resolution, captions).mean()
        loss.backward()
    return record.nbytes()


def compute_public_losses(
    pipeline: DiffusionPipeline, resolution: int, captions: list[str]
) -> torch.Tensor:
    """The loss of one row a caption, on noise that depends on the caption alone: [U]."""
    family, process = find_family(pipeline), read_process(pipeline.scheduler)
    shape = (2, *family.latent_shape(resolution))
    seeds = (torch.Generator().manual_seed(len(caption)) for caption in captions)
    rows = torch.stack([torch.randn(shape, generator=seed) for seed in seeds]).to(family.device)
    quantiles = torch.tensor([(500.5 + len(caption)) / 1000 for caption in captions])
    with quiet(), torch.set_grad_enabled(trains_text(pipeline)):
        text = family.encode_text(captions, resolution)
    parts = (process, rows[:, 0], text, rows[:, 1], quantiles.to(family.device))
    return denoising_loss(family.predictor, *parts)
