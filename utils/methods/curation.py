"""The story of a curation: votes, noise, publish; then keep what won, or vary it and vote again.

Private Evolution's nearest-neighbour histogram (Lin et al. 2024). The candidates are public by the
time they are voted for: what they cost is composed with what the votes cost. What is kept is chosen
from the noisy votes alone.
"""

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from utils.arguments.curation import CurationArguments
from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.publishing import PublishSetArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.images import crop_to_pixels, tile_images
from utils.data.latent_files import discard_copies
from utils.errors import UsageError, on_main_process
from utils.evaluation.features import BATCH, Extractor
from utils.files import STATEMENT, VOTES
from utils.hub.cards import Maker
from utils.hub.upload import make_repo
from utils.ledger.runs import Run
from utils.ledger.statement import Circumstances
from utils.methods.classes import number_rows, read_units
from utils.methods.election import Candidates, Election, call_election, join_ledger
from utils.methods.planning import load_private_rows, preview, print_plan, reserve
from utils.methods.publishing import refuse_reproducible, report_set
from utils.methods.stages import collect_settings, start
from utils.methods.votes import count_votes, keep_best, resample
from utils.models.drawing import adopt_template
from utils.privacy.accounting import account
from utils.privacy.dp_sgd import add_noise_once
from utils.privacy.plan import PrivacyPlan, make_plan
from utils.privacy.randomness import make_randomness
from utils.sampling.generation import encode_png
from utils.sampling.paid_sets import PaidSet
from utils.sampling.shards import SET
from utils.sampling.synthetic_sets import publish_images, write_set

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
    accelerator, _lock = start(training)
    randomness = make_randomness(privacy.secure_noise, privacy.debug_noise_seed)
    privacy = join_ledger(privacy, args)
    found = load_private_rows(accelerator, adopt_template(data, model), training)
    election = call_election(args, extracting, model, found, privacy, training)

    def plan_for(num_units: int) -> PrivacyPlan:
        return plan_votes(num_units, args, privacy, data.privacy_unit_column, election)

    side = election.extractor.resolution
    if training.dry_run:
        plan, _ = preview(found, privacy, training, side, plan_for)
        print_plan(accelerator, plan)
        return
    if hub.push_to_hub:
        refuse_reproducible(privacy)
        on_main_process(lambda: make_repo(hub.hub_dataset_id, hub, "dataset"))
    about, seed = election.describe() | {"seed": training.seed or 0}, training.seed or 0
    agreed = collect_settings("curation", args, found.data, training) | about
    private_set, plan, run = reserve(found, privacy, training, side, agreed, plan_for)
    accelerator.print(announce(plan, len(election.candidates.images)))

    # Count the votes of every unit, and release the counts with noise; once a round.
    numbers = number_rows(private_set, found.data, election.classes, election.nearest)

    def count(candidates: Candidates) -> torch.Tensor:
        units = read_units(private_set, numbers, side, accelerator)
        total = count_for(candidates, units, election.extractor, args, plan, accelerator)
        return add_noise_once(total, plan, randomness, accelerator).cpu() * plan.num_units

    candidates, votes = hold(election, count, args, run, seed)

    # Everything from here on sees the noisy votes only.
    base = None if election.paid.statement is None else election.paid.statement.get("base")
    told = Circumstances(randomness.is_private, randomness.source, base=base)
    on_main_process(lambda: run.publish(lambda to: export(votes, candidates, to), plan, told))
    kept = candidates.select(keep(votes[-1], candidates, args, seed))
    settings = {"curated": asdict(args) | about, "from": election.paid.settings}
    on_main_process(lambda: leave_set(kept, settings, plan, run))
    on_main_process(lambda: report_set(run.output_dir))
    if training.discard_latents:
        discard_copies(run.output_dir, None)
    accelerator.print(f"{len(kept.images)} images, grid.png, report.html in {run.output_dir / SET}")
    if hub.push_to_hub and accelerator.is_main_process:
        print(f"published {publish(run.output_dir, election.paid, hub)}")


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
    plan = make_plan(
        target_epsilon=privacy.target_epsilon if alone is None else alone,
        num_units=num_units,
        expected_batch_size=num_units,
        steps=args.rounds,
        max_grad_norm=args.votes_per_row**0.5,
        delta=privacy.target_delta,
        unit_column=unit_column,
        purpose="curation",
        prior=election.prior if alone is None else (),
    )
    return replace(plan, prior=election.prior, builds_on=election.builds_on)


def announce(plan: PrivacyPlan, num_candidates: int) -> str:
    """One sentence before the votes: of whom, and what all will cost."""
    spent = account(plan.events(), plan.delta)
    rounds = "" if plan.steps == 1 else f" in {plan.steps} rounds"
    return (
        f"{plan.num_units} private units vote for {num_candidates} candidates{rounds}: epsilon "
        f"{spent.add_or_remove_one:.3f} at delta {plan.delta:g} with what those cost (noise "
        f"multiplier {plan.noise_multiplier:.3f})"
    )


def hold(
    election: Election,
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
            rounds.append(evolve(election, rounds[-1], last, args, seed + number))
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

    def network(pixels: torch.Tensor) -> torch.Tensor:
        return extractor.network(pixels.to(accelerator.device))[0].float().cpu()

    side, features = extractor.resolution, []
    places = torch.arange(len(candidates.images)).split(BATCH)
    for part in tqdm(places, "features of candidates", disable=not accelerator.is_main_process):
        pixels = torch.stack([crop_to_pixels(candidates.images[i], side) for i in part.tolist()])
        with torch.no_grad():
            features.append(network(pixels))
    classes = torch.from_numpy(candidates.classes)
    total = count_votes(
        units, network, torch.cat(features), classes, args.votes_per_row, plan.sensitivity
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
    election: Election,
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
    varied = election.vary(parents.images, prompts, seed)
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
    rows = [keep_best(sign * last, candidates.classes, SHOWN * num_classes) for sign in (1, -1)]
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


def leave_set(kept: Candidates, settings: dict, plan: PrivacyPlan, run: Run) -> None:
    """Write the winners as a set. Raises: UsageError if the disk does not take it."""
    columns = min(len(set(kept.classes.tolist())), 10)
    images = ((place, encode_png(image)) for place, image in enumerate(kept.images))
    write_set(run, plan.steps, kept.entries, images, settings, columns if columns > 1 else 8)


def publish(output_dir: Path, paid: PaidSet, hub: PublishSetArguments) -> str:
    """Upload the set; returns its address. Raises: UsageError, see `publish_images`."""
    statement = json.loads((output_dir / STATEMENT).read_text())
    base, adapter = (paid.settings.get(k) for k in ("pretrained_model_name_or_path", "adapter"))
    return publish_images(
        output_dir / SET, Maker(base, adapter, statement), hub.hub_dataset_id, hub
    )
