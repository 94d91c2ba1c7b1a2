"""The options of the audit."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.training import CLIPPING_MODES, DataArguments
from utils.arguments.values import check_between, check_positive
from utils.errors import UsageError

DEFAULT_CANARIES = {"gradients": 80_000, "images": 1_000}
CANARIES_PER_GUESS = {"gradients": 250, "images": 10}
# The ways in which `audit.mutants` breaks the loop.
MUTANTS = [
    *("no_noise", "copies_clipped_one_by_one", "double_clip_bound", "noise_divided_by_batch"),
    *("shuffled_batches", "noise_reused_each_step"),
]


@dataclass
class AuditArguments:
    """The audited training, and the audit."""

    pretrained_model_name_or_path: str = option("pipeline to train", "examples/digits/base")
    output_dir: str = option(
        "where audit.json and audit.png go; of your own images, into private/ there", "runs/audit"
    )
    target_epsilon: float = option("epsilon that the audited run reports", 8.0)
    target_delta: float = option("delta of that epsilon", 1e-6)
    sampling_rate: float = option("q, the probability that a step includes a unit", 0.5)
    max_train_steps: int = option("steps of each run", 2)
    max_grad_norm: float = option("C, the clipping bound", 0.15)
    clipping: str = option("how a unit's gradient is bounded", "flat", choices=CLIPPING_MODES)
    noise_multiplicity: int = option("K, draws averaged per unit before its one clip", 4)
    secure_noise: bool = option("noise from the operating system's cryptographic generator", False)
    learning_rate: float = option("AdamW's learning rate", 1e-3)
    train_batch_size: int = option("units per forward pass", 128)
    num_images: int = option("ordinary training images beside the canaries", 300)
    canaries: str = option("what the canaries are", "gradients", choices=["gradients", "images"])
    num_canaries: int | None = option("default: 80,000 gradients, or 1,000 images", None)
    confidence: float = option("probability that the bound is right", 0.95)
    mutant: str | None = option("break the loop in this way", None, choices=MUTANTS)
    mutants: bool = option("run the real loop, then every mutant, and print a table", False)
    replay: bool = option(
        "instead: take some steps with and without one unit, all randomness the same, on public "
        "noise images; seconds",
        False,
    )
    data_is_public: bool = option(
        "the images that were named are public: only on such ones may mutants train", False
    )
    mutant_epsilon: float = option("epsilon that the mutants report, with --mutants", 2.0)
    privacy_ledger: str | None = option(
        "ledger in which an audit on your own images is recorded; default: "
        "OUTPUT_DIR/private/ledger.jsonl",
        None,
    )
    seed: int = option("seed of the coins and of the adapter; never of the noise", 0)
    json: bool = option("print one JSON object as the last line", False)

    def __post_init__(self):
        if self.num_canaries is None:
            self.num_canaries = DEFAULT_CANARIES[self.canaries]
        fewest = 10 * CANARIES_PER_GUESS[self.canaries]  # fewer than ten guesses prove nothing
        if self.num_canaries < fewest or self.num_images < 1:
            raise UsageError(f"--num_canaries must be at least {fewest}, --num_images at least 1")
        for name in ("max_train_steps", "noise_multiplicity", "train_batch_size"):
            check_between(name, getattr(self, name), 1, math.inf)
        for name in ("target_epsilon", "mutant_epsilon", "max_grad_norm", "learning_rate"):
            check_positive(name, getattr(self, name))
        if not 0 < self.target_delta < 1:
            raise UsageError(f"--target_delta {self.target_delta} must be in (0, 1)")
        if not 0 < self.sampling_rate <= 1 or not 0.5 < self.confidence < 1:
            raise UsageError("--sampling_rate must be in (0, 1], --confidence in (0.5, 1)")
        if self.mutant and self.mutants:
            raise UsageError("give --mutant NAME or --mutants, not both")


def names_images(data: DataArguments) -> bool:
    """Whether the audit is to use the user's images, rather than scikit-learn's digits."""
    return data.dataset_name is not None or data.train_data_dir is not None


def check_images(args: AuditArguments, data: DataArguments) -> None:
    """Raises: UsageError if what was asked for would misuse the user's images."""
    if not names_images(data):
        return
    if args.replay:
        raise UsageError("--replay reads no images: leave out --train_data_dir and --dataset_name")
    if (args.mutants or args.mutant) and not args.data_is_public:
        raise UsageError(
            "mutants train without a guarantee, so not on private images: leave out "
            "--train_data_dir and --dataset_name, and they train on scikit-learn's digits; or, if "
            "these images are public, say so with --data_is_public"
        )
