"""The options of rehearsals on public images."""

from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.values import check_between
from utils.errors import UsageError

METHODS = ["dp-lora", "dp-loda", "dp-ldm"]


@dataclass
class RehearsalArguments:
    """The public images, and what is tried on them."""

    method: str = option("whose run is rehearsed", "dp-lora", choices=METHODS)
    stand_in: str | None = option(
        "public images like the private ones: Hub id or folder; default: images that the base "
        "model draws from --validation_prompt, or of dp-lora from --class_names",
        None,
    )
    stand_in_split: str = option("split of it to read", "train")
    stand_in_caption_column: str | None = option(
        "column that holds its captions; default: as for the private images, or text", None
    )
    stand_in_label_column: str | None = option(
        "column that holds its class labels, which fill --caption_template", None
    )
    tried_rates: list[float] | None = option(
        "learning rates; default: a third of --learning_rate, that, and three times it", None
    )
    tried_steps: list[int] | None = option(
        "numbers of steps, K changed so that the passes stay the same; default: "
        "--max_train_steps, half of that and, if K is above 1, twice it",
        None,
    )
    num_held_out: int = option("stand-in images that nothing is trained on, to be judged by", 256)
    workers: int | None = option("trials at once, one thread each; default: one a core", None)

    def __post_init__(self):
        if any(rate <= 0 for rate in self.tried_rates or []):
            raise UsageError("--tried_rates must be positive")
        if any(steps < 1 for steps in self.tried_steps or []):
            raise UsageError("--tried_steps must be at least 1")
        if self.num_held_out < 16:
            raise UsageError(f"--num_held_out {self.num_held_out} must be at least 16")
        if self.workers is not None:
            check_between("workers", self.workers, 1, 10_000)
