"""DP-SAPF's first stage: spend a sliver of the budget to learn where to spend the rest.

    accelerate launch select_saliency.py --config examples/digits/dp_lora.yaml \\
        --output_dir runs/digits/selection
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml \\
        --saliency_file runs/digits/selection/saliency.json

    # both stages with one command
    accelerate launch train_dp_lora.py --config examples/digits/dp_lora.yaml --select_saliency

The gradients of the private images say which weight matrices of the public model matter, and noise
makes that private (Gong et al. 2026). Takes the arguments of train_dp_lora.py, so one config serves
both stages: --target_epsilon is for both together, and the selection takes --selection_share of it.
Writes saliency.json (noisy scores and the selected names), saliency.png, privacy.json, and its
entry in the ledger, which training composes with its own.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from utils.accounting import PrivacyPlan, account, make_plan
from utils.arguments import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
    parse,
)
from utils.dp_sgd import add_noise_once, draw_poisson_batch
from utils.entropy import secret_randomness
from utils.errors import UsageError, on_main_process, run_script
from utils.fine_tuning import (
    ARGUMENTS,
    public_parameters,
    rehearse,
    settings_of,
    start,
    training_resolution,
)
from utils.hub import write_durably
from utils.latent_files import discard_copies
from utils.latents import private_losses
from utils.lora import LoraArguments
from utils.per_unit_gradients import PerUnitGradients
from utils.pipelines import load_pipeline
from utils.planning import describe, read_and_plan
from utils.reservations import check_room_for
from utils.runs import disk_errors_told
from utils.saliency import SaliencyArguments, candidates_of, scoring_of, summed_scores
from utils.saliency_plots import draw_saliency
from utils.selection import Saliency, conclude, keep_of
from utils.training import checksum


def selection_plan(
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
    own = replace(
        privacy,
        target_epsilon=epsilon,
        noise_multiplier=sigma,
        expected_batch_size=args.sampling_rate * num_units,
        max_grad_norm=sensitivity,
    )
    return replace(make_plan(num_units, own, 1, unit_column), purpose="selection")


def training_plan(
    privacy: PrivacyArguments, steps: int, selection: PrivacyPlan
) -> PrivacyPlan | None:
    """What the training that is to follow will spend; None if no budget for it was named.

    Raises:
        UsageError: see `make_plan`.
    """
    if privacy.target_epsilon is None and privacy.noise_multiplier is None:
        return None
    units, column = selection.num_units, selection.unit_column
    return make_plan(units, privacy, steps, column, (selection.event(),))


def select(
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    lora: LoraArguments,
    args: SaliencyArguments,
) -> None:
    """Score, release with noise, keep, and publish the selection in `training.output_dir`.

    Raises:
        UsageError: bad input of any kind, before an image is read where that is possible.
    """
    accelerator, _lock = start(training)
    randomness = secret_randomness(privacy)
    pipeline = load_pipeline(model.pretrained_model_name_or_path, model.revision)
    resolution = training_resolution(pipeline, data)
    pipeline.to(accelerator.device)
    if training.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    base = checksum(public_parameters(pipeline)).item()
    candidates = candidates_of(pipeline.unet, args.scope)
    scoring = scoring_of(list(candidates), args)
    keep = keep_of(candidates, scoring, lora)
    if args.mechanism == "random":  # reads nothing, costs nothing
        scores = np.random.default_rng(training.seed).random(len(candidates))
        saliency = conclude(scores, scoring, keep, args, base)
        if not privacy.dry_run:
            on_main_process(lambda: export(saliency, Path(training.output_dir)))
        accelerator.print(sentence(saliency, training))
        return

    # Plan the one release, and reserve it.
    for module in candidates.values():
        module.weight.requires_grad_(True)
    engine = PerUnitGradients(pipeline.unet)
    draws = privacy.noise_multiplicity
    unit_bytes = rehearse(pipeline, engine, draws, resolution, norms_only=True)

    def make(num_units: int) -> PrivacyPlan:
        unit = data.privacy_unit_column
        plan = selection_plan(num_units, privacy, args, scoring.sensitivity, unit)
        later = training_plan(privacy, training.max_train_steps, plan)  # refused now, if ever
        if later is None and args.top_ratio == "auto":
            raise UsageError("--top_ratio auto looks at the training plan: give --target_epsilon")
        if training.resume_from_checkpoint is None:
            both = [plan.event()] if later is None else later.events()
            check_room_for(Path(training.output_dir), privacy, both)
        return plan

    agreed = settings_of("selection", args, data, training) | {"base_model_checksum": base}
    private_set, plan, run = read_and_plan(accelerator, data, privacy, training, agreed, make)
    spent = account(plan.events(), plan.delta)
    later = training_plan(privacy, training.max_train_steps, plan)
    if run is None:
        nbytes = unit_bytes * min(training.train_batch_size, plan.num_units)
        accelerator.print(describe(private_set, plan, spent, engine, nbytes))
        if later is not None:
            accelerator.print("training, after it:", json.dumps(later.event(), indent=2))
        return
    keep = replace(keep, plan=later)
    accelerator.print(
        f"ranking {len(candidates)} matrices by {plan.num_units} private units: epsilon "
        f"{spent.add_or_remove_one:.3f} at delta {plan.delta:g} (noise multiplier "
        f"{plan.noise_multiplier:.3f})"
    )

    # Score every drawn unit, and release the sum with noise.
    latents = None
    if run.checkpoint is None:
        losses_of, latents = private_losses(
            pipeline, private_set, resolution, training, draws, randomness
        )
        batch = draw_poisson_batch(plan, randomness, accelerator)
        share = batch[accelerator.process_index :: accelerator.num_processes]
        total = summed_scores(
            accelerator, engine, losses_of, share, scoring, training.train_batch_size,
            show_progress=accelerator.is_main_process and args.sampling_rate == 1,
        )  # fmt: skip
        noisy = add_noise_once(total.to(accelerator.device), plan, randomness, accelerator).cpu()
        run.save(1, lambda: {"noisy_scores": noisy}, 1)  # paid for: never lose it
    else:
        noisy = run.saved_state()["noisy_scores"]

    # Everything from here on sees the noisy scores only.
    saliency = conclude(noisy.double().numpy(), scoring, keep, args, base, plan)
    saliency = replace(saliency, run=run.page.run, private=randomness.is_private)
    on_main_process(
        lambda: run.publish(lambda folder: export(saliency, folder), plan, randomness.is_private)
    )
    if training.discard_latents:
        discard_copies(run.output_dir, latents)
    accelerator.print(sentence(saliency, training))


def export(saliency: Saliency, folder: Path) -> None:
    with disk_errors_told(folder):
        draw_saliency(saliency, folder / "saliency.png")
        write_durably(folder / "saliency.json", saliency.to_json())


def sentence(saliency: Saliency, training: TrainingArguments) -> str:
    return (
        f"selected {len(saliency.selected)} of {len(saliency.candidates)} matrices: saliency.json "
        f"and saliency.png in {training.output_dir}"
    )


def main():
    model, data, privacy, training, _, lora, saliency = parse(
        *ARGUMENTS, LoraArguments, SaliencyArguments, description=__doc__
    )
    select(model, data, privacy, training, lora, saliency)


if __name__ == "__main__":
    run_script(main)
