"""The options of the public stage."""

import math
from dataclasses import dataclass

from utils.arguments.parsing import option
from utils.arguments.values import check_between, check_seed, choose_precision
from utils.errors import UsageError

# What --start_from takes from its base.
OF_A_BASE = ["autoencoder_from", "autoencoder_channels", "latent_channels", "unet_channels"]
OF_A_BASE += ["transformer_width", "transformer_layers", "text_width", "text_layers"]
OF_A_BASE += ["vocab_size", "max_tokens", "autoencoder_steps", "autoencoder_learning_rate"]
OF_A_BASE += ["kl_weight", "prediction_type"]
# Numbers of which there must be one.
COUNTS = ["latent_channels", "autoencoder_steps", "denoiser_steps", "train_batch_size"]
COUNTS += ["checkpointing_steps", "transformer_layers", "text_width", "text_layers", "vocab_size"]


def count_groups(channels: tuple[int, ...]) -> int:
    """In how many groups layers of such widths are normalized: at most 16, of two channels or more;
    0 or a number that does not divide all, where they cannot be."""
    return min(16, channels[0] // 2)


@dataclass
class PretrainArguments:
    """Sizes and schedule of the public stage."""

    output_dir: str = option("where the pipeline folder goes")
    autoencoder_channels: list[int] = option(
        "autoencoder widths; n of them divide the resolution by 2^(n-1)", [16, 32, 64]
    )
    latent_channels: int = option(
        "of the autoencoder: more keep more of an image, of colour photographs above all", 4
    )
    autoencoder_from: str | None = option(
        "a public pipeline, folder or Hub id, whose autoencoder is taken as it is: none is trained",
        None,
    )
    start_from: str | None = option(
        "a public pipeline of this script, folder or Hub id, to train on: its autoencoder is kept, "
        "and its denoiser, text encoders and tokenizers are what training starts from, in their "
        "sizes; for a second public stage",
        None,
    )
    architecture: str = option(
        "of the denoiser: unet, as in Stable Diffusion 1, trained by DDPM; or sd3, a transformer "
        "as in Stable Diffusion 3, trained as a flow",
        "unet",
        choices=["unet", "sd3"],
    )
    transformer_width: int = option("of sd3, a multiple of 32", 192)
    transformer_layers: int = option("of sd3", 6)
    unet_channels: list[int] = option("U-Net widths, one a resolution", [64, 128])
    text_width: int = option("width of the text encoder", 128)
    text_layers: int = option("layers of the text encoder", 2)
    vocab_size: int = option("at most so many tokens are learned from the captions", 2000)
    max_tokens: int = option("longest caption, in tokens", 16)
    prediction_type: str = option("of unet", "v_prediction", choices=["epsilon", "v_prediction"])
    autoencoder_steps: int = option("optimizer steps of the autoencoder", 1000)
    denoiser_steps: int = option("optimizer steps of the denoiser and the text encoder", 2600)
    autoencoder_learning_rate: float = option("peak learning rate of the autoencoder", 1e-3)
    learning_rate: float = option("peak learning rate of the denoiser and the text encoder", 1e-3)
    kl_weight: float = option("weight of the autoencoder's KL term, per latent number", 1e-3)
    train_batch_size: int = option("images per process and step", 128)
    caption_dropout: float = option("share of captions replaced by '' (for guidance)", 0.1)
    ema_decay: float = option("decay of the moving average of the weights", 0.999)
    checkpointing_steps: int = option("save the state every so many steps", 1000)
    mixed_precision: str | None = option(
        "no or bf16; default: that of accelerate launch, or no", None
    )
    seed: int = option("seed of everything here (nothing here is private)", 0)

    def __post_init__(self):
        check_seed(self.seed)
        for name in COUNTS:
            check_between(name, getattr(self, name), 1, math.inf)
        check_between("max_tokens", self.max_tokens, 3, math.inf)  # the first and last say nothing
        for name in ("kl_weight", "autoencoder_learning_rate", "learning_rate"):
            check_between(name, getattr(self, name), 0, math.inf)
        check_between("ema_decay", self.ema_decay, 0, 1)
        if not 0 <= self.caption_dropout <= 1:
            raise UsageError(f"--caption_dropout {self.caption_dropout} must be from 0 to 1")
        for name in ("autoencoder_channels", "unet_channels"):
            widths = getattr(self, name)
            groups = count_groups(widths)
            if groups < 1 or any(width < 1 or width % groups for width in widths):
                raise UsageError(
                    f"--{name} {' '.join(map(str, widths))}: the first must be at least 2, and all "
                    f"must be multiples of {max(groups, 1)} (half the first, at most 16)"
                )
        if self.start_from is not None:
            plain = type(self)(output_dir=self.output_dir)
            given = [name for name in OF_A_BASE if getattr(self, name) != getattr(plain, name)]
            if given:
                raise UsageError(f"--start_from keeps that of its base: leave out --{given[0]}")
        if self.architecture == "sd3":
            if self.transformer_width < 32 or self.transformer_width % 32:
                raise UsageError("--transformer_width must be a multiple of 32")
            if self.text_width % 2:
                raise UsageError("--text_width must be even: two text encoders share it")
        encoders = 2 if self.architecture == "sd3" else 1
        if self.text_width >= 64 * encoders and self.text_width % (32 * encoders):
            raise UsageError(
                f"--text_width {self.text_width} must be below {64 * encoders}, or a multiple of "
                f"{32 * encoders}: an attention head reads 32 numbers"
            )
        self.mixed_precision = choose_precision(self.mixed_precision)
