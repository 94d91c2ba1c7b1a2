"""Values that several groups of options share, and their checks: precisions, grey levels, seeds."""

import math
import os
import sys
from functools import cache

from utils.errors import UsageError

PRECISIONS = ("no", "bf16")
INTENSITY_HELP = (
    "LOW HIGH: the levels that become black and white in grey files of more than 8 bits, which are "
    "left out without it; it is public"
)
LARGEST_SEED = 2**32 - 1  # of NumPy, which is seeded too


def choose_precision(asked: str | None) -> str:
    """`--mixed_precision`; where it is not given, that of `accelerate launch`; else fp32, `no`.

    Raises:
        UsageError: fp16, or what there is not.
    """
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    precision, source = asked, "--mixed_precision"
    if asked is None:
        precision, source = (launched or "no").lower(), "accelerate launch --mixed_precision"
    if precision == "fp16":
        raise UsageError(
            f"{source} fp16 is not supported: its loss scaling looks at the data; use bf16"
        )
    if precision not in PRECISIONS:
        raise UsageError(f"{source} {precision}: there are {' and '.join(PRECISIONS)}")
    if precision == "bf16":
        _warn_of_slow_bf16()
    return precision


@cache  # once in a process
def _warn_of_slow_bf16() -> None:
    """Say so if a CPU computes that oneDNN has no bf16 for: of x86, one without AVX-512."""
    import torch
    from accelerate.utils import parse_flag_from_env

    if torch.accelerator.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        return
    if not torch.backends.mkldnn.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return
    if os.environ.get("RANK", "0") == "0":
        print(
            "warning: this processor computes in bf16 several times as slowly as in fp32; take "
            "--mixed_precision no, unless a run that began in bf16 goes on",
            file=sys.stderr,
        )


def check_range(levels: list[float] | None) -> tuple[float, float] | None:
    """`--intensity_range` as LOW and HIGH.

    Raises:
        UsageError: there are not two numbers, the first below the second.
    """
    if levels is None:
        return None
    if len(levels) != 2 or not -math.inf < levels[0] < levels[1] < math.inf:
        raise UsageError(
            f"--intensity_range {' '.join(map(str, levels))} must be two numbers, LOW below HIGH"
        )
    return levels[0], levels[1]


def check_between(name: str, value: float, low: float, high: float) -> None:
    """Raises: UsageError unless low <= value < high."""
    if not low <= value < high:
        limit = "" if high == math.inf else f" and below {high:g}"
        raise UsageError(f"--{name} {value} must be at least {low:g}{limit}, and finite")


def check_positive(name: str, value: float | None) -> None:
    """Raises: UsageError unless it is positive and finite, or was not given."""
    if value is not None and not 0 < value < math.inf:
        raise UsageError(f"--{name} {value} must be positive and finite")


def check_seed(seed: int | None) -> None:
    """Raises: UsageError if a generator cannot take it."""
    if seed is not None and not 0 <= seed <= LARGEST_SEED:
        raise UsageError(f"--seed {seed} must be from 0 to {LARGEST_SEED}")
