"""The options of relabelling: a private classifier names synthetic images."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.values import check_between, check_positive


@dataclass
class RelabellingArguments:
    """Which images get new labels, and from what."""

    synthetic: str = option(
        "the labelled set: a folder that sample.py, curate.py or release_means.py left, whose cost "
        "is in the same ledger; or that sample.py drew from a public model"
    )
    labeller: str | None = option(
        "a folder that relabel.py left: its classifier names this set, too, at no cost; images are "
        "of the same adapter, or from a public model; no private one is read, and no budget needed",
        None,
    )
    num_images: int | None = option(
        "images to keep, the surest, balanced over the new classes; default: all", None
    )
    only_agreed: bool = option(
        "keep only images that get the label which they had: fewer, and both agree about them. A "
        "class of which none is left keeps what was named so",
        False,
    )
    equal_classes: bool = option(
        "keep as many of every class as of the rarest that is left, the first that were drawn: "
        "otherwise whoever learns from the set seldom guesses what is often named otherwise",
        False,
    )
    autoencoder: str | None = option(
        "a public pipeline, folder or Hub id: the classifier sees private and synthetic images as "
        "its autoencoder gives them back, so that its blur tells neither apart; default: the one "
        "that drew the latter, if one did; none: as they are",
        None,
    )
    relabel_steps: int = option("private steps of the classifier, each on all private images", 200)
    relabel_epsilon: float | None = option(
        "epsilon of the classifier alone; default: what --target_epsilon leaves after what the set "
        "cost",
        None,
    )

    def __post_init__(self):
        if self.num_images is not None:
            check_between("num_images", self.num_images, 1, math.inf)
        check_between("relabel_steps", self.relabel_steps, 1, math.inf)
        check_positive("relabel_epsilon", self.relabel_epsilon)
