"""The story of a relabelling: learn the classes privately, publish, and name the synthetic images.

Everything after the classifier is published sees the classifier only.

Shapes: M synthetic images.
"""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
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
from utils.data.images import tile_images
from utils.errors import UsageError, on_main_process
from utils.files import LABELLER
from utils.ledger.runs import Run
from utils.methods.classes import number_rows
from utils.methods.election import (
    Candidates,
    Election,
    call_election,
    extract_candidates,
    join_ledger,
)
from utils.methods.kept_sets import leave_set, prepare_repository
from utils.methods.labeller import (
    UNITS,
    UnitImages,
    build_losses,
    build_state,
    fit_whitening,
    read_images,
)
from utils.methods.planning import load_private_rows, preview, print_plan, reserve
from utils.methods.private_run import save_between
from utils.methods.rendered import see_rendered
from utils.methods.stages import collect_settings, start
from utils.methods.votes import keep_best
from utils.models.drawing import adopt_template
from utils.privacy.accounting import account
from utils.privacy.plan import PrivacyPlan
from utils.privacy.randomness import SecretRandomness, make_randomness
from utils.privacy.training import private_steps

SHOWN = 5  # rows of relabelled.png


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
    accelerator, _lock = start(training)
    randomness = make_randomness(privacy.secure_noise, privacy.debug_noise_seed)
    privacy = join_ledger(privacy, args.synthetic)
    found = load_private_rows(accelerator, adopt_template(data, model), training)
    election = call_election(args.synthetic, extracting, model, found, privacy, training)
    extractor = see_rendered(election.extractor, args.autoencoder, accelerator.device)
    election = replace(election, extractor=extractor)
    prompts = find_prompts(election, args)

    def plan_for(num_units: int) -> PrivacyPlan:
        return plan_classifier(num_units, args, privacy, data.privacy_unit_column, election)

    side = election.extractor.resolution
    if training.dry_run:
        plan, _ = preview(found, privacy, training, side, plan_for)
        return print_plan(accelerator, plan)
    prepare_repository(hub, privacy)
    about = election.describe()
    agreed = collect_settings("relabelling", args, found.data, training) | about
    private_set, plan, run = reserve(found, privacy, training, side, agreed, plan_for)
    accelerator.print(announce(plan, election))
    seen = extract_candidates(election.candidates, election.extractor, accelerator.is_main_process)
    whiten = fit_whitening(seen)

    # Learn the classes from every unit; every step is released with noise.
    numbers = number_rows(private_set, found.data, election.classes, election.nearest)
    images = read_images(private_set, numbers, election.extractor, whiten, accelerator)
    count = election.classes.count
    weights = learn(accelerator, images, count, plan, run, training, randomness)

    # Everything from here on sees the noisy classifier only.
    scores = whiten(seen) @ weights.T
    sure, found_classes = scores.softmax(1).max(1)
    named = rename(election.candidates, found_classes, election.classes.names, prompts)
    told = election.describe_circumstances(randomness)
    tensors = asdict(whiten) | {"weights": weights}

    def export(folder: Path) -> None:
        spoken = {"classes": json.dumps(election.classes.names), "about": json.dumps(about)}
        save_file({k: v.contiguous() for k, v in tensors.items()}, folder / LABELLER, spoken)
        draw_changes(election.candidates, named, sure, count).save(folder / "relabelled.png")

    on_main_process(lambda: run.publish(export, plan, told))
    kept = keep(election.candidates, named, sure.numpy(), args, accelerator)
    did = {"relabelled": asdict(args) | about}
    leave_set(kept, did, election.paid, plan, run, training, hub)


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
    state.recharged = run.recharged
    if run.checkpoint is None:
        run.save(0, state.state_dict, 1)  # from here on, it can be resumed
    else:
        state.load_state_dict(run.saved_state())
    losses = build_losses(head, images, randomness, accelerator)
    steps = private_steps(accelerator, state, losses, plan, randomness, UNITS)
    for _ in save_between(steps, accelerator, state, plan, run, training):
        pass
    return head.weight.detach().cpu()


def find_prompts(election: Election, args: RelabellingArguments) -> list[str]:
    """The prompt of each class.

    Raises:
        UsageError: the set or the private rows have no labels; or a class has several prompts, so
            that nobody knows what to call an image that comes to it; or fewer images than to keep.
    """
    candidates, names = election.candidates, election.classes.names
    if not names:
        raise UsageError(
            "a classifier needs labels: give --label_column, and a --synthetic set whose images "
            "have labels, too, of two classes at least"
        )
    texts = {name: {e["text"] for e in candidates.entries if e["label"] == name} for name in names}
    several = [name for name in names if len(texts[name]) > 1]
    if several:
        raise UsageError(
            f"--synthetic {args.synthetic}: the images of class {several[0]} have different "
            "prompts, so an image that comes to it cannot be told which is its own: draw the set "
            "with one prompt a class"
        )
    if (args.num_images or 0) > len(candidates.images):
        raise UsageError(
            f"--num_images {args.num_images}: there are {len(candidates.images)} images"
        )
    return [texts[name].pop() for name in names]


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


def announce(plan: PrivacyPlan, election: Election) -> str:
    """One sentence before the first step: of whom, and what all will cost."""
    spent = account(plan.events(), plan.delta)
    return (
        f"a classifier of {election.classes.count} classes learns from {plan.num_units} private "
        f"units, to name {len(election.candidates.images)} images: epsilon "
        f"{spent.add_or_remove_one:.3f} at delta {plan.delta:g} with what those cost (noise "
        f"multiplier {plan.noise_multiplier:.3f})"
    )


def rename(
    candidates: Candidates, found: torch.Tensor, names: list[str], prompts: list[str]
) -> Candidates:
    """Each image under the class that was found for it [M], and its prompt."""
    entries = [
        entry | {"text": prompts[number], "label": names[number]}
        for entry, number in zip(candidates.entries, found.tolist(), strict=True)
    ]
    return Candidates(candidates.images, entries, found.numpy())


def keep(
    before: Candidates,
    after: Candidates,
    sure: np.ndarray,
    args: RelabellingArguments,
    accelerator: Accelerator,
) -> Candidates:
    """The images that are left under their new names: the surest [M] of every class, as they were
    drawn one after another; the classes take turns."""
    changed = int((after.classes != before.classes).sum())
    accelerator.print(f"{changed} of {len(sure)} images got another label")
    if args.only_agreed:
        agreed = find_agreed(before.classes, after.classes)
        after, sure = after.select(agreed), sure[agreed]
        accelerator.print(f"{len(agreed)} images are left, about which both agree")
    left = after.select(sorted(keep_best(sure, after.classes, args.num_images or len(sure))))
    count = len(left.images)
    if args.equal_classes:
        sizes = np.unique(left.classes, return_counts=True)[1]
        count = len(sizes) * int(sizes.min())
        accelerator.print(f"{count} images are left, {sizes.min()} of each of {len(sizes)} classes")
    as_drawn = -np.arange(len(left.images))  # so that the sheet does not show the surest
    return left.select(keep_best(as_drawn, left.classes, count))


def find_agreed(before: np.ndarray, after: np.ndarray) -> list[int]:
    """Images whose class [M] stays; and those of a new class that no image of it stays in."""
    agree = before == after
    lost = ~np.isin(after, after[agree])
    return (agree | lost).nonzero()[0].tolist()


def draw_changes(
    before: Candidates, after: Candidates, sure: torch.Tensor, num_classes: int
) -> Image.Image:
    """Images that changed their class, the surest [M] first; a column for each that they came
    to."""
    changed = (before.classes != after.classes).nonzero()[0]
    order = changed[(-sure.numpy()[changed]).argsort(kind="stable")]
    blank = Image.new("RGB", before.images[0].size, "white")
    columns = [
        [before.images[i] for i in order[after.classes[order] == number][:SHOWN].tolist()]
        for number in range(num_classes)
    ]
    cells = [c[row] if row < len(c) else blank for row in range(SHOWN) for c in columns]
    return tile_images(cells, len(columns))
