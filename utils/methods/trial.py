"""One trial of a rehearsal, in a process of its own: some private steps on public images."""

import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from diffusers import DiffusionPipeline

from utils.arguments.methods import LdmArguments, LoDAArguments, LoraArguments
from utils.arguments.sampling import DrawingArguments
from utils.arguments.training import TrainingArguments
from utils.data.images import crop_to_pixels
from utils.data.latents import (
    OF_SCHEMES,
    EncodedUnits,
    PrivateLosses,
    choose_objective,
    encode_units,
)
from utils.evaluation.downstream import (
    Classifiers,
    LabelledImages,
    measure_downstream_accuracy,
)
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.memory import images_at_once
from utils.methods.private_run import build_state
from utils.methods.public_passes import leave_out_unused
from utils.methods.stand_in import StandIn, list_prompts, read_pixels
from utils.models.drawing import adopt_reading, choose_settings, read_base_settings
from utils.models.pipelines import choose_resolution, collect_trained_modules, load_pipeline
from utils.models.text import quiet
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import make_randomness
from utils.privacy.training import TrainingState, private_steps, reduce_micro_batches
from utils.sampling.batches import generate_all

MEASURED = 64  # public units whose gradients are looked at
JUDGED_AT = 4  # noise levels an image
DRAWN, CLASSIFIER_STEPS = 1000, 400
STATE = "state.pt"
MethodArguments = LoraArguments | LoDAArguments | LdmArguments


@dataclass(frozen=True)
class Trial:
    """What is tried.

    Attributes:
        plan: of the private run. settings: of the method.
        training: with the rate and the steps. folder: where its state is kept between rounds.
        pace: which of the rates that were tried with as many steps it has, the lowest first.
    """

    plan: PrivacyPlan
    settings: MethodArguments
    training: TrainingArguments
    folder: Path
    pace: int


@dataclass(frozen=True)
class Outcome:
    """What came of a trial after `step` steps.

    Attributes:
        loss: denoising loss on the images that judge, at fixed noise. seconds: of this round.
    """

    step: int
    loss: float
    seconds: float


def adapt(pipeline: DiffusionPipeline, settings: MethodArguments) -> None:
    """Make trainable what the method of these settings trains."""
    from utils.models.loda.adapter import add_loda
    from utils.models.lora import add_lora
    from utils.models.own_weights import unfreeze

    if isinstance(settings, LoraArguments):
        add_lora(pipeline, settings)
    elif isinstance(settings, LoDAArguments):
        add_loda(pipeline, settings)
    else:
        unfreeze(pipeline, settings, None)


def scale_down(plan: PrivacyPlan, num_parameters: int, available: int) -> PrivacyPlan:
    """A plan on fewer units, whose mean is as noisy as that of `plan`.

    The mean of B units that point anywhere is off by about 1 / B, and by P (sigma / B)^2 for the
    noise, in squares and in units of C. With b units, of which as many are taken as make the first
    half of that sum, the second is added as noise. No privacy follows from it: all is public.

    Args:
        available: how many public units there are.
    """
    batch = plan.expected_batch_size
    off = 1 / batch + num_parameters * (plan.noise_multiplier / batch) ** 2
    fewer = min(batch, math.ceil(2 / off), available)
    noise = math.sqrt(max(off - 1 / fewer, 0.0) / num_parameters) * fewer
    return replace(
        plan, num_units=available, expected_batch_size=fewer, noise_multiplier=noise, prior=()
    )


def advance(stand_in: StandIn, trial: Trial, until: int, seed: int) -> Outcome:
    """Continue a trial to step `until`, from where its folder says it is, and judge it."""
    start, training = time.perf_counter(), trial.training
    accelerator, pipeline, engine, state = restore(stand_in, trial, seed)
    side = choose_resolution(pipeline, stand_in.data.resolution)
    units, _ = encode_units(
        pipeline, stand_in.trained_on, side, stand_in.folder, training.random_flip
    )
    plan = scale_down(trial.plan, engine.num_parameters, stand_in.trained_on.num_units)
    randomness = make_randomness(False, seed + state.step)
    objective = choose_objective(pipeline, training, plan.noise_multiplicity)
    compute_losses = PrivateLosses(pipeline, units, objective, randomness)
    steps = private_steps(
        accelerator,
        state,
        compute_losses,
        plan,
        randomness,
        training.train_batch_size,
        show_progress=False,
    )
    while state.step < until:
        next(steps)
    trial.folder.mkdir(parents=True, exist_ok=True)
    torch.save(state.state_dict(), trial.folder / STATE)
    if state.average is not None:
        state.average.copy_to(engine.parameters)  # what would be published
    loss = judge(pipeline, encode_judges(pipeline, stand_in), training)
    return Outcome(until, loss, time.perf_counter() - start)


def restore(
    stand_in: StandIn, trial: Trial, seed: int
) -> tuple[Accelerator, DiffusionPipeline, PerUnitGradients, TrainingState]:
    """The model of a trial, as its last round left it."""
    os.environ["TQDM_DISABLE"] = "1"  # bars of several processes would run into one another
    accelerator = Accelerator(mixed_precision=trial.training.mixed_precision)
    torch.manual_seed(seed)
    pipeline = load_pipeline(*stand_in.model.source)
    pipeline.to(accelerator.device)
    adopt_reading(pipeline, trial.training, read_base_settings(stand_in.model))
    adapt(pipeline, trial.settings)
    side = choose_resolution(pipeline, stand_in.data.resolution)
    engine = PerUnitGradients(
        leave_out_unused(pipeline, side, silently=True), trial.plan.noise_multiplicity
    )
    state = build_state(engine, trial.plan, trial.training)
    if (trial.folder / STATE).exists():
        state.load_state_dict(torch.load(trial.folder / STATE, weights_only=True))
    return accelerator, pipeline, engine, state


def encode_judges(pipeline: DiffusionPipeline, stand_in: StandIn) -> EncodedUnits:
    """The images that judge: their latents are on disk already, but for the first time."""
    side = choose_resolution(pipeline, stand_in.data.resolution)
    return encode_units(pipeline, stand_in.judged_on, side, stand_in.folder)[0]


def measure_accuracy(stand_in: StandIn, trial: Trial | None, seed: int) -> float:
    """Accuracy on the stand-in, all of it, since few images judge, of a small classifier that saw
    only images drawn by the trial's model, or by the base; the class is the caption."""
    os.environ["TQDM_DISABLE"] = "1"
    if trial is None:
        pipeline = load_pipeline(*stand_in.model.source)
        pipeline.to(Accelerator().device)
    else:
        _, pipeline, engine, state = restore(stand_in, trial, seed)
        if state.average is not None:
            state.average.copy_to(engine.parameters)
    side = choose_resolution(pipeline, stand_in.data.resolution)
    drawing = choose_settings(
        pipeline, DrawingArguments(), side, read_base_settings(stand_in.model)
    )
    drawing.use_scheduler(pipeline)
    prompts = list_prompts(stand_in)
    whole = (stand_in.judged_on, stand_in.trained_on)
    captions = [caption for part in whole for caption in part.captions]
    labels = [prompts[i % len(prompts)] for i in range(min(DRAWN, 2 * len(captions)))]
    with quiet():  # of long class names, which are cut off
        images = generate_all(pipeline, labels, seed, drawing)
    drawn = LabelledImages(torch.stack([crop_to_pixels(image, side) for image in images]), labels)
    pixels = torch.cat([read_pixels(part, side) for part in whole])
    known = [i for i, caption in enumerate(captions) if caption in prompts]
    real = LabelledImages(pixels[known], [captions[i] for i in known])
    classifiers = Classifiers({"cnn": CLASSIFIER_STEPS}, 2)
    return measure_downstream_accuracy(drawn, real, classifiers, PartialState())["value"]


def measure_gradients(
    pipeline: DiffusionPipeline, stand_in: StandIn, training: TrainingArguments, num_draws: int
) -> dict[str, object]:
    """Of some public units at the start, `norms`: quartiles; and `aligned`, the length of the mean
    of their directions: the signal, where the largest is 1."""
    engine = PerUnitGradients(collect_trained_modules(pipeline), num_draws)
    units = encode_judges(pipeline, stand_in)
    objective = choose_objective(pipeline, training, num_draws)
    chosen, norms, total = torch.arange(min(MEASURED, len(units.count))), [], 0.0
    compute_losses = PrivateLosses(pipeline, units, objective, make_randomness(False, 0))

    def point(record) -> torch.Tensor:
        squared = record.squared_norms().sum(1)
        norms.extend(squared.sqrt().tolist())
        scales = squared.clamp_min(1e-60).rsqrt()[:, None].expand(-1, len(engine.parameters))
        return record.weighted_sum(scales)

    parts = chosen.split(training.train_batch_size)
    accelerator = Accelerator(mixed_precision=training.mixed_precision)
    for part in reduce_micro_batches(accelerator, engine.recording, compute_losses, parts, point):
        total = total + part
    quartiles = torch.tensor(norms).quantile(torch.tensor([0.25, 0.5, 0.75]))
    return {"norms": quartiles.tolist(), "aligned": (total.norm() / len(chosen)).item()}


@torch.no_grad()
def judge(pipeline: DiffusionPipeline, judges: EncodedUnits, training: TrainingArguments) -> float:
    """The mean denoising loss of the images that judge, at noise and timesteps that are the same
    for every trial."""
    usual = dict.fromkeys(["snr_gamma", "weighting_scheme", *OF_SCHEMES])
    objective = choose_objective(pipeline, replace(training, **usual), JUDGED_AT)
    compute_losses = PrivateLosses(pipeline, judges, objective, make_randomness(False, 0))
    parts = torch.arange(len(judges.count)).split(images_at_once(judges.resolution))
    return torch.cat([compute_losses(part) for part in parts]).mean().item()
