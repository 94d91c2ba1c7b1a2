"""The arguments that the scripts parse: dataclasses, one help line a field, CLI over YAML."""

import re
import sys
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from dataclasses import MISSING, dataclass, field
from pathlib import Path

import yaml
from transformers import HfArgumentParser

from utils.errors import UsageError

CLIPPING_MODES = ["flat", "automatic", "per_layer"]
SCHEDULES = ["constant", "constant_with_warmup", "linear", "cosine", "polynomial"]


def option(help: str, default=MISSING, choices: list | None = None):
    """A dataclass field with a help line; without a default it is required."""
    metadata = {"help": help} | ({"choices": choices} if choices else {})
    if default is MISSING:
        return field(metadata=metadata, kw_only=True)
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class DataArguments:
    """Where the images and their captions come from."""

    dataset_name: str | None = option(
        "Hub id; or a folder of parquet files, of images, or of a saved dataset", None
    )
    dataset_config_name: str | None = option("configuration of a Hub dataset", None)
    train_data_dir: str | None = option("image folder, instead of --dataset_name", None)
    split: str = option("split to read", "train")
    streaming: bool = option(
        "refused: each step draws a Poisson sample of all units, so every row must be at hand",
        False,
    )
    max_train_samples: int | None = option(
        "use the first so many rows only; they are then the private set", None
    )
    image_column: str = option("column that holds the images", "image")
    caption_column: str | None = option("column that holds the captions", None)
    label_column: str | None = option("column that holds class labels, instead of captions", None)
    caption_template: str = option("caption of a label", "a photo of a {label}")
    privacy_unit_column: str | None = option(
        "rows with the same value here are one privacy unit: a patient, a user; default: each row",
        None,
    )
    resolution: int | None = option(
        "images are resized and centre-cropped to this many pixels; default: what the model makes",
        None,
    )
    strict_images: bool = option(
        "refuse a set with an unreadable image, rather than skip it", False
    )

    def __post_init__(self):
        if self.streaming:
            raise UsageError(
                "--streaming is not possible: epsilon is computed for Poisson sampling, which "
                "draws from all rows at every step; download the set first"
            )
        if self.max_train_samples is not None and self.max_train_samples < 1:
            raise UsageError(f"--max_train_samples {self.max_train_samples} must be at least 1")


@dataclass
class ModelArguments:
    """The public pipeline to start from."""

    pretrained_model_name_or_path: str = option("Stable Diffusion pipeline: folder or Hub id")
    revision: str | None = option("revision of a Hub id", None)


@dataclass
class PrivacyArguments:
    """The budget, and what one step of DP-SGD does."""

    target_epsilon: float | None = option("budget; the noise is calibrated to it", None)
    target_delta: float | None = option("delta of the budget; required, below 1/N", None)
    noise_multiplier: float | None = option("sigma, instead of --target_epsilon", None)
    max_grad_norm: float = option("C, the clipping bound on one unit's gradient", 1.0)
    clipping: str = option(
        "how a unit's gradient is bounded by C: scaled down if larger (flat), always scaled to it "
        "(automatic), or each of the L tensors bounded by C / sqrt(L) (per_layer)",
        "flat",
        choices=CLIPPING_MODES,
    )
    expected_batch_size: int = option("B, expected units in a Poisson batch; q = B/N", 256)
    noise_multiplicity: int = option(
        "K, draws of (noise, timestep, flip) averaged per unit before its one clip", 1
    )
    secure_noise: bool = option(
        "noise and sampling from the operating system's cryptographic generator, hardened against "
        "floating-point attacks; slower",
        False,
    )
    debug_noise_seed: int | None = option(
        "reproducible noise, for debugging: everything it makes is stamped NOT PRIVATE", None
    )
    privacy_ledger: str | None = option(
        "ledger to record this run in, shared by all runs on the same data; default: "
        "OUTPUT_DIR/private/ledger.jsonl",
        None,
    )
    total_epsilon: float | None = option(
        "refuse to start if everything in the ledger, this run included, would exceed this", None
    )
    saliency_file: str | None = option(
        "saliency.json of select_saliency.py: train what it selected; its cost is composed, and "
        "--target_epsilon is for both; its ledger is used unless --privacy_ledger names another",
        None,
    )
    dry_run: bool = option("print the plan as JSON and stop", False)

    def __post_init__(self):
        if self.noise_multiplicity < 1:
            raise UsageError(f"--noise_multiplicity {self.noise_multiplicity} must be at least 1")
        if self.total_epsilon is not None and not self.total_epsilon > 0:
            raise UsageError(f"--total_epsilon {self.total_epsilon} must be positive")


@dataclass
class TrainingArguments:
    """The optimizer and the run."""

    output_dir: str = option("where the adapter, the statement, the card and the samples go")
    optimizer: str = option(
        "adamw, sgd, or adam_bc, whose second moment is corrected for the noise",
        "adamw",
        choices=["adamw", "sgd", "adam_bc"],
    )
    learning_rate: float = option("peak learning rate", 1e-3)
    lr_scheduler: str = option("learning rate schedule", "constant", choices=SCHEDULES)
    lr_warmup_steps: int = option("steps of warm-up", 0)
    adam_beta1: float = option("AdamW's beta1; the momentum of sgd", 0.9)
    adam_beta2: float = option("AdamW's beta2", 0.999)
    adam_weight_decay: float = option("AdamW's weight decay", 0.01)
    adam_epsilon: float = option("AdamW's epsilon", 1e-8)
    ema_decay: float = option(
        "publish an exponential moving average of the weights, which costs no privacy; 0: the last",
        0.0,
    )
    timestep_sampling: str = option(
        "which noise levels to train on: all alike, the middle, or the noisy end",
        "uniform",
        choices=["uniform", "logit_normal", "high_noise"],
    )
    snr_gamma: float | None = option("min-SNR weighting of the loss, such as 5", None)
    max_train_steps: int = option("private steps, empty batches included", 100)
    train_batch_size: int = option(
        "units per forward pass; changes speed and memory, never the result", 32
    )
    random_flip: bool = option("flip each draw left to right with probability 1/2", False)
    mixed_precision: str = option(
        "precision of the forward and backward pass; weights stay in fp32",
        "no",
        choices=["no", "bf16"],
    )
    gradient_checkpointing: bool = option("recompute activations to save memory", False)
    validation_prompt: list[str] = option(
        "prompts of the images drawn at the end into samples/, shown on the card; default: none",
        [""],
    )
    num_validation_images: int = option("how many images to draw at the end", 16)
    checkpointing_steps: int = option(
        "a checkpoint every so many steps, and at the first and the last; they cost no privacy", 20
    )
    checkpoints_total_limit: int = option("how many checkpoints to keep", 2)
    resume_from_checkpoint: str | None = option(
        "go on with the run in --output_dir: latest, or the name or path of a checkpoint; an older "
        "one charges the steps in between once more",
        None,
    )
    latents_dir: str | None = option(
        "where the encoded images are kept, for all runs on the same images; default: "
        "OUTPUT_DIR/private/latents",
        None,
    )
    discard_latents: bool = option(
        "when done, delete the encoded images and the other copies of the private ones", False
    )
    report_to: str | None = option(
        "tracker for step, learning rate and epsilon, such as tensorboard or wandb", None
    )
    seed: int | None = option(
        "seed of the adapter's start and of samples/; never of the noise", None
    )

    def __post_init__(self):
        if not 0 <= self.ema_decay < 1:
            raise UsageError(f"--ema_decay {self.ema_decay} must be at least 0 and below 1")
        if min(self.train_batch_size, self.checkpointing_steps, self.checkpoints_total_limit) < 1:
            raise UsageError(
                "--train_batch_size, --checkpointing_steps and --checkpoints_total_limit must be "
                "at least 1"
            )
        if self.num_validation_images < 0:
            raise UsageError("--num_validation_images must be at least 0")
        if not self.validation_prompt:
            raise UsageError("--validation_prompt needs a prompt; '' is one")
        if self.snr_gamma is not None and self.snr_gamma <= 0:
            raise UsageError(f"--snr_gamma {self.snr_gamma} must be positive")


def parse(*dataclasses: type, description: str) -> tuple:
    """Parse the command line into one object a dataclass; `--config FILE.yaml` gives defaults.

    Raises:
        UsageError: the YAML file is missing, is no mapping, or names an unknown argument.
    """
    for kind in dataclasses:  # each is a group of its own in --help
        kind._argument_group_name = kind.__doc__.strip().rstrip(".")
    parser = HfArgumentParser(
        list(dataclasses),
        usage="%(prog)s [--config FILE.yaml] [--argument VALUE ...]",
        description=description,
        formatter_class=_HelpFormatter,
    )
    parser.add_argument("--config", help="YAML file of arguments; the command line wins over it")
    config, _ = _config_option(sys.argv[1:])
    if config is not None:
        _apply_yaml(parser, Path(config))
    *parsed, _ = parser.parse_args_into_dataclasses(args_file_flag=None, look_for_args_file=False)
    _forget_token()
    return tuple(parsed)


def _forget_token() -> None:
    """Trackers publish the command line; a token must not be on it."""
    for index, word in enumerate(sys.argv[:-1]):
        if word in ("--hub_token", "--hub-token"):
            sys.argv[index + 1] = "***"
    sys.argv[:] = [
        f"{word.partition('=')[0]}=***" if re.match("--hub[_-]token=", word) else word
        for word in sys.argv
    ]


class _HelpFormatter(RawDescriptionHelpFormatter):
    """Keeps the script's docstring as written; one short line an option, with its default."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=100)

    def _get_help_string(self, action):
        default = action.default
        if not action.option_strings or default in (None, MISSING, SUPPRESS, False, [""]):
            return action.help
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        return f"{action.help} (default: {shown})"

    def _format_action_invocation(self, action):
        name = "-h, --help" if action.dest == "help" else action.option_strings[0]
        if action.nargs in (0, "?"):  # a switch
            return name
        value = {int: "N", float: "X"}.get(action.type, "TEXT")
        if action.choices:
            value = "{" + ",".join(map(str, action.choices)) + "}"
        return f"{name} {value}" + (" ..." if action.nargs == "+" else "")


def _config_option(argv: list[str]) -> tuple[str | None, list[str]]:
    from argparse import ArgumentParser

    first = ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    known, rest = first.parse_known_args(argv)
    return known.config, rest


def read_yaml(path: str | Path) -> dict:
    """The arguments in a YAML file.

    Raises:
        UsageError: it is missing, is not valid, or does not map names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise UsageError(f"--config {path}: there is no such file")
    try:
        values = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(f"--config {path} must map argument names to values")
    return values


def _apply_yaml(parser: HfArgumentParser, path: Path) -> None:
    values = read_yaml(path)
    actions = {action.dest: action for action in parser._actions}
    unknown = sorted(set(values) - set(actions))
    if unknown:
        raise UsageError(f"--config {path}: unknown argument {', '.join(unknown)}")
    for name, value in values.items():
        action = actions[name]
        if value is not None and action.nargs == "+" and not isinstance(value, list):
            value = [value]
        if value is not None and action.type in (int, float) and not isinstance(value, list):
            try:
                value = action.type(value)  # YAML reads 1e-5 as text
            except ValueError as error:
                raise UsageError(f"--config {path}: {name} is no number: {value}") from error
        action.default, action.required = value, False
