"""What a vote, or a relabelling, needs first: candidates, what they cost, their classes."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object
from datasets import Dataset
from PIL import Image
from tqdm import tqdm

from utils.arguments.curation import CurationArguments
from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.training import (
    DataArguments,
    ModelArguments,
    PrivacyArguments,
    TrainingArguments,
)
from utils.data.diagnostics import warn_of_other_classes
from utils.data.images import ImageRows, crop_to_pixels, read_synthetic
from utils.data.rows import read_captions, read_labels, require_column
from utils.errors import UsageError, on_main_process
from utils.evaluation.features import BATCH, Extractor, build_extractor
from utils.ledger.charges import list_prior
from utils.ledger.reservations import find_ledger
from utils.ledger.statement import (
    BASE_CHECKSUM,
    STOPPED,
    UNKNOWN_BASE,
    Circumstances,
    describe_cost,
    list_doubts,
)
from utils.methods.classes import Classes, Nearest, build_nearest
from utils.methods.planning import PrivateRows
from utils.privacy.plan import PrivacyPlan, make_plan
from utils.privacy.randomness import SecretRandomness
from utils.sampling.generation import ADAPTER_FILES, load_drawing
from utils.sampling.paid_sets import PaidSet, check_judge, find_paid_set, find_set_ledger
from utils.sampling.sources import find_source
from utils.sampling.variations import make_varying, read_drawing, vary

# Images, their prompts and a seed -> variations.
Vary = Callable[[list[Image.Image], list[str], int], list[Image.Image]]
OTHERWISE = "draw the candidates with sample.py or release_means.py"


@dataclass(frozen=True)
class Candidates:
    """Synthetic images that can be voted for.

    Attributes:
        images: M of them. entries: of each: `text`, and perhaps `label`.
        classes: [M], whose rows may vote for it.
    """

    images: Sequence[Image.Image]
    entries: list[dict]
    classes: np.ndarray

    def select(self, places: list[int]) -> "Candidates":
        images, entries = ([kind[i] for i in places] for kind in (self.images, self.entries))
        return Candidates(images, entries, self.classes[places])


@dataclass(frozen=True)
class Election:
    """All that a vote needs beside the private images; all of it is public, or paid for.

    Attributes:
        paid: where the candidates came from. prior, builds_on: what that cost (`PrivacyPlan`).
        candidates: of the first round. classes, nearest: which of them a row may vote for.
        extractor: whose features are compared.
    """

    paid: PaidSet
    prior: tuple[dict, ...]
    builds_on: tuple[str, ...]
    candidates: Candidates
    classes: Classes
    nearest: Nearest | None
    extractor: Extractor

    def plan(self, epsilon: float | None, privacy: PrivacyArguments, **terms) -> PrivacyPlan:
        """Steps of the Gaussian mechanism on everyone, after what the candidates cost.

        Args:
            epsilon: of these steps alone; None: what `--target_epsilon`, for all, leaves.
            terms: other fields of `PrivacyPlan`.

        Raises:
            UsageError: see `make_plan`.
        """
        alone = epsilon is not None
        plan = make_plan(
            target_epsilon=epsilon if alone else privacy.target_epsilon,
            expected_batch_size=terms["num_units"],
            delta=privacy.target_delta,
            prior=() if alone else self.prior,
            **terms,
        )
        return replace(plan, prior=self.prior, builds_on=self.builds_on)

    def describe_circumstances(self, randomness: SecretRandomness, precision: str) -> Circumstances:
        """What the statement says beside the mechanisms; `precision`: see `name_precision`."""
        doubts = list_doubts(self.paid.statement)
        return Circumstances(
            randomness.is_private,
            randomness.source,
            precision,
            base=self._base,
            is_base_known=UNKNOWN_BASE not in doubts,
            is_stopped=STOPPED in doubts,
        )

    def describe_cost(self, plan: PrivacyPlan, recharged: int) -> str:
        """`statement.describe_cost`, with the base model behind the candidates."""
        return describe_cost(plan, self._base, recharged)

    @property
    def _base(self) -> dict | None:
        return (self.paid.statement or {}).get("base")

    def describe(self) -> dict:
        """What a run that is resumed must find again."""
        return {"extractor": self.extractor.about(), "candidates": self.paid.digest}


def join_ledger(privacy: PrivacyArguments, synthetic: str) -> PrivacyArguments:
    """`privacy` with the ledger that paid for the candidates, unless it names one."""
    ledger = find_set_ledger(synthetic)
    if privacy.privacy_ledger is not None or ledger is None:
        return privacy
    return replace(privacy, privacy_ledger=str(ledger))


def call_election(
    synthetic: str,
    extracting: ExtractorArguments,
    model: ModelArguments,
    found: PrivateRows,
    privacy: PrivacyArguments,
    training: TrainingArguments,
) -> Election:
    """Find the candidates, what they cost, and how they are compared; no private image is read.

    Raises:
        UsageError: see `find_paid_set`, `match_classes` and `build_extractor`.
    """
    state = PartialState()
    ledger = find_ledger(Path(training.output_dir), privacy)
    paid = on_main_process(lambda: find_paid_set(synthetic, ledger, "--synthetic", OTHERWISE))
    prior, builds_on = list_prior(ledger.records(), paid.runs)
    candidates = read_candidates(synthetic)
    entries = candidates.entries
    classes, nearest, of_candidate = match_classes(entries, found.rows, found.data, model)
    candidates = replace(candidates, classes=of_candidate)
    extractor = build_extractor(extracting, state.device)
    return Election(paid, prior, builds_on, candidates, classes, nearest, extractor)


def read_candidates(synthetic: str) -> Candidates:
    """The images of a set, all of one class.

    Raises:
        UsageError: see `read_synthetic`; or they have no prompts.
    """
    images = read_synthetic(synthetic, "--synthetic")
    require_column(images.rows, "text", f"--synthetic {synthetic}:")
    columns = [column for column in ("text", "label") if column in images.rows.column_names]
    entries = [dict(row) for row in images.rows.select_columns(columns)]
    return Candidates(Pictures(images), entries, np.zeros(len(entries), dtype=int))


def build_vary(election: Election, args: CurationArguments) -> Vary:
    """How winners are varied: by image-to-image with the model that drew the candidates.

    Raises:
        UsageError: see `read_drawing` and `make_varying`; or that model has changed since.
    """
    paid = election.paid
    drawing = read_drawing(paid.settings, f"--synthetic {args.synthetic}")
    source = check_judge(drawing[1].reject_by, find_source(*drawing))
    pipeline, settings, made_by = load_drawing(*drawing, source, PartialState())
    if made_by != {k: v for k, v in paid.settings.items() if k in (BASE_CHECKSUM, ADAPTER_FILES)}:
        raise UsageError(f"the model or adapter that drew {args.synthetic} has changed since")
    if source.statement != paid.statement:
        raise UsageError(
            f"what drew {args.synthetic} has another privacy.json than it had then: draw it anew"
        )
    varying, strength = make_varying(pipeline), args.variation_strength
    return lambda pictures, prompts, seed: vary(
        varying, pictures, prompts, strength, settings, seed
    )


def extract_candidates(
    candidates: Candidates, extractor: Extractor, accelerator: Accelerator
) -> torch.Tensor:
    """The features of all candidates, in order: [M, d], on the CPU of every process; each process
    passes a share of them through the network."""
    side, features = extractor.resolution, []
    places = torch.arange(len(candidates.images)).tensor_split(accelerator.num_processes)
    parts = places[accelerator.process_index].split(BATCH)
    for part in tqdm(parts, "features of candidates", disable=not accelerator.is_main_process):
        pixels = [crop_to_pixels(candidates.images[i], side) for i in part.tolist()]
        if pixels:  # more processes than candidates
            features.append(extract_pixels(extractor, torch.stack(pixels), accelerator))
    return torch.cat(gather_object(features))


@torch.no_grad()
def extract_pixels(
    extractor: Extractor, pixels: torch.Tensor, accelerator: Accelerator
) -> torch.Tensor:
    """The features of images uint8 [n, 3, R, R], by --mixed_precision: [n, d], on the CPU."""
    with accelerator.autocast():
        return extractor.network(pixels.to(accelerator.device))[0].float().cpu()


class Pictures(Sequence):
    """The images of a set, each decoded when it is asked for."""

    def __init__(self, images: ImageRows):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, place: int) -> Image.Image:
        return self.images.rows[place][self.images.column].convert("RGB")


def _warn_of_other_classes(names: list[str], feature: object) -> None:
    """Say which classes only one side has, as far as the private ones are public."""
    known = getattr(getattr(feature, "feature", feature), "names", None)  # of a list, of its items
    if known is None:
        return
    warn_of_other_classes(
        {"private images": known, "images of --synthetic": names},
        "which nothing on the other side matches; if that is a name spelled in two ways, draw the "
        "set anew first",
    )


def match_classes(
    entries: list[dict], rows: Dataset, data: DataArguments, model: ModelArguments
) -> tuple[Classes, Nearest | None, np.ndarray]:
    """The classes of the candidates; how a private row finds its own; and each candidate's [M].

    With labels on both sides a row votes within its label; else within the prompt that its caption
    is, or is nearest to; with one caption for all, or one prompt, for any candidate.

    Raises:
        UsageError: the private labels and those of the candidates have nothing in common; see
            `build_nearest`.
    """
    texts = [entry["text"] or "" for entry in entries]
    has_labels = data.label_column is not None and "label" in entries[0]
    if data.caption is not None or (len(set(texts)) == 1 and not has_labels):
        if data.label_column is not None and PartialState().is_main_process:
            print("every image votes for any candidate, whatever its label", file=sys.stderr)
        return Classes([], texts[:1]), None, np.zeros(len(entries), dtype=int)
    keys = [entry["label"] for entry in entries] if has_labels else texts
    names = list(dict.fromkeys(keys))
    numbers = {name: number for number, name in enumerate(names)}
    of_candidate = np.array([numbers[key] for key in keys])
    if data.label_column is None:
        return Classes([], names), build_nearest(model, names), of_candidate
    own = read_labels(rows, data.label_column) if has_labels else read_captions(rows, data)
    if not set(own) & set(names):
        raise UsageError(
            f"no class of --label_column {data.label_column} is among those of the candidates: "
            f"{', '.join(names[:5])}"
        )
    if has_labels:
        _warn_of_other_classes(names, rows.features[data.label_column])
    return (
        Classes(names if has_labels else [], names),
        lambda caption: numbers.get(caption, -1),
        of_candidate,
    )
