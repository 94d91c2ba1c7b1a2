"""The options that all private training shares: data, model, privacy, optimizer and run."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.sampling import USUAL_TEMPLATE, DrawingArguments
from utils.arguments.values import (
    INTENSITY_HELP,
    check_between,
    check_positive,
    check_range,
    check_seed,
    choose_precision,
)
from utils.errors import UsageError

CLIPPING_MODES = ["flat", "automatic", "per_layer"]
SMALLEST_NOISE, LARGEST_NOISE = 0.2, 1e4  # noise multipliers that can be asked for
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]


@dataclass
class DataArguments:
    """Where the images and their captions come from."""

    dataset_name: str | None = option(
        "Hub id; or a folder of parquet files, of images, or of a saved dataset", None
    )
    dataset_config_name: str | None = option("configuration of a Hub dataset", None)
    train_data_dir: str | None = option("image folder, instead of --dataset_name", None)
    split: str = option("split to read", "train")
    max_train_samples: int | None = option(
        "use the first so many rows only; they are then the private set", None
    )
    image_column: str = option("column that holds the images", "image")
    caption: str | None = option(
        "one public caption for all images, instead of any column; '' for none", None
    )
    caption_column: str | None = option("column that holds the captions", None)
    label_column: str | None = option("column of class labels, to make captions of", None)
    caption_template: str | None = option(
        "caption of a label; default: as the base model was trained, if its sampling.json says so, "
        f"or '{USUAL_TEMPLATE}'",
        None,
    )
    privacy_unit_column: str | None = option(
        "rows with the same value here are one privacy unit: a patient, a user; default: each row",
        None,
    )
    resolution: int | None = option(
        "images are resized and centre-cropped to this many pixels; default: that of the model",
        None,
    )
    intensity_range: list[float] | None = option(INTENSITY_HELP, None)
    strict_images: bool = option(
        "refuse a set with an image that cannot be used, rather than leave it out", False
    )

    @property
    def template(self) -> str:
        return USUAL_TEMPLATE if self.caption_template is None else self.caption_template

    @property
    def window(self) -> tuple[float, float] | None:
        """`intensity_range`, as `ImageRows` takes it."""
        return check_range(self.intensity_range)

    def __post_init__(self):
        check_range(self.intensity_range)
        if self.caption is not None and self.caption_column is not None:
            raise UsageError("give --caption, one for all images, or --caption_column; not both")
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise UsageError(f"--max_train_samples {self.max_train_samples} must be at least 1")


@dataclass
class ModelArguments:
    """The public pipeline to start from."""

    pretrained_model_name_or_path: str = option(
        "diffusers pipeline of a known family (docs/models.md): folder or Hub id; of Stable "
        "Diffusion 1 and XL also a .safetensors file of a whole checkpoint"
    )
    revision: str | None = option("revision of a Hub id", None)
    variant: str | None = option("variant of the weights' files, such as fp16", None)
    allow_distilled: bool = option(
        "accept a model that was distilled to a few steps, such as Turbo; training undoes that",
        False,
    )

    @property
    def source(self) -> tuple:
        """Arguments of `load_pipeline`."""
        name = self.pretrained_model_name_or_path
        return (name, self.revision, self.variant, self.allow_distilled)


@dataclass
class PrivacyArguments:
    """The budget, and what one step of DP-SGD does."""

    target_epsilon: float | None = option("budget; the noise is calibrated to it", None)
    target_delta: float | None = option("delta of the budget; required, below 1/N", None)
    noise_multiplier: float | None = option("sigma, instead of --target_epsilon", None)
    max_grad_norm: float = option(
        "C, the bound on one unit's gradient; with automatic clipping and Adam it changes nothing",
        1.0,
    )
    clipping: str = option(
        "how a unit's gradient is bounded by C: always scaled to it (automatic), scaled down if "
        "larger (flat), or each of the L tensors bounded by C / sqrt(L) (per_layer)",
        "automatic",
        choices=CLIPPING_MODES,
    )
    expected_batch_size: float | None = option(
        "B, expected units in a Poisson batch; q = B/N; default: chosen from N, the number of "
        "trained weights and the budget, as are K, the steps and the rate (docs/tuning.md)",
        None,
    )
    noise_multiplicity: int | None = option(
        "K, draws of (noise, timestep, flip) averaged per unit before its one clip; default: "
        "chosen",
        None,
    )
    secure_noise: bool = option(
        "noise and sampling from the operating system's cryptographic generator, hardened against "
        "floating-point attacks; slower",
        False,
    )
    debug_noise_seed: int | None = option(
        "reproducible noise, for debugging: every result is stamped NOT PRIVATE", None
    )
    replay_audit: bool = option(
        "before training, replay some steps of this very set-up, on public noise images, with and "
        "without one unit (audit_privacy.py --replay); what it proves goes into privacy.json",
        False,
    )
    privacy_ledger: str | None = option(
        "ledger to record this run in, shared by all runs on the same data; default: "
        "OUTPUT_DIR/private/ledger.jsonl",
        None,
    )
    start_ledger: bool = option(
        "with --total_epsilon: start --privacy_ledger anew if it is not there", False
    )
    total_epsilon: float | None = option(
        "refuse to start if everything in the ledger, this run included, would exceed this", None
    )

    def __post_init__(self):
        if self.noise_multiplicity is not None:
            check_between("noise_multiplicity", self.noise_multiplicity, 1, math.inf)
        if self.debug_noise_seed is not None:
            check_between("debug_noise_seed", self.debug_noise_seed, 0, 2**64)
        for name in ("total_epsilon", "target_epsilon", "max_grad_norm"):
            check_positive(name, getattr(self, name))


@dataclass
class TrainingArguments(DrawingArguments):
    """The optimizer and the run; how samples are drawn."""

    output_dir: str = option("where the adapter, the statement, the card and the samples go")
    optimizer: str = option(
        "adamw, sgd, or adam_bc, whose second moment is corrected for the noise",
        "adamw",
        choices=["adamw", "sgd", "adam_bc"],
    )
    learning_rate: float | None = option("peak learning rate; default: chosen", None)
    lr_scheduler: str = option("learning rate schedule", "cosine", choices=SCHEDULES)
    lr_warmup_steps: int = option("steps of warm-up", 0)
    adam_beta1: float = option("AdamW's beta1; the momentum of sgd", 0.9)
    adam_beta2: float = option("AdamW's beta2", 0.999)
    adam_weight_decay: float = option("AdamW's weight decay", 0.01)
    adam_epsilon: float = option("AdamW's epsilon", 1e-8)
    ema_decay: float = option(
        "publish a moving average of the weights, which costs no privacy; 0: the last weights",
        0.0,
    )
    timestep_sampling: str | None = option(
        "which noise levels a DDPM trains on: all alike (default), the middle, or the noisy end",
        None,
        choices=["uniform", "logit_normal", "high_noise"],
    )
    snr_gamma: float | None = option("min-SNR weighting of a DDPM's loss, such as 5", None)
    weighting_scheme: str | None = option(
        "which noise levels a flow-matching model trains on, or how it weighs them; default: as "
        "the diffusers example for it (logit_normal for Stable Diffusion 3, else none)",
        None,
        choices=["none", "sigma_sqrt", "logit_normal", "mode", "cosmap"],
    )
    logit_mean: float | None = option("of logit_normal; larger is less noise; default: 0", None)
    logit_std: float | None = option("of logit_normal; default: 1", None)
    mode_scale: float | None = option("of mode; default: 1.29", None)
    max_train_steps: int | None = option(
        "private steps, empty batches included; default: chosen", None
    )
    train_batch_size: int = option(
        "units per forward pass; changes speed and memory, never the result", 32
    )
    random_flip: bool = option("flip each draw left to right with probability 1/2", False)
    mixed_precision: str | None = option(
        "precision of the forward and backward pass, no or bf16; weights stay in fp32; default: "
        "that of accelerate launch, or no",
        None,
    )
    base_precision: str = option(
        "of the frozen weights of denoiser and text encoders: bf16 halves their memory, and needs "
        "--mixed_precision bf16; what trains stays in fp32, and images are drawn in fp32",
        "fp32",
        choices=["fp32", "bf16"],
    )
    gradient_checkpointing: bool = option("recompute activations to save memory", False)
    validation_prompt: list[str] | None = option(
        "prompts of the images at the end in samples/, shown on the card; default: that of "
        "--caption, or none",
        None,
    )
    num_validation_images: int = option("how many images to generate at the end", 16)
    validation_steps: int | None = option(
        "draw images every so many steps, too, from weights that are paid for: a sheet each in "
        "samples/, film.png of all, and on the tracker; each makes a checkpoint",
        None,
    )
    checkpointing_steps: int = option(
        "a checkpoint every so many steps, before the first, after the last; they cost no privacy",
        20,
    )
    checkpoints_total_limit: int = option("how many checkpoints to keep", 2)
    resume_from_checkpoint: str | None = option(
        "resume the run in --output_dir: latest, or the name or path of a checkpoint; an older "
        "one charges the steps in between once more",
        None,
    )
    publish_now: bool = option(
        "with --resume_from_checkpoint: take no further step, and publish the weights of the "
        "checkpoint, at the smaller epsilon that was spent",
        False,
    )
    latents_dir: str | None = option(
        "where the encoded images are kept, for all runs on the same images; default: "
        "OUTPUT_DIR/private/latents",
        None,
    )
    discard_latents: bool = option(
        "when done, delete the encoded images and the other copies of the private ones in "
        "--output_dir; what was downloaded from the Hub stays in the Hub's cache",
        False,
    )
    dry_run: bool = option(
        "print the plan as JSON, what it will take on this device, and whether it can work", False
    )
    num_units: int | None = option(
        "with --dry_run: plan for so many privacy units, without their images", None
    )
    report_to: str | None = option(
        "tracker for step, learning rate and epsilon", None, choices=["tensorboard", "wandb"]
    )
    seed: int | None = option("seed of the adapter's start; never of the noise", None)

    def __post_init__(self):
        super().__post_init__()
        check_seed(self.seed)
        self.mixed_precision = choose_precision(self.mixed_precision)
        if self.base_precision == "bf16" and self.mixed_precision != "bf16":
            raise UsageError("--base_precision bf16 needs --mixed_precision bf16")
        for name in ("ema_decay", "adam_beta1", "adam_beta2"):
            check_between(name, getattr(self, name), 0, 1)
        for name in ("adam_epsilon", "adam_weight_decay", "lr_warmup_steps"):
            check_between(name, getattr(self, name), 0, math.inf)
        check_between("num_validation_images", self.num_validation_images, 0, math.inf)
        for name in ("train_batch_size", "checkpointing_steps", "checkpoints_total_limit"):
            check_between(name, getattr(self, name), 1, math.inf)
        for name in ("max_train_steps", "validation_steps", "num_units"):
            if (value := getattr(self, name)) is not None:
                check_between(name, value, 1, math.inf)
        for name in ("learning_rate", "logit_std", "snr_gamma"):
            check_positive(name, getattr(self, name))
        steps = self.max_train_steps
        if steps is not None and self.lr_warmup_steps > steps:
            raise UsageError(
                f"--lr_warmup_steps {self.lr_warmup_steps} is more than --max_train_steps "
                f"{self.max_train_steps}: the learning rate would never be reached"
            )
        if self.publish_now and self.resume_from_checkpoint is None:
            raise UsageError("--publish_now needs --resume_from_checkpoint, such as latest")
        if self.logit_mean is not None and not math.isfinite(self.logit_mean):
            raise UsageError("--logit_mean must be finite")
        # Beyond, levels would come twice: Esser et al. 2024.
        if self.mode_scale is not None and not 0 <= self.mode_scale <= 1.75:
            raise UsageError(f"--mode_scale {self.mode_scale} must be between 0 and 1.75")
