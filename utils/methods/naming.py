"""What a published classifier says of synthetic images, later ones or again.

The private images were paid for when the classifier learned from them (`relabelling`); naming
images by it costs nothing, and can be done again, for more of them, or to keep others.

Shapes: C classes; features of d numbers.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from utils.arguments.evaluation import ExtractorArguments
from utils.arguments.publishing import PublishSetArguments
from utils.arguments.relabelling import RelabellingArguments
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.errors import UsageError, on_main_process
from utils.evaluation.features import Extractor, build_extractor
from utils.files import LABELLER, LEDGER, explain_disk_errors, private_folder
from utils.ledger.ledger import Ledger
from utils.ledger.reservations import find_ledger
from utils.ledger.runs import find_earlier_branch
from utils.ledger.statement import add_doubts, list_doubts
from utils.ledger.verification import find_problems, read_source
from utils.methods.agreement import choose_kept, name_images, save_changes
from utils.methods.election import OTHERWISE, Candidates, extract_candidates, read_candidates
from utils.methods.kept_sets import plan_files, prepare_repository, show_set
from utils.methods.labeller import Whitening
from utils.methods.rendered import AS_THEY_ARE, choose_autoencoder, see_rendered
from utils.methods.stages import start
from utils.sampling.generation import ADAPTER_FILES, hash_adapter
from utils.sampling.paid_sets import PaidSet, find_covered_set
from utils.sampling.shards import SET
from utils.sampling.synthetic_sets import write_files


@dataclass(frozen=True)
class Labeller:
    """A classifier that relabel.py published.

    Attributes:
        folder: where it is. names: of its C classes. statement: privacy.json, which covers it.
        whiten: what its features pass through. weights: [C, d + 1]. extractor: `Extractor.about`.
    """

    folder: Path
    names: list[str]
    statement: dict
    whiten: Whitening
    weights: torch.Tensor
    extractor: dict

    @property
    def ledger(self) -> Ledger:
        return Ledger(private_folder(self.folder) / LEDGER)

    @property
    def sees_rendered(self) -> bool:
        return self.extractor.get("rendered_by") is not None

    def check_extractor(self, extractor: Extractor) -> None:
        """Raises: UsageError if it learned from the features of another network."""
        about = extractor.about()
        names = sorted({*about, *self.extractor})
        if other := [n for n in names if about.get(n) != self.extractor.get(n)]:
            raise UsageError(
                f"--labeller {self.folder} learned from other features ({', '.join(other)}): give "
                "--extractor, --classifier_weights and --autoencoder as when it was trained"
            )


def name_more(
    args: RelabellingArguments,
    extracting: ExtractorArguments,
    privacy: PrivacyArguments,
    training: TrainingArguments,
    hub: PublishSetArguments,
) -> None:
    """Name a set by `args.labeller`, and leave what is kept in `training.output_dir`/set, under the
    classifier's own statement, with what is doubted about the set. Nothing private is read, and
    nothing is spent.

    Raises:
        UsageError: bad input of any kind; or the classifier's statement does not hold, or does not
            cover what the set cost.
    """
    output_dir = Path(training.output_dir)
    if training.resume_from_checkpoint is not None:
        raise UsageError("--labeller: there is nothing to resume; name a new --output_dir")
    if find_earlier_branch(output_dir) is not None:  # even if it has released nothing
        raise UsageError(f"--output_dir {output_dir} already holds files; name a new folder")
    accelerator, _lock = start(training, args.synthetic)
    labeller = on_main_process(lambda: read_labeller(Path(args.labeller), privacy))
    paid = on_main_process(lambda: find_its_set(args.synthetic, labeller))
    candidates = number_classes(read_candidates(args.synthetic), labeller, args.synthetic)
    prompts = find_prompts(candidates, labeller.names, args)
    extractor = build_extractor(extracting, accelerator.device)
    as_then = args.autoencoder or (None if labeller.sees_rendered else AS_THEY_ARE)
    source = choose_autoencoder(as_then, paid.settings)
    extractor = see_rendered(extractor, source, accelerator.device)
    labeller.check_extractor(extractor)
    accelerator.print(
        f"{len(candidates.images)} images are named by {labeller.folder}: no private image is "
        "read, and nothing is spent"
    )
    if training.dry_run:
        return
    prepare_repository(hub, privacy)
    seen = extract_candidates(candidates, extractor, accelerator)
    scores = labeller.whiten(seen) @ labeller.weights.T
    named = name_images(candidates, scores, labeller.names, prompts)
    kept = choose_kept(candidates, named, args, accelerator)
    folder, seen_by = output_dir / SET, {"extractor": labeller.extractor, "candidates": paid.digest}
    about = {"relabelled": asdict(args) | seen_by, "from": paid.settings}
    about[ADAPTER_FILES] = hash_adapter(labeller.folder)

    def write() -> None:
        shared = replace(privacy, privacy_ledger=str(labeller.ledger.path), total_epsilon=None)
        with explain_disk_errors(output_dir):
            find_ledger(output_dir, shared, link=True)
            save_changes(candidates, named, len(labeller.names), output_dir)
        statement = add_doubts(labeller.statement, list_doubts(paid.statement))
        write_files(folder, statement, settings=about, **plan_files(kept))

    on_main_process(write)
    show_set(folder, kept, paid, hub)


def read_labeller(folder: Path, privacy: PrivacyArguments) -> Labeller:
    """A classifier, its statement verified against its files and its ledger.

    Raises:
        UsageError: there is none, or something about it does not hold; or another ledger is named.
    """
    path, ledger = folder / LABELLER, private_folder(folder) / LEDGER
    if not path.is_file():
        raise UsageError(f"--labeller {folder} holds no {LABELLER}: name what relabel.py left")
    if not ledger.exists():
        raise UsageError(
            f"--labeller {folder}: its ledger, {ledger}, is not there, so nobody can tell what "
            "was paid for"
        )
    if privacy.privacy_ledger and Path(privacy.privacy_ledger).resolve() != ledger.resolve():
        raise UsageError(
            f"--labeller {folder} is in the ledger {ledger.resolve()}, not in --privacy_ledger "
            f"{privacy.privacy_ledger}: leave that out"
        )
    source = read_source(str(folder), None)
    problems = find_problems(source)
    if not problems and LABELLER not in (source.statement or {"files": {}})["files"]:
        problems = [f"its privacy.json does not cover {LABELLER}"]
    if problems:
        raise UsageError(f"--labeller {folder} does not verify: {'; '.join(problems)}")
    try:
        with safe_open(path, "pt") as file:
            spoken = file.metadata()
            mean, matrix, weights = (file.get_tensor(n) for n in ("mean", "matrix", "weights"))
        names, seen_by = json.loads(spoken["classes"]), json.loads(spoken["about"])["extractor"]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--labeller {folder}: {LABELLER} cannot be read: {error}") from error
    whiten = Whitening(mean, matrix)
    return Labeller(folder, names, source.statement, whiten, weights, seen_by)


def find_its_set(synthetic: str, labeller: Labeller) -> PaidSet:
    """The set to name, whose cost must be in the classifier's statement, if it has one.

    Raises:
        UsageError: see `find_covered_set`.
    """
    return find_covered_set(
        synthetic,
        labeller.ledger,
        labeller.statement,
        argument="--synthetic",
        otherwise=OTHERWISE,
        instead="name images of the adapter that the classifier was trained for, as it was then, "
        "or public ones",
    )


def number_classes(candidates: Candidates, labeller: Labeller, synthetic: str) -> Candidates:
    """The candidates, numbered as the classifier numbers its classes.

    Raises:
        UsageError: the images have other classes than it knows, or none.
    """
    labels = [entry.get("label") for entry in candidates.entries]
    if set(labels) != set(labeller.names):
        raise UsageError(
            f"--synthetic {synthetic}: its classes are not those of --labeller {labeller.folder}: "
            f"{', '.join(labeller.names[:5])}, {len(labeller.names)} in all"
        )
    numbers = {name: number for number, name in enumerate(labeller.names)}
    classes = np.array([numbers[label] for label in labels])
    return Candidates(candidates.images, candidates.entries, classes)


def find_prompts(candidates: Candidates, names: list[str], args: RelabellingArguments) -> list[str]:
    """The prompt of each class.

    Raises:
        UsageError: the set or the private rows have no labels; or a class has several prompts, so
            that nobody knows what to call an image that comes to it; or fewer images than to keep.
    """
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
