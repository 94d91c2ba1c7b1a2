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
from utils.data.folders import TEXT
from utils.data.images import read_pixel_batches, read_synthetic, scale_to_unit_range
from utils.data.rows import require_column
from utils.files import LEDGER, private_folder
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.charges import list_prior
from utils.ledger.public_sets import refuse_as_public
from utils.ledger.reservations import find_ledger
from utils.methods.saliency_file import find_paid_selection
from utils.methods.stages import Stage
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.pipelines import trains_text
from utils.models.processes import read_process
from utils.models.text import embed_captions
from utils.sampling.paid_sets import find_paid_set, find_set_ledger

OTHERWISE = "if its images are public, give --warm_start_is_public"


def join_ledger(privacy: PrivacyArguments, stages: StageArguments) -> PrivacyArguments:
    """`privacy` with the ledger of the stages that the run builds on, unless it names one."""
    if privacy.privacy_ledger is not None:
        return privacy
    found = []
    if stages.saliency_file is not None:
        found.append(private_folder(Path(stages.saliency_file).parent) / LEDGER)
    if not stages.warm_start_is_public:
        found += [find_set_ledger(folder) for folder in stages.warm_start or []]
    for ledger in found:
        if ledger is not None and ledger.exists():  # a random choice, or a public set, has none
            return replace(privacy, privacy_ledger=str(ledger))
    return privacy


def find_earlier_stages(
    stages: StageArguments,
    output_dir: Path,
    privacy: PrivacyArguments,
    base_checksum: int,
    base_statement: dict | None = None,
) -> tuple[tuple[dict, ...], tuple[str, ...]]:
    """The events of the stages that a run builds on, and their runs, as the ledger has them.

    Args:
        base_statement: of the run's own base model, if that is a private result.

    Raises:
        UsageError: the ledger did not pay for one; or a set comes from another private base; see
            `find_paid_selection`, `find_paid_set`.
    """
    ledger = find_ledger(output_dir, privacy)
    runs = find_paid_selection(stages.saliency_file, ledger, base_checksum)
    for folder in stages.warm_start or []:
        if not stages.warm_start_is_public:
            paid = find_paid_set(folder, ledger, "--warm_start", OTHERWISE)
            paid.check_base(f"--warm_start {folder}", base_statement)
            runs += paid.runs
        else:
            refuse_as_public("--warm_start_is_public: --warm_start", folder)
    return list_prior(ledger.records(), runs)


def warm_up(
    stage: Stage, engine: PerUnitGradients, args: WarmStartArguments, seed: int | None
) -> None:
    """Fit the trained weights to the set, by ordinary training; losses are shown.

    Raises:
        UsageError: the set cannot be read, or has no prompts.
    """
    pipeline, accelerator = stage.pipeline, stage.accelerator
    family, side = find_family(pipeline), stage.resolution
    sets = [read_set(stage, folder) for folder in args.warm_start]
    latents = torch.cat([latents for latents, _ in sets])
    captions = [caption for _, of_set in sets for caption in of_set]
    distinct = sorted(set(captions))
    text = None if trains_text(pipeline) else embed_captions(pipeline, distinct, side)
    number = {caption: i for i, caption in enumerate(distinct)}
    caption_of_row = torch.tensor([number[caption] for caption in captions])
    draws = torch.Generator().manual_seed(seed or 0)
    optimizer = torch.optim.AdamW(engine.parameters, args.warm_start_learning_rate)
    steps, process = args.warm_start_steps, read_process(pipeline.scheduler)
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps
    )
    bar = tqdm(range(steps), "warm start", disable=not accelerator.is_main_process)
    for step in bar:
        rows = torch.randint(len(latents), (args.warm_start_batch_size,), generator=draws)
        quantiles = torch.rand(len(rows), generator=draws)
        noise = torch.randn(latents[rows].shape, generator=draws)
        batch = (t.to(accelerator.device) for t in (latents[rows], noise, quantiles))
        clean, noise, quantiles = batch
        # On a CPU, PyTorch 2.13 crashes in the backward pass of a GroupNorm that trains and whose
        # input, in channels_last, asks for no gradient.
        clean.requires_grad_()
        with accelerator.autocast():
            if text is None:
                shown = family.encode_text([captions[row] for row in rows.tolist()], side)
            else:
                shown = {name: values[caption_of_row[rows]] for name, values in text.items()}
            losses = denoising_loss(family.predictor, process, clean, shown, noise, quantiles)
        losses.mean().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{losses.mean().item():.4f}")


@torch.no_grad()
def read_set(stage: Stage, folder: str) -> tuple[torch.Tensor, list[str]]:
    """The latents of a synthetic set [N, channels, r, r], and its prompts."""
    images = read_synthetic(folder, "--warm_start")
    require_column(images.rows, TEXT, f"--warm_start {folder}:")
    family, found = find_family(stage.pipeline), []
    for pixels in read_pixel_batches(images, stage.resolution, 64):
        found.append(family.encode_images(scale_to_unit_range(pixels.to(family.device))).cpu())
    return torch.cat(found), [text or "" for text in images.rows[TEXT]]
