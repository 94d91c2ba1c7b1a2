"""Images of a run while it trains, from the noisy weights that its ledger has released: a sheet a
step, and at the end all of them under one another."""

import re
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from utils.arguments.training import TrainingArguments
from utils.data.images import tile_images
from utils.files import SAMPLES, explain_disk_errors
from utils.models.drawing import DrawingSettings
from utils.models.placement import ready_to_draw
from utils.privacy.training import TrainingState
from utils.sampling.batches import generate_all

SHEET = re.compile(r"step_(\d{6})\.png")
FILM = "film.png"
WIDEST = 10  # images side by side
SMALLEST = 64  # pixels: smaller images are enlarged
MARGIN = 64  # pixels, for the number of the step


def is_due(step: int, training: TrainingArguments) -> bool:
    """Whether images are drawn after `step`; before the first one, too."""
    every = training.validation_steps
    return every is not None and training.num_validation_images > 0 and step % every == 0


def draw_sheet(
    accelerator: Accelerator,
    pipeline: DiffusionPipeline,
    state: TrainingState,
    training: TrainingArguments,
    drawing: DrawingSettings,
) -> None:
    """Images of the weights as they would be published now, into samples/ and the trackers; each
    starts from the noise that it starts from at every step. Their release must be on record.

    Raises:
        UsageError: the disk does not take them.
    """
    if not accelerator.is_main_process:
        return
    prompts, parameters = training.validation_prompt, state.engine.parameters
    count = min(training.num_validation_images, max(WIDEST // len(prompts), 1) * len(prompts))
    count = min(count, WIDEST)
    chosen, before = [prompts[i % len(prompts)] for i in range(count)], pipeline.scheduler
    if state.average is not None:
        state.average.store(parameters)
        state.average.copy_to(parameters)
    drawing.use_scheduler(pipeline)
    try:
        with ready_to_draw(pipeline):
            images = generate_all(pipeline, chosen, 0, drawing)
    finally:
        pipeline.scheduler = before
        if state.average is not None:
            state.average.restore(parameters)
    folder = Path(training.output_dir) / SAMPLES
    sheet = tile_images(images, count)
    larger = max(1, SMALLEST // images[0].width)
    sheet = sheet.resize((larger * sheet.width, larger * sheet.height), Image.Resampling.NEAREST)
    with explain_disk_errors(folder.parent):
        folder.mkdir(exist_ok=True)
        sheet.save(folder / f"step_{state.step:06}.png")
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            pixels = {"samples": np.asarray(sheet)[None]}
            tracker.log_images(pixels, step=state.step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"samples": [sheet]}, step=state.step)


def list_sheets(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.png") if SHEET.fullmatch(path.name))


def save_film(folder: Path) -> None:
    """All sheets of a folder under one another, each with its step; nothing if there are none."""
    sheets = [(int(SHEET.fullmatch(p.name)[1]), Image.open(p)) for p in list_sheets(folder)]
    if not sheets:
        return
    height = sum(sheet.height for _, sheet in sheets)
    film = Image.new("RGB", (MARGIN + max(sheet.width for _, sheet in sheets), height), "white")
    pen, top = ImageDraw.Draw(film), 0
    for step, sheet in sheets:
        film.paste(sheet, (MARGIN, top))
        middle = (MARGIN - 8, top + sheet.height // 2)
        pen.text(middle, f"step {step}", fill="black", anchor="rm")
        top += sheet.height
    film.save(folder / FILM)
