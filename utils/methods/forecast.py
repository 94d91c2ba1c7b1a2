"""What a plan will take on this device, measured on public noise before anything is spent: hours,
memory and disk."""

import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from utils.arguments.training import TrainingArguments
from utils.audit.replay import make_noise_units
from utils.data.latent_files import TEXT_LIMIT, encode_aside
from utils.data.latents import prepare_losses
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.memory import Memory, images_at_once, measure_memory
from utils.methods.stages import Stage
from utils.models.drawing import choose_settings
from utils.models.families import find_family
from utils.models.pipelines import list_parts
from utils.models.placement import ready_to_draw
from utils.models.text import AT_ONCE, embed_captions
from utils.privacy.plan import PrivacyPlan
from utils.privacy.training import clipped_gradient_sum, largest_share
from utils.sampling.batches import generate

FEW_IMAGES = 4  # that are encoded to see how long one takes
SOON = 5.0  # seconds: a pass that takes less is repeated, since the first one of a kind is slow
OPTIMIZER_BYTES = 28  # of each weight: two moments, the gradient, its sum and noise in fp64
GIB = 2**30


class Sizes(NamedTuple):
    """How large a run is.

    Attributes:
        rows: of the private set. unit_bytes: memory of the gradients of one unit.
        warm_rows: images that pass the model in the warm start; 0 without one.
    """

    rows: int
    unit_bytes: int
    warm_rows: int


@dataclass(frozen=True)
class Forecast:
    """What a run will take, on this device.

    Attributes:
        passes: forward and backward through the model, of one row each, over all processes.
        seconds_per_step: of training. hours: of training, encoding and samples, and a warm start.
        warm_start_hours: of these, those of its steps.
        memory: bytes at the most, by part, and `peak`; None where they cannot be measured.
        cache: bytes of encoded images and captions on disk, if no two captions are alike.
        keeps_text: whether such captions fit there; else each is embedded whenever it is sampled.
    """

    passes: int
    seconds_per_step: float
    hours: float
    warm_start_hours: float
    memory: dict[str, int] | None
    cache: int
    keeps_text: bool

    def __str__(self) -> str:
        warm = f", {_spell(self.warm_start_hours)} of them for the warm start"
        text = (
            f"about {_spell(self.hours)} on this device{warm if self.warm_start_hours else ''}: "
            f"{self.passes:,} passes through the model, "
            f"{self.seconds_per_step:.3g} s a step; at most {_show(self.cache)} of encoded images "
            f"{'and captions ' if self.keeps_text else ''}on disk"
        )
        if not self.keeps_text:
            text += ", and captions, too many to keep, embedded whenever they are sampled"
        if self.memory is None:
            return text
        parts = [f"{name} {_show(size)}" for name, size in self.memory.items() if name != "peak"]
        return f"{text}\nabout {_show(self.memory['peak'])} of memory: {', '.join(parts)}"


def _spell(hours: float) -> str:
    return f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def _show(size: int) -> str:
    return f"{size / GIB:.1f} GiB" if size >= GIB else f"{size / 2**20:.0f} MiB"


def foresee(
    stage: Stage,
    engine: PerUnitGradients,
    plan: PrivacyPlan,
    training: TrainingArguments,
    sizes: Sizes,
) -> Forecast:
    """Time one micro-batch of blank units as training will run it, one encoding and one image, as
    if no two captions were alike. A warm start counts as if its passes were private ones.
    """
    num_processes, device = stage.accelerator.num_processes, engine.device
    size = min(training.train_batch_size, largest_share(plan, num_processes))
    captions = find_family(stage.pipeline).public_captions
    if stage.accelerator.is_main_process:
        what = f"a pass of {size} units, an encoding and an image at {stage.resolution} pixels"
        print(f"timing {what}", file=sys.stderr)
    blanks = make_noise_units(min(size, FEW_IMAGES), captions, stage.resolution, many_rows=False)
    indices = torch.arange(size) % len(blanks.captions)
    with encode_aside(training) as within:
        with measure_memory(device) as encoding:
            compute_losses, _ = prepare_losses(
                stage.pipeline,
                blanks,
                stage.resolution,
                within,
                plan.noise_multiplicity,
                stage.randomness,
            )

        def run_micro_batch() -> None:
            total = clipped_gradient_sum(
                stage.accelerator, engine, compute_losses, indices, plan, size
            )
            total.sum().item()  # waits for a GPU

        with measure_memory(device) as step:
            micro_batch = _time(run_micro_batch)
        per_pass = micro_batch / size / plan.noise_multiplicity
        image, caption = compute_losses.units.row_bytes()
    keeps_text = sizes.rows * caption <= TEXT_LIMIT
    of_image, of_caption = _time_encoding(stage, training.random_flip, caption > 0)
    if not keeps_text:
        micro_batch += size * of_caption
    with measure_memory(device) as drawn:
        draw = _time_image(stage, training) if training.num_validation_images else 0.0
    share = math.ceil(plan.expected_batch_size / num_processes / size)
    per_step = share * micro_batch + _time(lambda: stage.randomness.noise((engine.num_parameters,)))
    encode = of_image + of_caption * keeps_text
    rest = sizes.rows * encode / num_processes + training.num_validation_images * draw
    warm_start = sizes.warm_rows * per_pass / num_processes
    images = min(training.num_validation_images, images_at_once(stage.resolution))
    return Forecast(
        passes=round(plan.steps * plan.expected_batch_size * plan.noise_multiplicity),
        seconds_per_step=per_step,
        hours=(plan.steps * per_step + rest + warm_start) / 3600,
        warm_start_hours=warm_start / 3600,
        memory=_add_up(stage, engine, encoding, step, drawn, sizes.unit_bytes * size, images),
        cache=sizes.rows * (image + caption * keeps_text),
        keeps_text=keeps_text,
    )


def _time(work: Callable[[], object]) -> float:
    """Seconds; of the second time, if the first was short: the first of a kind is slow."""
    for _ in range(2):
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
        if seconds > SOON:
            break
    return seconds


@torch.no_grad()
def _time_encoding(stage: Stage, flips: bool, embeds: bool) -> tuple[float, float]:
    """Seconds for an image, both ways with flips, and for a caption, where they are encoded once;
    as many at a time as then. To read an image is not in it."""
    family, count = find_family(stage.pipeline), images_at_once(stage.resolution)
    pixels = torch.zeros(count, 3, stage.resolution, stage.resolution)
    image = _time(lambda: family.encode_images(pixels.to(family.device)).cpu()) / count
    if not embeds:
        return image * (1 + flips), 0.0
    captions = [str(i) for i in range(AT_ONCE)]

    def embed() -> None:
        for values in embed_captions(stage.pipeline, captions, stage.resolution).values():
            values.cpu()  # waits for a GPU

    return image * (1 + flips), _time(embed) / AT_ONCE


def _time_image(stage: Stage, training: TrainingArguments) -> float:
    """Seconds for one image of samples/, from two short drawings."""
    pipeline, before = stage.pipeline, stage.pipeline.scheduler
    drawing = choose_settings(pipeline, training, stage.resolution, stage.base_settings)
    drawing.use_scheduler(pipeline)
    try:

        def draw(steps: int) -> float:
            short = replace(drawing, num_inference_steps=steps)
            return _time(lambda: generate(pipeline, [""], [0], 0, short))

        with ready_to_draw(pipeline):
            one, two = draw(1), draw(2)
    finally:
        pipeline.scheduler = before
    return one + max(two - one, 0.0) * (drawing.num_inference_steps - 1)


def _add_up(
    stage: Stage,
    engine: PerUnitGradients,
    encoding: Memory,
    step: Memory,
    drawn: Memory,
    gradients: int,
    images: int,
) -> dict[str, int] | None:
    """`Forecast.memory`: what is measured, and the optimizer, which does not exist yet."""
    if step.peak is None:
        return None
    weights = sum(p.nbytes for part in list_parts(stage.pipeline) for p in part.parameters())
    optimizer = OPTIMIZER_BYTES * engine.num_parameters
    drawing = drawn.before + images * drawn.added
    return {
        "weights": weights,
        "optimizer and noise": optimizer,
        "gradients of a micro-batch": min(gradients, step.added),
        "activations": max(step.added - gradients, 0),
        "Python and its libraries": max(step.before - weights, 0),
        "peak": max(step.peak, encoding.peak, drawing) + optimizer,
    }
