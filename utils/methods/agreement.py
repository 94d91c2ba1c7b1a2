"""Where a classifier that names synthetic images agrees with how they were drawn, and which are
kept.

Shapes: M images, of C classes.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image
from torchmetrics.functional.classification import multiclass_cohen_kappa

from utils.arguments.relabelling import RelabellingArguments
from utils.data.images import tile_images
from utils.methods.election import Candidates
from utils.methods.rendered import AS_THEY_ARE
from utils.methods.votes import keep_best

CHANGES = "relabelled.png"
SHOWN = 5  # rows of it
SLIGHT = 0.2  # Cohen's kappa up to here is slight agreement (Landis and Koch 1977)


@dataclass(frozen=True)
class Named:
    """Images under the classes that were found for them.

    Attributes:
        images: all M, renamed. sure: [M], the probability of that class.
    """

    images: Candidates
    sure: np.ndarray


def name_images(
    candidates: Candidates, scores: torch.Tensor, names: list[str], prompts: list[str]
) -> Named:
    """Each image under the likeliest of its classes, by the scores [M, C], and its prompt."""
    sure, found = scores.softmax(1).max(1)
    entries = [
        entry | {"text": prompts[number], "label": names[number]}
        for entry, number in zip(candidates.entries, found.tolist(), strict=True)
    ]
    return Named(Candidates(candidates.images, entries, found.numpy()), sure.numpy())


def choose_kept(
    before: Candidates, named: Named, args: RelabellingArguments, accelerator: Accelerator
) -> Candidates:
    """The images that are left under their new names: the surest of every class, as they were
    drawn one after another; the classes take turns."""
    after, sure = named.images, named.sure
    changed = int((after.classes != before.classes).sum())
    accelerator.print(f"{changed} of {len(sure)} images got another label")
    if accelerator.is_main_process:
        warn_of_slight_agreement(before.classes, after.classes, args)
    if args.only_agreed:
        agreed = find_agreed(before.classes, after.classes)
        others = len(agreed) - int((before.classes == after.classes).sum())
        after, sure = after.select(agreed), sure[agreed]
        more = f", and {others} of classes of which none does" if others else ""
        accelerator.print(f"{len(agreed) - others} images are left, about which both agree{more}")
    left = after.select(sorted(keep_best(sure, after.classes, args.num_images or len(sure))))
    count = len(left.images)
    if args.equal_classes:
        _, first, sizes = np.unique(left.classes, return_index=True, return_counts=True)
        count = len(sizes) * int(sizes.min())
        rarest = left.entries[first[sizes.argmin()]]["label"]
        accelerator.print(
            f"{count} images are left, {sizes.min()} of each of {len(sizes)} classes, as many as "
            f"of the rarest, {rarest}"
        )
    as_drawn = -np.arange(len(left.images))  # so that the sheet does not show the surest
    return left.select(keep_best(as_drawn, left.classes, count))


def warn_of_slight_agreement(
    before: np.ndarray, after: np.ndarray, args: RelabellingArguments
) -> None:
    """Say so if the classes [M] that images were drawn as and those that they were given have
    little more in common than chance would have it."""
    count = int(max(1, before.max(), after.max())) + 1
    kappa = multiclass_cohen_kappa(torch.tensor(after), torch.tensor(before), num_classes=count)
    if kappa <= SLIGHT:  # not a number if there is one class only
        as_they_are = args.autoencoder == AS_THEY_ARE
        sharper = ", or was taught by sharper ones (--autoencoder)" if as_they_are else ""
        print(
            f"warning: the labels agree with how the images were drawn little more than by chance "
            f"(Cohen's kappa {kappa:.2f}; 1 is always). Either the prompts hardly show (more "
            f"--guidance_scale may help), or the classifier misreads the images{sharper}: look at "
            f"{CHANGES}",
            file=sys.stderr,
        )


def find_agreed(before: np.ndarray, after: np.ndarray) -> list[int]:
    """Images whose class [M] stays; and those of a new class that no image of it stays in."""
    agree = before == after
    lost = ~np.isin(after, after[agree])
    return (agree | lost).nonzero()[0].tolist()


def save_changes(before: Candidates, named: Named, num_classes: int, folder: Path) -> None:
    """relabelled.png: images that changed their class, the surest first; a column for each that
    they came to."""
    after = named.images.classes
    changed = (before.classes != after).nonzero()[0]
    order = changed[(-named.sure[changed]).argsort(kind="stable")]
    blank = Image.new("RGB", before.images[0].size, "white")
    columns = [
        [before.images[i] for i in order[after[order] == number][:SHOWN].tolist()]
        for number in range(num_classes)
    ]
    cells = [c[row] if row < len(c) else blank for row in range(SHOWN) for c in columns]
    tile_images(cells, len(columns)).save(folder / CHANGES)
