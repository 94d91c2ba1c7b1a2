"""The synthetic set that a vote, or a relabelling, leaves: written, reported, published."""

import json
from pathlib import Path

from accelerate import PartialState

from utils.arguments.publishing import PublishSetArguments
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.data.latent_files import discard_copies
from utils.errors import on_main_process
from utils.files import STATEMENT
from utils.hub.cards import Maker
from utils.hub.upload import make_repo
from utils.ledger.runs import Run
from utils.methods.election import Candidates
from utils.methods.publishing import refuse_reproducible, report_set
from utils.privacy.plan import PrivacyPlan
from utils.sampling.generation import encode_png
from utils.sampling.paid_sets import PaidSet
from utils.sampling.shards import SET
from utils.sampling.synthetic_sets import publish_images, write_set


def prepare_repository(hub: PublishSetArguments, privacy: PrivacyArguments) -> None:
    """Before anything is spent: may the set be published, and is there a repository for it?

    Raises:
        UsageError: see `refuse_reproducible` and `make_repo`.
    """
    if hub.push_to_hub:
        refuse_reproducible(privacy)
        on_main_process(lambda: make_repo(hub.hub_dataset_id, hub, "dataset"))


def leave_set(
    kept: Candidates,
    about: dict,
    paid: PaidSet,
    plan: PrivacyPlan,
    run: Run,
    training: TrainingArguments,
    hub: PublishSetArguments,
) -> None:
    """Write what was kept as a set, whose statement is published; report it, and publish it if
    asked to.

    Args:
        about: what was done to the candidates, for the set's settings. paid: what they were.

    Raises:
        UsageError: the disk does not take it; see `publish_images`.
    """
    settings, files = about | {"from": paid.settings}, plan_files(kept)
    on_main_process(lambda: write_set(run, plan.steps, settings=settings, **files))
    if training.discard_latents:
        discard_copies(run.output_dir, None)
    show_set(run.output_dir / SET, kept, paid, hub)


def plan_files(kept: Candidates) -> dict:
    """What `write_files` needs of what was kept: its entries, images and columns."""
    columns = min(len(set(kept.classes.tolist())), 10)
    images = ((place, encode_png(image)) for place, image in enumerate(kept.images))
    return {"entries": kept.entries, "images": images, "columns": columns if columns > 1 else 8}


def show_set(folder: Path, kept: Candidates, paid: PaidSet, hub: PublishSetArguments) -> None:
    """Report a set that is written, and publish it if asked to.

    Raises:
        UsageError: see `publish_images`.
    """
    state = PartialState()
    on_main_process(lambda: report_set(folder.parent))
    state.print(f"{len(kept.images)} images, grid.png, report.html in {folder}")
    if hub.push_to_hub and state.is_main_process:
        statement = json.loads((folder / STATEMENT).read_text())
        maker = Maker(*find_maker(paid.settings), statement)
        print(f"published {publish_images(folder, maker, hub.hub_dataset_id, hub)}")


def find_maker(settings: dict) -> tuple[str | None, str | None]:
    """The base model and the adapter that drew a set, or the set that it was chosen from, by its
    sampling.json; None for what is fitted to released means."""
    origin = find_origin(settings)
    return origin.get("pretrained_model_name_or_path"), origin.get("adapter")


def find_origin(settings: dict) -> dict:
    """The sampling.json of the set that a set was chosen from, and that from, by its own."""
    while "from" in settings:
        settings = settings["from"]
    return settings
