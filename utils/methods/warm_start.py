"""A start from synthetic images: ordinary training, before the first private step.

The images cost what their ledger says, and nothing more: all here is computed from them and from
the public model.
"""

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from utils.arguments.means import WarmStartArguments
from utils.arguments.methods import StageArguments
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.data.folders import TEXT
from utils.data.images import read_pixel_batches, read_synthetic, scale_to_unit_range
from utils.data.latents import choose_objective
from utils.data.rows import require_column
from utils.files import LEDGER, private_folder
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.ledger.charges import list_prior
from utils.ledger.public_sets import refuse_as_public
from utils.ledger.reservations import find_ledger
from utils.ledger.statement import list_doubts
from utils.memory import images_at_once
from utils.methods.saliency_file import find_paid_selection
from utils.methods.stages import Stage
from utils.models.denoising import denoising_loss
from utils.models.families import find_family
from utils.models.pipelines import trains_text
from utils.models.processes import read_process
from utils.models.text import AT_ONCE, embed_captions
from utils.privacy.training import start_as_main_process
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


class Earlier(NamedTuple):
    """What a run builds on: the events of the earlier stages, their runs, each once, and what is
    doubted of them (`statement.DOUBTS`)."""

    events: tuple[dict, ...]
    runs: tuple[str, ...]
    doubts: list[str]


def find_earlier_stages(
    stages: StageArguments,
    output_dir: Path,
    privacy: PrivacyArguments,
    base_checksum: int,
    base_statement: dict | None = None,
) -> Earlier:
    """The stages that a run builds on, as the ledger has them.

    Args:
        base_statement: of the run's own base model, if that is a private result.

    Raises:
        UsageError: the ledger did not pay for one; or a set comes from another private base; see
            `find_paid_selection`, `find_paid_set`.
    """
    ledger = find_ledger(output_dir, privacy)
    runs, doubts = find_paid_selection(stages.saliency_file, ledger, base_checksum), []
    for folder in stages.warm_start or []:
        if not stages.warm_start_is_public:
            paid = find_paid_set(folder, ledger, "--warm_start", OTHERWISE)
            paid.check_base(f"--warm_start {folder}", base_statement)
            runs += paid.runs
            doubts += list_doubts(paid.statement)
        else:
            refuse_as_public("--warm_start_is_public: --warm_start", folder)
    return Earlier(*list_prior(ledger.records(), runs), doubts)


def warm_up(
    stage: Stage,
    engine: PerUnitGradients,
    adapter: dict[str, torch.Tensor],
    args: WarmStartArguments,
    training: TrainingArguments,
) -> None:
    """Fit the trained weights to the set, by ordinary training for the objective of the private
    steps; losses are shown. No more images pass the model at once than in a private step, and each
    process takes its share of a batch: both change speed and memory only.

    Args:
        adapter: see `collect_adapter_tensors`.

    Raises:
        UsageError: the set cannot be read, or has no prompts.
    """
    accelerator, examples = stage.accelerator, Examples(stage, args.warm_start, training)
    start_as_main_process(adapter.values())
    draws = torch.Generator().manual_seed(training.seed or 0)
    optimizer = torch.optim.AdamW(engine.parameters, args.warm_start_learning_rate)
    steps, count = args.warm_start_steps, args.warm_start_batch_size
    schedule = get_scheduler(
        "cosine", optimizer, num_warmup_steps=steps // 20, num_training_steps=steps
    )
    share = math.ceil(count / accelerator.num_processes)
    parts = torch.arange(count).split(min(training.train_batch_size * engine.num_draws, share))
    bar = tqdm(range(steps), "warm start", disable=not accelerator.is_main_process)
    for step in bar:
        rows = torch.randint(len(examples.captions), (count,), generator=draws)
        quantiles = torch.rand(count, generator=draws)
        noise = torch.randn(count, *examples.latents.shape[1:], generator=draws)
        for part in parts[accelerator.process_index :: accelerator.num_processes]:
            losses = examples.losses(rows[part], noise[part], quantiles[part])
            (losses.sum() / count).backward()
        _add_up_gradients(accelerator, engine)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 and accelerator.is_main_process:  # another may have had no part
            bar.set_postfix(loss=f"{losses.mean().item():.4f}")


class Examples:
    """The images of synthetic sets, encoded, and their denoising losses.

    Attributes:
        latents: [N, channels, r, r]. captions: of each.

    Raises:
        UsageError: a set cannot be read, or has no prompts.
    """

    def __init__(self, stage: Stage, folders: list[str], training: TrainingArguments):
        self._stage, self._family = stage, find_family(stage.pipeline)
        self._objective = about = choose_objective(stage.pipeline, training, 1)
        scheduler = stage.pipeline.scheduler
        self._process = read_process(scheduler, about.snr_gamma, about.weighting)
        sets = [_read_set(stage, folder) for folder in folders]
        self.latents = torch.cat([latents for latents, _ in sets])
        self.captions = [caption for _, of_set in sets for caption in of_set]
        distinct, self._text = sorted(set(self.captions)), None
        if not trains_text(stage.pipeline):
            self._text = _embed(stage, distinct)
        number = {caption: i for i, caption in enumerate(distinct)}
        self._caption_of_row = torch.tensor([number[caption] for caption in self.captions])

    def losses(
        self, rows: torch.Tensor, noise: torch.Tensor, quantiles: torch.Tensor
    ) -> torch.Tensor:
        """Of the images `rows` [n], with noise [n, channels, r, r], at noise levels of which these
        quantiles [n] are spread as the objective has them: [n]."""
        device, quantiles = self._stage.accelerator.device, self._objective.spread(quantiles)
        clean, noise, quantiles = (t.to(device) for t in (self.latents[rows], noise, quantiles))
        # On a CPU, PyTorch 2.13 crashes in the backward pass of a GroupNorm that trains and whose
        # input, in channels_last, asks for no gradient.
        clean.requires_grad_()
        with self._stage.accelerator.autocast():
            if self._text is None:
                captions = [self.captions[row] for row in rows.tolist()]
                shown = self._family.encode_text(captions, self._stage.resolution)
            else:
                which = self._caption_of_row[rows]
                shown = {name: values[which].to(device) for name, values in self._text.items()}
            predictor = self._family.predictor
            return denoising_loss(predictor, self._process, clean, shown, noise, quantiles)


@torch.no_grad()
def _read_set(stage: Stage, folder: str) -> tuple[torch.Tensor, list[str]]:
    """The latents of a synthetic set [N, channels, r, r], and its prompts."""
    images = read_synthetic(folder, "--warm_start")
    require_column(images.rows, TEXT, f"--warm_start {folder}:")
    family, found, count = find_family(stage.pipeline), [], images_at_once(stage.resolution)
    quiet = not stage.accelerator.is_main_process
    with tqdm(total=len(images), desc=f"encoding {folder}", leave=False, disable=quiet) as bar:
        for pixels in read_pixel_batches(images, stage.resolution, count):
            found.append(family.encode_images(scale_to_unit_range(pixels.to(family.device))).cpu())
            bar.update(len(pixels))
    return torch.cat(found), [text or "" for text in images.rows[TEXT]]


def _embed(stage: Stage, captions: list[str]) -> dict[str, torch.Tensor]:
    """`embed_captions`, of which no more than a pass is ever on the device: [n, ...], on the
    processor, since a set may have as many captions as images."""
    groups = [captions[start : start + AT_ONCE] for start in range(0, len(captions), AT_ONCE)]
    found = []
    for group in groups:
        text = embed_captions(stage.pipeline, group, stage.resolution)
        found.append({name: values.cpu() for name, values in text.items()})
    return {name: torch.cat([text[name] for text in found]) for name in found[0]}


def _add_up_gradients(accelerator: Accelerator, engine: PerUnitGradients) -> None:
    """Give every process the sum of all processes' gradients."""
    if accelerator.num_processes == 1:
        return
    own = [torch.zeros_like(p) if p.grad is None else p.grad for p in engine.parameters]
    flat = torch.cat([gradient.flatten() for gradient in own])
    engine.assign(accelerator.reduce(flat, reduction="sum"))
