"""The story of a selection: score, release with noise, keep, publish (DP-SAPF's first stage)."""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

from utils.arguments.methods import LoraArguments, SaliencyArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.latents import prepare_losses
from utils.data.private_set import PrivateSet
from utils.errors import UsageError, on_main_process
from utils.files import (
    SALIENCY,
    explain_disk_errors,
    write_durably,
)
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.runs import Run
from utils.ledger.statement import describe_cost
from utils.methods.choice import Keep, build_keep, conclude
from utils.methods.planning import (
    ALONE,
    OtherStages,
    check_captions,
    check_later_training,
    describe,
    load_private_rows,
    preview,
    reserve,
)
from utils.methods.public_passes import leave_out_unused, measure_unit, rehearse
from utils.methods.saliency import Scoring, build_scoring, find_candidates, sum_scores
from utils.methods.saliency_file import Saliency
from utils.methods.stages import Stage, collect_settings, finish, load_stage, start
from utils.models.drawing import adopt_template
from utils.models.families import find_family
from utils.privacy.defaults import ADAPTER_RATE, PublicFacts, choose_missing, median_width
from utils.privacy.dp_sgd import add_noise_once, sample_poisson_batch
from utils.privacy.plan import PrivacyPlan, make_plan


def run_selection(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    lora: LoraArguments,
    args: SaliencyArguments,
    others: OtherStages = ALONE,
) -> Saliency | None:
    """Rank matrices by the private images, and publish the selection in `training.output_dir`.
    The training will build on `others`, too. Returns as many matrices at random in a dry run.

    Raises:
        UsageError: bad input of any kind, before an image is read where that is possible.
    """
    accelerator, _lock = start(training, data.train_data_dir, data.dataset_name)
    data, reads = adopt_template(data, model), args.mechanism != "random"  # which costs nothing
    found = load_private_rows(accelerator, data, training) if reads else None
    stage = load_stage(accelerator, model, data, privacy, training)
    candidates, side = find_used_candidates(stage, args.scope), stage.resolution
    scoring = build_scoring(list(candidates), args)
    keep = build_keep(candidates, scoring, lora)
    if found is None:
        return select_at_random(stage, scoring, keep, args, training)

    # Plan the one release, and reserve it.
    check_captions(found, stage.pipeline, training.validation_prompt)
    width = median_width([module.weight.shape for module in candidates.values()])
    facts = PublicFacts(found.num_units, int(keep.trained.sum()), width, ADAPTER_RATE)
    privacy, training, _ = choose_missing(privacy, training, facts)
    engine = PerUnitGradients(find_family(stage.pipeline).denoiser, privacy.noise_multiplicity)
    rehearse(stage.pipeline, engine, stage.resolution, norms_only=True)

    told, unit_column = stage.describe_circumstances(), data.privacy_unit_column
    plan = plan_selection(found.num_units, privacy, args, scoring.sensitivity, unit_column)
    later = check_later_training(plan, privacy, training, others, told)
    if args.top_ratio == "auto" and later is None:
        raise UsageError("--top_ratio auto looks at the training plan: give --target_epsilon")
    keep = replace(keep, plan=later)
    if training.dry_run:
        left_out = preview(found, privacy, training, side, told, plan)
        more = {"training_after_it": None if later is None else later.event()}
        unit_bytes = measure_unit(stage, engine, norms_only=True)
        accelerator.print(describe(plan, engine, unit_bytes, training, left_out, **more))
        stand_in = select_at_random(stage, scoring, keep, args, training)
        return replace(stand_in, event=plan.event())
    agreed = collect_settings("selection", args, data, training)
    agreed["base_model_checksum"] = stage.base_checksum
    private_set, run = reserve(found, privacy, training, side, agreed, told, plan)
    accelerator.print(announce(stage, plan, run, len(candidates)))

    # Score every sampled unit, and release the sum with noise.
    release = partial(release_scores, stage, engine, scoring, private_set, plan, training)
    noisy, encoded_dir = release_or_resume(run, release)

    # Everything from here on sees the noisy scores only.
    saliency = conclude(noisy.double().numpy(), scoring, keep, args, stage.base_checksum, plan)
    saliency = replace(saliency, run=run.branch.run, private=stage.randomness.is_private)
    on_main_process(lambda: run.publish(lambda folder: export(saliency, folder), plan))
    finish(stage, data, training, encoded_dir, describe_selection(saliency, training))


def find_used_candidates(stage: Stage, scope: str) -> dict[str, nn.Module]:
    """The layers whose weights are ranked; from now on those weights train, and no others."""
    candidates = find_candidates(stage.pipeline, scope)
    for module in candidates.values():
        module.weight.requires_grad_(True)
    leave_out_unused(stage.pipeline, stage.resolution)
    return {name: module for name, module in candidates.items() if module.weight.requires_grad}


def select_at_random(
    stage: Stage,
    scoring: Scoring,
    keep: Keep,
    args: SaliencyArguments,
    training: TrainingArguments,
) -> Saliency | None:
    """Select without looking at the private images, by scores that add up to the most that a unit
    gives; return that in a dry run, and else publish it."""
    seed = training.seed or 0 if training.dry_run else training.seed  # a plan is everywhere alike
    scores = np.random.default_rng(seed).random(len(scoring.names))
    saliency = conclude(scores / scores.sum(), scoring, keep, args, stage.base_checksum)
    sentence = describe_selection(saliency, training)
    if training.dry_run:
        if stage.accelerator.is_main_process:
            print(f"{sentence}; as many at random stand for them here", file=sys.stderr)
        return saliency
    on_main_process(lambda: export(saliency, Path(training.output_dir)))
    stage.accelerator.print(sentence)
    return None


def announce(stage: Stage, plan: PrivacyPlan, run: Run, num_candidates: int) -> str:
    """One sentence before the ranking: of what, and what it will cost."""
    return (
        f"ranking {num_candidates} matrices by {plan.num_units} private units: "
        f"{describe_cost(plan, stage.base_statement, run.recharged)} (noise multiplier "
        f"{plan.noise_multiplier:.3f})"
    )


def plan_selection(
    num_units: int,
    privacy: PrivacyArguments,
    args: SaliencyArguments,
    sensitivity: float,
    unit_column: str | None,
) -> PrivacyPlan:
    """One noisy release of the summed scores, as one step of the Poisson-sampled Gaussian.

    Raises:
        UsageError: see `make_plan`; or no budget was named.
    """
    sigma, epsilon = args.selection_noise_multiplier, args.selection_epsilon
    if sigma is None and epsilon is None:
        if privacy.target_epsilon is None:
            raise UsageError("give --selection_noise_multiplier, --selection_epsilon or a target")
        epsilon = args.selection_share * privacy.target_epsilon
    return make_plan(
        target_epsilon=epsilon,
        noise_multiplier=sigma,
        num_units=num_units,
        expected_batch_size=args.sampling_rate * num_units,
        steps=1,
        max_grad_norm=sensitivity,
        delta=privacy.target_delta,
        noise_multiplicity=privacy.noise_multiplicity,
        clipping=privacy.clipping,
        unit_column=unit_column,
        purpose="selection",
    )


def release_or_resume(
    run: Run, release: Callable[[], tuple[torch.Tensor, Path]]
) -> tuple[torch.Tensor, Path | None]:
    """What `release_scores` gives, or what an interrupted run has paid for, without a folder."""
    folders = []

    def score(_) -> torch.Tensor:
        noisy, folder = release()
        folders.append(folder)
        return noisy

    (noisy,) = run.repeat("noisy_scores", 1, score)
    return noisy, (folders or [None])[0]


def release_scores(
    stage: Stage,
    engine: PerUnitGradients,
    scoring: Scoring,
    private_set: PrivateSet,
    plan: PrivacyPlan,
    training: TrainingArguments,
) -> tuple[torch.Tensor, Path]:
    """The noisy mean of the scores of a Poisson batch [S], and the folder of the encoded images."""
    accelerator, randomness = stage.accelerator, stage.randomness
    unit_losses, encoded_dir = prepare_losses(
        stage.pipeline,
        private_set,
        stage.resolution,
        training,
        plan.noise_multiplicity,
        randomness,
    )
    batch = sample_poisson_batch(plan, randomness, accelerator)
    share = batch[accelerator.process_index :: accelerator.num_processes]
    total = sum_scores(
        accelerator,
        engine,
        unit_losses,
        share,
        scoring,
        training.train_batch_size,
        show_progress=accelerator.is_main_process and plan.sampling_rate == 1,
    )
    noisy = add_noise_once(total.to(accelerator.device), plan, randomness, accelerator)
    return noisy.cpu(), encoded_dir


def export(saliency: Saliency, folder: Path) -> None:
    """Write saliency.json and saliency.png."""
    from utils.methods.plots import plot_saliency  # needs matplotlib

    with explain_disk_errors(folder):
        plot_saliency(saliency, folder / "saliency.png")
        write_durably(folder / SALIENCY, saliency.to_json())


def describe_selection(saliency: Saliency, training: TrainingArguments) -> str:
    """The last sentence of a selection."""
    counts = f"{len(saliency.selected)} of {len(saliency.candidates)} matrices"
    if training.dry_run:
        return f"would select {counts}"
    return f"selected {counts}: saliency.json and saliency.png in {training.output_dir}"
