"""What a run publishes beside its weights: the card's settings, samples, and the repository."""

import json
import sys
from dataclasses import asdict
from pathlib import Path

from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard
from PIL import Image
from yaml import YAMLError

from utils.arguments.publishing import PublishArguments
from utils.arguments.training import ModelArguments, PrivacyArguments, TrainingArguments
from utils.data.images import tile_images
from utils.errors import UsageError, on_main_process
from utils.evaluation.report import Page, write_report
from utils.fetching import fetch_file
from utils.files import (
    CARD,
    GRID,
    REPORT,
    SAMPLE_DIGESTS,
    SAMPLES,
    hash_file,
    private_folder,
    write_durably,
)
from utils.hub.upload import check_license, make_repo
from utils.methods.film import list_sheets, save_film
from utils.models.drawing import DrawingSettings
from utils.privacy.plan import PrivacyPlan, check_budget
from utils.sampling.batches import generate_all
from utils.sampling.shards import SET
from utils.sampling.synthetic_sets import read_privacy

NOT_PUSHED = "warning: --hub_model_id without --push_to_hub: nothing will be published"


def check_early(
    hub: PublishArguments, privacy: PrivacyArguments, training: TrainingArguments
) -> None:
    """What need not wait for the model: a budget is named; and, with `--push_to_hub`, the
    repository is created, unless it exists, before anything is spent.

    Raises:
        UsageError: there is no budget, or there are two; see `make_repo`; or the repository was not
            named, or the result must not be published.
    """
    check_budget(privacy.target_epsilon, privacy.noise_multiplier)
    if privacy.target_delta is None:
        raise UsageError(
            "give --target_delta, below 1/N, for N privacy units; 1 / (N ln N) is a common choice: "
            "1e-5 for 10,000 of them"
        )
    if hub.hub_model_id is not None and not hub.push_to_hub:
        on_main_process(lambda: print(NOT_PUSHED, file=sys.stderr))
    if not hub.push_to_hub or training.dry_run:
        return
    refuse_reproducible(privacy)
    if hub.hub_model_id is None:
        raise UsageError("--push_to_hub needs --hub_model_id, the repository to publish in")
    on_main_process(lambda: make_repo(hub.hub_model_id, hub))
    on_main_process(lambda: check_license(hub.hub_license))


def refuse_reproducible(privacy: PrivacyArguments) -> None:
    """Raises: UsageError if what would be published is stamped NOT PRIVATE."""
    if privacy.debug_noise_seed is not None:
        raise UsageError("--debug_noise_seed makes what is NOT PRIVATE: --push_to_hub is refused")


def choose_license(asked: str | None, base: ModelArguments) -> dict[str, str]:
    """`license` of the card, and what belongs to it: as asked, or else that of the base model's
    card, if it can be read."""
    if asked is not None:
        return {"license": asked}
    path, _ = fetch_file(base.pretrained_model_name_or_path, CARD, base.revision)
    try:
        found = ModelCard.load(path).data.to_dict() if path is not None else {}
    except (OSError, ValueError, YAMLError):
        return {}
    names = ("license", "license_name", "license_link")
    return {name: found[name] for name in names if isinstance(found.get(name), str)}


def describe_setup(
    training: TrainingArguments, plan: PrivacyPlan, settings: object, resolution: int
) -> dict[str, object]:
    """How it was trained, for the card: nothing about the data, and no seed."""
    rate, schedule = f"{training.learning_rate:g}", training.lr_scheduler
    setup = {
        "steps": plan.steps,
        "expected batch size, B": f"{plan.expected_batch_size:g} units",
        "noise multiplicity, K": f"{plan.noise_multiplicity} draws a unit",
        "clipping bound, C": f"{plan.max_grad_norm:g} ({plan.clipping})",
        "optimizer": f"{training.optimizer}, learning rate {rate}, {schedule} schedule",
        "noise levels": training.weighting_scheme or training.timestep_sampling or "as usual",
        "resolution": f"{resolution} pixels",
        "precision": "fp32" if training.mixed_precision == "no" else training.mixed_precision,
    }
    if training.ema_decay:
        setup["moving average of the weights"] = f"decay {training.ema_decay:g}"
    for name, value in asdict(settings).items():
        if isinstance(value, list):
            few = len(value) <= 12
            value = ", ".join(f"`{v}`" for v in value) if few else f"{len(value)} of them"
        if value is not None and value is not False:
            setup[name.replace("_", " ")] = value
    return setup


def save_samples(
    pipeline: DiffusionPipeline, training: TrainingArguments, settings: DrawingSettings
) -> None:
    """Generate images of the trained model into samples/, balanced over the prompts, and a grid;
    and note their digests, since only these may be published. Image i starts from the noise of a
    generator whose seed is i."""
    folder = Path(training.output_dir) / SAMPLES
    folder.mkdir(exist_ok=True)
    for path in set(folder.iterdir()) - set(list_sheets(folder)):  # of an earlier attempt
        path.unlink()
    prompts, count = training.validation_prompt, training.num_validation_images
    settings.use_scheduler(pipeline)
    chosen = [prompts[i % len(prompts)] for i in range(count)]
    images = generate_all(pipeline, chosen, 0, settings)
    for index, image in enumerate(images):
        image.save(folder / f"{index:04}.png")
    if images:
        columns = min(len(prompts), 10) if len(prompts) > 1 else 8
        tile_images(images, columns).save(folder / GRID)
    save_film(folder)
    digests = {path.name: hash_file(path) for path in sorted(folder.iterdir())}
    write_durably(private_folder(training.output_dir) / SAMPLE_DIGESTS, json.dumps(digests))


def report_set(run_folder: Path) -> None:
    """Write report.html of a stage's synthetic set: its privacy, and, if that holds, its images.

    Raises:
        UsageError: see `read_privacy`.
    """
    folder = run_folder / SET
    statement, results = read_privacy(str(folder), None)
    sheets = {}
    if results["epsilon"]["value"] is not None:
        sheets = {"synthetic": Image.open(folder / GRID)}
    write_report(Page(run_folder.name, results, statement, sheets), folder / REPORT)
