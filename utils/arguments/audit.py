"""The options of the audit."""

from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.training import CLIPPING_MODES
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
    output_dir: str = option("where audit.json and audit.png go", "runs/audit")
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
    mutant_epsilon: float = option("epsilon that the mutants report, with --mutants", 2.0)
    seed: int = option("seed of the coins and of the adapter; never of the noise", 0)
    json: bool = option("print one JSON object as the last line", False)

    def __post_init__(self):
        if self.num_canaries is None:
            self.num_canaries = DEFAULT_CANARIES[self.canaries]
        fewest = 10 * CANARIES_PER_GUESS[self.canaries]  # fewer than ten guesses prove nothing
        if self.num_canaries < fewest or self.num_images < 1:
            raise UsageError(f"--num_canaries must be at least {fewest}, --num_images at least 1")
        if not 0 < self.sampling_rate <= 1 or not 0.5 < self.confidence < 1:
            raise UsageError("--sampling_rate must be in (0, 1], --confidence in (0.5, 1)")
        if self.mutant and self.mutants:
            raise UsageError("give --mutant NAME or --mutants, not both")
