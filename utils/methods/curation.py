"""The story of a curation: votes, noise, publish; then keep what won, or vary it and vote again.

Private Evolution's nearest-neighbour histogram (Lin et al. 2024). The candidates are public by the
time they are voted for: what they cost is composed with what the votes cost. What is kept is chosen
from the noisy votes alone.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file

from utils.arguments.curation import CurationArguments
from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.publishing import PublishSetArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.images import tile_images
from utils.errors import UsageError, on_main_process
from utils.evaluation.features import Extractor
from utils.evaluation.trained_extractors import list_public_data
from utils.files import VOTES
from utils.ledger.reservations import handing_back
from utils.ledger.runs import Run
from utils.methods.classes import number_rows, read_units
from utils.methods.election import (
    Candidates,
    Election,
    Vary,
    build_vary,
    call_election,
    extract_candidates,
    extract_pixels,
    join_ledger,
)
from utils.methods.kept_sets import leave_set, prepare_repository
from utils.methods.planning import load_private_rows, preview, print_plan, reserve
from utils.methods.stages import collect_settings, start
from utils.methods.votes import count_votes, keep_best, resample
from utils.models.drawing import adopt_template
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.plan import PrivacyPlan
from utils.privacy.precision import name_precision
from utils.privacy.randomness import make_randomness

SHOWN = 5  # rows of winners, and of losers, in votes.png


def run_curation(
    args: CurationArguments,
    extracting: ExtractorArguments,
    model: ModelArguments,
    data: DataArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    hub: PublishSetArguments,
) -> None:
    """Let the private images vote, and leave the winners in `training.output_dir`/set.

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
    check_keeping(args, election)
    vary = build_vary(election, args) if args.rounds > 1 else None

    plan = plan_votes(found.num_units, args, privacy, data.privacy_unit_column, election)
    side = election.extractor.resolution
    told = election.describe_circumstances(randomness, name_precision(accelerator))
    if training.dry_run:
        preview(found, privacy, training, side, told, plan)
        print_plan(accelerator, plan)
        return
    prepare_repository(hub, privacy)
    about, seed = election.describe() | {"seed": training.seed or 0}, training.seed or 0
    agreed = collect_settings("curation", args, found.data, training) | about
    private_set, run = reserve(found, privacy, training, side, agreed, told, plan)
    accelerator.print(announce(plan, run, election))

    # Count the votes of every unit, and release the counts with noise; once a round.
    with handing_back(run):
        numbers = number_rows(private_set, found.data, election.classes, election.nearest)

    def count(candidates: Candidates) -> torch.Tensor:
        units = read_units(private_set, numbers, side, accelerator)
        total = count_for(candidates, units, election.extractor, args, plan, accelerator)
        return add_noise_once(total, plan, randomness, accelerator).cpu() * plan.num_units

    candidates, votes = hold(election, vary, count, args, run, seed)

    # Everything from here on sees the noisy votes only.
    on_main_process(lambda: run.publish(lambda to: export(votes, candidates, to), plan))
    kept = candidates.select(keep(votes[-1], candidates, args, seed))
    did = {"curated": asdict(args) | about}
    leave_set(kept, did, election.paid, plan, run, training, hub)


def plan_votes(
    num_units: int,
    args: CurationArguments,
    privacy: PrivacyArguments,
    unit_column: str | None,
    election: Election,
) -> PrivacyPlan:
    """A noisy count a round, of the votes of all units: steps of the Gaussian mechanism.

    Raises:
        UsageError: see `make_plan`; or no budget was named.
    """
    alone = args.curation_epsilon
    if alone is None and privacy.target_epsilon is None:
        raise UsageError("give --target_epsilon, for all; or --curation_epsilon, for the votes")
    return election.plan(
        alone,
        privacy,
        num_units=num_units,
        steps=args.rounds,
        max_grad_norm=args.votes_per_row**0.5,
        unit_column=unit_column,
        purpose="curation",
    )


def announce(plan: PrivacyPlan, run: Run, election: Election) -> str:
    """One sentence before the votes: of whom, and what all will cost."""
    rounds = "" if plan.steps == 1 else f" in {plan.steps} rounds"
    return (
        f"{plan.num_units} private units vote for {len(election.candidates.images)} candidates"
        f"{rounds}: with what those cost, {election.describe_cost(plan, run.recharged)} (noise "
        f"multiplier {plan.noise_multiplier:.3f})"
    )


def check_keeping(args: CurationArguments, election: Election) -> None:
    """Raises: UsageError if more candidates are to be kept than there are."""
    there = len(election.candidates.images)
    if args.keep == "best" and (args.num_images or 0) > there:
        raise UsageError(
            f"--num_images {args.num_images}: there are {there} candidates; draw more of them, or "
            "--keep resample, which may keep one several times"
        )


def hold(
    election: Election,
    vary: Vary | None,
    count: Callable[[Candidates], torch.Tensor],
    args: CurationArguments,
    run: Run,
    seed: int,
) -> tuple[Candidates, list[torch.Tensor]]:
    """The candidates of the last round, and the noisy votes of every round, [M] each.

    A run that is resumed varies the winners of earlier rounds as before, and pays for no vote
    twice.
    """
    rounds = [election.candidates]

    def find_candidates(votes: list[torch.Tensor]) -> Candidates:
        """Those of the round after the one that the last votes are of."""
        for number in range(len(rounds), len(votes) + 1):
            last = votes[number - 1]
            rounds.append(evolve(vary, rounds[-1], last, args, seed + number))
        return rounds[len(votes)]

    votes = run.repeat("votes", args.rounds, lambda before: count(find_candidates(before)))
    return find_candidates(votes[:-1]), votes


def count_for(
    candidates: Candidates,
    units: Iterator[tuple[int, int, torch.Tensor]],
    extractor: Extractor,
    args: CurationArguments,
    plan: PrivacyPlan,
    accelerator: Accelerator,
) -> torch.Tensor:
    """The votes of this process's share of the units [M]. PRIVATE until noise is added."""

    features = extract_candidates(candidates, extractor, accelerator)
    classes = torch.from_numpy(candidates.classes)
    total = count_votes(
        units,
        partial(extract_pixels, extractor, accelerator=accelerator),
        features,
        classes,
        args.votes_per_row,
        plan.sensitivity,
    )
    return total.to(accelerator.device)


def keep(
    votes: torch.Tensor, candidates: Candidates, args: CurationArguments, seed: int
) -> list[int]:
    """The places of the candidates that stay, by the noisy votes alone."""
    count = args.num_images or math.ceil(len(candidates.images) / 2)
    noisy = votes.double().numpy()
    if args.keep == "best":
        return keep_best(noisy, candidates.classes, count)
    return resample(noisy, candidates.classes, count, seed)


def evolve(
    vary: Vary,
    candidates: Candidates,
    votes: torch.Tensor,
    args: CurationArguments,
    seed: int,
) -> Candidates:
    """As many candidates as before: the winners, at most half, and variations of them in turn."""
    count = len(candidates.images)
    winners = keep(votes, candidates, args, seed)[: math.ceil(count / 2)]
    origins = [winners[i % len(winners)] for i in range(count - len(winners))]
    parents = candidates.select(origins)
    prompts = [entry["text"] or "" for entry in parents.entries]
    varied = vary(parents.images, prompts, seed)
    together = candidates.select([*winners, *origins])
    images = [*together.images[: len(winners)], *varied]
    return replace(together, images=images)


def export(votes: list[torch.Tensor], candidates: Candidates, folder: Path) -> None:
    """Write votes.safetensors, the noisy counts [rounds, M], and votes.png: the candidates with the
    most votes in the last round, and, below, those with the fewest; a column a class."""
    save_file({"votes": torch.stack(votes).float().contiguous()}, folder / VOTES)
    last = votes[-1].double().numpy()
    num_classes = len(set(candidates.classes.tolist()))
    columns = min(num_classes, 10) if num_classes > 1 else 10
    shown = min(SHOWN, max(1, int(np.bincount(candidates.classes).min()) // 2))  # once each
    rows = [keep_best(sign * last, candidates.classes, shown * num_classes) for sign in (1, -1)]
    side = candidates.images[0].size
    blank = [Image.new("RGB", side, "white")] * columns
    sheet = []
    for places in rows:
        lines = [places[i : i + columns] for i in range(0, len(places), num_classes)]
        lines = lines if num_classes > 1 else [places]
        for line in lines:
            sheet += [candidates.images[i] for i in line] + blank[len(line) :]
        sheet += blank if places is rows[0] else []
    tile_images(sheet, columns).save(folder / "votes.png")
