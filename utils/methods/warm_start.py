"""A start from synthetic images: ordinary training, before the first private step.

The images cost what their ledger says, and nothing more: all here is computed from them and from
the public model.
"""

from dataclasses import replace
from pathlib import Path

import torch
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from utils.arguments.means import WarmStartArguments
from utils.arguments.methods import StageArguments
from utils.arguments.training import PrivacyArguments
from utils.data.images import ImageRows, keep_readable, read_pixel_batches, scale_to_unit_range
from utils.data.latent_files import encode_images
from utils.data.rows import load_split, require_column
from utils.errors import UsageError
from utils.files import LEDGER, private_folder
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.charges import list_charged_events, select_run
from utils.ledger.checks import check_statement
from utils.ledger.ledger import Ledger
from utils.ledger.reservations import find_ledger
from utils.ledger.verification import fetch_statement
from utils.methods.saliency_file import find_paid_selection
from utils.methods.stages import Stage
from utils.models.denoising import denoising_loss, encode_text, tokenize
from utils.models.pipelines import trains_text
from utils.models.processes import read_process
from utils.sampling.synthetic_sets import SET, hash_set

TEXT = "text"  # the column of a synthetic set's prompts


def join_ledger(privacy: PrivacyArguments, stages: StageArguments) -> PrivacyArguments:
    """`privacy` with the ledger of the stages that the run builds on, unless it names one."""
    if privacy.privacy_ledger is not None:
        return privacy
    beside = [Path(stages.saliency_file).parent] if stages.saliency_file is not None else []
    if stages.warm_start is not None and not stages.warm_start_is_public:
        beside.append(Path(stages.warm_start).resolve().parent)
    for folder in beside:
        ledger = private_folder(folder) / LEDGER
        if ledger.exists():  # a random choice has none
            return replace(privacy, privacy_ledger=str(ledger))
    return privacy


def find_earlier_stages(
    stages: StageArguments, output_dir: Path, privacy: PrivacyArguments, base_checksum: int
) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The events of the stages that a run builds on, and their runs, as the ledger has them.

    Raises:
        UsageError: the ledger did not pay for one; see `find_paid_selection`, `find_paid_set`.
    """
    ledger = find_ledger(output_dir, privacy)
    runs = find_paid_selection(stages.saliency_file, ledger, base_checksum)
    if stages.warm_start is not None:
        if not stages.warm_start_is_public:
            runs += find_paid_set(stages.warm_start, ledger)
        elif fetch_statement(stages.warm_start)[0] is not None:
            raise UsageError(
                f"--warm_start {stages.warm_start} has a privacy.json: it is a private result, "
                "which --warm_start_is_public cannot make free"
            )
    if not runs:
        return (), ()
    return tuple(list_charged_events(ledger.records(), list(runs))), runs


def find_paid_set(folder: str, ledger: Ledger) -> tuple[str, ...]:
    """The run that a synthetic set came from, and those that it builds on.

    Raises:
        UsageError: there is no such folder; its statement is missing or does not hold; or the
            ledger does not know these very images.
    """
    if not Path(folder).is_dir():
        raise UsageError(f"--warm_start {folder} is not a folder")
    statement, _ = fetch_statement(folder)
    if statement is None:
        raise UsageError(
            f"--warm_start {folder} has no privacy.json, so nobody can tell what it gives away; if "
            "its images are public, give --warm_start_is_public"
        )
    problems = check_statement(statement) if statement.get("private") is not False else []
    if problems:
        raise UsageError(f"--warm_start {folder}: {'; '.join(problems)}")
    records, digest = ledger.records(), hash_set(Path(folder))
    found = [r for r in records if r["kind"] == "wrote" and r["files"].get(SET) == digest]
    if not found:
        raise UsageError(
            f"the ledger {ledger.path} did not pay for --warm_start {folder}, or its images are "
            "not those that were drawn: name the ledger that it is in, or make it anew"
        )
    run = found[-1]["run"]
    terms = [r for r in select_run(records, run) if r["kind"] == "reserve"][-1]
    return (*terms["builds_on"], run)


def warm_up(
    stage: Stage, engine: PerUnitGradients, args: WarmStartArguments, seed: int | None
) -> None:
    """Fit the trained weights to the set, by ordinary training; losses are shown.

    Raises:
        UsageError: the set cannot be read, or has no prompts.
    """
    pipeline, accelerator = stage.pipeline, stage.accelerator
    latents, captions = read_set(stage, args.warm_start)
    distinct = sorted(set(captions))
    ids = tokenize(pipeline, distinct)
    caption_of_row = torch.tensor([distinct.index(caption) for caption in captions])
    draws = torch.Generator().manual_seed(seed or 0)
    optimizer = torch.optim.AdamW(engine.parameters, args.warm_start_learning_rate)
    steps, process = args.warm_start_steps, read_process(pipeline.scheduler)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps
    )
    bar = tqdm(range(steps), "warm start", disable=not accelerator.is_main_process)
    for step in bar:
        rows = torch.randint(len(latents), (args.warm_start_batch_size,), generator=draws)
        timesteps = torch.randint(process.num_timesteps, (len(rows),), generator=draws)
        noise = torch.randn(latents[rows].shape, generator=draws)
        batch = (t.to(accelerator.device) for t in (latents[rows], noise, timesteps))
        clean, noise, timesteps = batch
        with accelerator.autocast():
            with torch.set_grad_enabled(trains_text(pipeline)):
                text = encode_text(pipeline, ids[caption_of_row[rows]], stage.resolution)
            losses = denoising_loss(pipeline.unet, process, clean, text, noise, timesteps)
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{losses.mean().item():.4f}")


@torch.no_grad()
def read_set(stage: Stage, folder: str) -> tuple[torch.Tensor, list[str]]:
    """The latents of a synthetic set [N, channels, r, r], and its prompts."""
    images, _ = keep_readable(ImageRows(load_split(None, None, folder, "train")))
    require_column(images.rows, TEXT, f"--warm_start {folder}:")
    device, found = stage.accelerator.device, []
    for pixels in read_pixel_batches(images, stage.resolution, 64):
        found.append(encode_images(stage.pipeline, scale_to_unit_range(pixels.to(device))).cpu())
    return torch.cat(found), [text or "" for text in images.rows[TEXT]]
