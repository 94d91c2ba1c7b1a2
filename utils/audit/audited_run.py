"""One audited run: the real training loop, or a mutant of it, with canaries among the images."""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import Dataset
from diffusers import StableDiffusionPipeline
from PIL import Image
from sklearn.datasets import load_digits
from torch import nn

from utils.arguments.audit import CANARIES_PER_GUESS, AuditArguments, names_images
from utils.arguments.methods import LoraArguments
from utils.arguments.training import DataArguments, PrivacyArguments, TrainingArguments
from utils.audit.auditing import measure
from utils.audit.canaries import GradientCanaries, ImageCanaries
from utils.audit.mutants import break_loop
from utils.audit.replay import SetUp, replay
from utils.data.latents import Objective
from utils.data.private_set import PrivateSet, load_private_set
from utils.data.rows import load_rows, name_source
from utils.errors import need_one_process
from utils.files import CACHE, LATENTS, make_private, private_folder
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.remembered import remember_run, warn_of_other_ledgers
from utils.ledger.reservations import find_ledger
from utils.models.families import find_family
from utils.models.lora import add_lora
from utils.models.pipelines import choose_resolution, load_pipeline
from utils.privacy.accounting import calibrate_noise_multiplier, pld_epsilon, quote
from utils.privacy.plan import PrivacyPlan, make_plan
from utils.privacy.randomness import make_randomness
from utils.privacy.training import (
    TrainingState,
    avoid_devices_without_fp64,
    private_steps,
)

LOUD = 1000.0  # a canary's gradient before clipping, in units of the clipping bound


def build_canaries(args: AuditArguments, data: DataArguments, device: torch.device):
    """A fresh adapter, ordinary units, and the canaries whose coins came up heads."""
    pipeline = build_adapted_pipeline(args, device)
    resolution = choose_resolution(pipeline, data.resolution)
    folder = make_private(private_folder(args.output_dir))
    ordinary = load_ordinary_set(data, args.num_images, folder / CACHE)
    coins = torch.Generator().manual_seed(args.seed)
    included = torch.rand(args.num_canaries, generator=coins) < 0.5
    if args.canaries == "images":
        return ImageCanaries(pipeline, ordinary, resolution, included, folder / LATENTS)
    loudness = LOUD * args.max_grad_norm
    return GradientCanaries(pipeline, ordinary, resolution, included, folder / LATENTS, loudness)


def build_adapted_pipeline(args: AuditArguments, device: torch.device) -> StableDiffusionPipeline:
    """The pipeline with a fresh LoRA, as `train_dp_lora.py` makes it, but with B not zero, so that
    every weight has a gradient from the first step even where the noise is gone."""
    torch.manual_seed(args.seed)
    pipeline = load_pipeline(args.pretrained_model_name_or_path)
    pipeline.to(device)
    add_lora(pipeline, LoraArguments(rank=4))
    for name, parameter in find_family(pipeline).denoiser.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=1e-3)
    return pipeline


def load_ordinary_set(data: DataArguments, count: int, cache: Path) -> PrivateSet:
    """The images that the canaries hide among: the user's, or scikit-learn's digits.

    What `datasets` copies of the user's images goes to `cache`.
    """
    if not names_images(data):
        digits = load_digits()
        scans = (digits.images[:count] / 16 * 255).astype(np.uint8)
        columns = {"image": [Image.fromarray(s) for s in scans], "label": digits.target[:count]}
        rows, data = Dataset.from_dict(columns), replace(data, label_column="label")
    else:
        rows = load_rows(data, cache)
        rows = rows.select(range(min(count, len(rows))))
    return load_private_set(rows, data)


@cache
def calibrate_noise(epsilon: float, delta: float, sampling_rate: float, steps: int) -> float:
    return calibrate_noise_multiplier(epsilon, delta, sampling_rate, steps)


def make_audit_plan(
    args: AuditArguments, epsilon: float, num_units: int, unit_column: str | None = None
) -> PrivacyPlan:
    """The plan that training claims to follow."""
    sigma = calibrate_noise(epsilon, args.target_delta, args.sampling_rate, args.max_train_steps)
    return make_plan(
        noise_multiplier=sigma,
        num_units=num_units,
        expected_batch_size=args.sampling_rate * num_units,
        steps=args.max_train_steps,
        max_grad_norm=args.max_grad_norm,
        delta=args.target_delta,
        noise_multiplicity=args.noise_multiplicity,
        clipping=args.clipping,
        unit_column=unit_column,
        purpose="audit",
    )


def record_audit(args: AuditArguments, data: DataArguments, plan: PrivacyPlan) -> None:
    """Charge an audit on private images to a ledger, before it trains.

    Raises:
        UsageError: see `find_ledger` and `Ledger.reserve`.
    """
    privacy = PrivacyArguments(privacy_ledger=args.privacy_ledger)
    ledger, source = find_ledger(Path(args.output_dir), privacy), name_source(data)
    branch = ledger.reserve(plan.terms(is_private=True))
    epsilon = pld_epsilon([plan.event()], plan.delta)
    warn_of_other_ledgers(source, ledger)
    remember_run(source, ledger, branch.run, epsilon, plan.delta)
    branch.release(plan.steps, "audit")
    print(f"recorded in {ledger.path}: epsilon {quote(epsilon)} at delta {plan.delta:g}")


def audit_by_replay(args: AuditArguments, data: DataArguments, mutant: str | None) -> dict:
    """Replay some steps of the loop, or of a mutant, with a LoRA (`replay.replay`)."""
    avoid_devices_without_fp64()
    accelerator = Accelerator()
    pipeline = build_adapted_pipeline(args, accelerator.device)
    engine = PerUnitGradients(find_family(pipeline).denoiser, args.noise_multiplicity)
    privacy = PrivacyArguments(
        max_grad_norm=args.max_grad_norm,
        clipping=args.clipping,
        noise_multiplicity=args.noise_multiplicity,
    )
    training = TrainingArguments(output_dir=args.output_dir)
    setup = SetUp(accelerator, pipeline, engine, choose_resolution(pipeline, data.resolution))
    return replay(setup, privacy, data.privacy_unit_column, training, partial(break_loop, mutant))


def audit(args: AuditArguments, data: DataArguments, epsilon: float, mutant: str | None) -> dict:
    """Train once, through the real loop, and measure. Returns the finding, scores included.

    On private images, that is recorded in a ledger.

    Raises:
        UsageError: several processes were started: each would draw other canaries.
    """
    need_one_process("an audit")
    avoid_devices_without_fp64()
    accelerator = Accelerator()
    canaries = build_canaries(args, data, accelerator.device)
    plan = make_audit_plan(args, epsilon, canaries.num_units, data.privacy_unit_column)
    if names_images(data) and not args.data_is_public:
        record_audit(args, data, plan)
    randomness = make_randomness(args.secure_noise)
    engine = PerUnitGradients(canaries.trained, plan.noise_multiplicity)
    optimizer = torch.optim.AdamW(engine.parameters, lr=args.learning_rate)
    optimizer.register_step_pre_hook(lambda *_: canaries.watch(plan))
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)

    def compute_losses(indices: torch.Tensor) -> torch.Tensor:
        return canaries.losses(indices, Objective(plan.noise_multiplicity), randomness)

    with break_loop(mutant):
        state = TrainingState(engine, optimizer, constant)
        for _ in private_steps(
            accelerator, state, compute_losses, plan, randomness, args.train_batch_size
        ):
            pass
    guesses = args.num_canaries // CANARIES_PER_GUESS[args.canaries]
    finding = measure(
        canaries.scores(plan), canaries.included.numpy(), guesses, plan.delta, args.confidence
    )
    reported = pld_epsilon([plan.event()], plan.delta)
    caught = finding["lower_bound"] > reported
    return finding | {"mutant": mutant, "reported_epsilon": reported, "caught": caught}
