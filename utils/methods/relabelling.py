"""The story of a relabelling: learn the classes privately, publish, and name the synthetic images.

Everything after the classifier is published sees the classifier only.

Shapes: M synthetic images.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import nn

from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.publishing import PublishSetArguments
from utils.arguments.relabelling import RelabellingArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.errors import UsageError, on_main_process
from utils.evaluation.trained_extractors import list_public_data
from utils.files import LABELLER
from utils.ledger.reservations import handing_back
from utils.ledger.runs import Run
from utils.methods.agreement import choose_kept, name_images, save_changes
from utils.methods.classes import number_rows
from utils.methods.election import Election, call_election, extract_candidates, join_ledger
from utils.methods.kept_sets import leave_set, prepare_repository
from utils.methods.labeller import (
    UNITS,
    UnitImages,
    build_losses,
    build_state,
    fit_whitening,
    read_images,
)
from utils.methods.naming import find_prompts
from utils.methods.planning import load_private_rows, preview, print_plan, reserve
from utils.methods.private_run import save_between
from utils.methods.rendered import choose_autoencoder, see_rendered
from utils.methods.stages import collect_settings, start
from utils.models.drawing import adopt_template
from utils.privacy.plan import PrivacyPlan
from utils.privacy.precision import name_precision
from utils.privacy.randomness import SecretRandomness, make_randomness
from utils.privacy.training import private_steps


def run_relabelling(
    args: RelabellingArguments,
    extracting: ExtractorArguments,
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    hub: PublishSetArguments,
) -> None:
    """Train the classifier, and leave the set under its labels in `training.output_dir`/set.

    Raises:
        UsageError: bad input of any kind, before an image is read where that is possible.
    """
    accelerator, _lock = start(training, data.train_data_dir, data.dataset_name, args.synthetic)
    randomness = make_randomness(privacy.secure_noise, privacy.debug_noise_seed)
    privacy = join_ledger(privacy, args.synthetic)
    data = adopt_template(data, model)
    public = on_main_process(lambda: list_public_data(extracting))
    found = load_private_rows(accelerator, data, training, public=public)
    election = call_election(args.synthetic, extracting, model, found, privacy, training)
    source = choose_autoencoder(args.autoencoder, election.paid.settings)
    extractor = see_rendered(election.extractor, source, accelerator.device)
    election, side = replace(election, extractor=extractor), extractor.resolution
    names, candidates = election.classes.names, election.candidates
    prompts = find_prompts(candidates, names, args)
    told = election.describe_circumstances(randomness, name_precision(accelerator))

    plan = plan_classifier(found.num_units, args, privacy, data.privacy_unit_column, election)
    if training.dry_run:
        preview(found, privacy, training, side, told, plan)
        print_plan(accelerator, plan)
        return
    prepare_repository(hub, privacy)
    about = election.describe()
    agreed = collect_settings("relabelling", args, found.data, training) | about
    private_set, run = reserve(found, privacy, training, side, agreed, told, plan)
    accelerator.print(announce(plan, run, election))

    # Learn the classes from every unit; every step is released with noise.
    with handing_back(run):
        seen = extract_candidates(candidates, election.extractor, accelerator)
        whiten = fit_whitening(seen)
        numbers = number_rows(private_set, found.data, election.classes, election.nearest)
        images = read_images(private_set, numbers, election.extractor, whiten, accelerator)
    weights = learn(accelerator, images, len(names), plan, run, training, randomness)

    # Everything from here on sees the noisy classifier only.
    named = name_images(candidates, whiten(seen) @ weights.T, names, prompts)
    tensors = asdict(whiten) | {"weights": weights}

    def export(folder: Path) -> None:
        spoken = {"classes": json.dumps(names), "about": json.dumps(about)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / LABELLER, spoken)
        save_changes(candidates, named, len(names), folder)

    on_main_process(lambda: run.publish(export, plan))
    kept = choose_kept(candidates, named, args, accelerator)
    leave_set(kept, {"relabelled": asdict(args) | about}, election.paid, plan, run, training, hub)


def learn(
    accelerator: Accelerator,
    images: UnitImages,
    num_classes: int,
    plan: PrivacyPlan,
    run: Run,
    training: TrainingArguments,
    randomness: SecretRandomness,
) -> torch.Tensor:
    """The weights of the classifier [classes, d + 1], after all private steps.

    Raises:
        Stopped: asked to by a signal, after a checkpoint.
    """
    head = nn.Linear(images.features.shape[1], num_classes, bias=False).to(accelerator.device)
    state = build_state(head, plan)
    state.recharged, state.behind = run.recharged, run.behind
    if run.checkpoint is None:
        run.save(0, state.state_dict, 1)  # from here on, it can be resumed
    else:
        state.load_state_dict(run.saved_state())
    losses = build_losses(head, images, randomness, accelerator)
    steps = private_steps(accelerator, state, losses, plan, randomness, UNITS)
    for _ in save_between(steps, accelerator, state, plan, run, training):
        pass
    return head.weight.detach().cpu()


def plan_classifier(
    num_units: int,
    args: RelabellingArguments,
    privacy: PrivacyArguments,
    unit_column: str | None,
    election: Election,
) -> PrivacyPlan:
    """Steps of DP-SGD on everyone: of the Gaussian mechanism.

    Raises:
        UsageError: see `make_plan`; or no budget was named.
    """
    alone = args.relabel_epsilon
    if alone is None and privacy.target_epsilon is None:
        raise UsageError("give --target_epsilon, for all; or --relabel_epsilon, for the classifier")
    return election.plan(
        alone,
        privacy,
        num_units=num_units,
        steps=args.relabel_steps,
        max_grad_norm=1.0,
        unit_column=unit_column,
        purpose="relabelling",
    )


def announce(plan: PrivacyPlan, run: Run, election: Election) -> str:
    """One sentence before the first step: of whom, and what all will cost."""
    return (
        f"a classifier of {election.classes.count} classes learns from {plan.num_units} private "
        f"units, to name {len(election.candidates.images)} images: with what those cost, "
        f"{election.describe_cost(plan, run.recharged)} (noise multiplier "
        f" {plan.noise_multiplier:.3f})"
    )
