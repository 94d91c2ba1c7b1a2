"""fp32 means fp32: what is clipped and summed is never computed in TF32 or bf16.

Those keep 10 or 7 bits, so a norm could come out too small, and a contribution too large.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator

from utils.errors import UsageError
from utils.gradients.fast_linear import linear

SMALL = 2.0**-12  # 1 + SMALL is 1 in TF32 and in bf16


def name_precision(accelerator: Accelerator) -> str:
    """That of forward and backward passes, as a statement has it: fp32 or bf16."""
    return "fp32" if accelerator.mixed_precision == "no" else accelerator.mixed_precision


def describe_arithmetic(device: torch.device) -> dict:
    """What this process rounds by. One unit more in front hands each one behind it to another."""
    if device.type == "cpu":
        name = torch.backends.cpu.get_cpu_capability()
        name = f"{name}, {torch.get_num_threads()} threads"
    else:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return {"device": f"{device.type} {name}".strip(), "torch": torch.__version__}


@contextmanager
def highest_precision() -> Iterator[None]:
    """Within this context, fp32 products are computed in fp32.

    cuDNN uses TF32 for convolutions unless it is asked not to, and a library can turn it on for
    products.

    Raises:
        RuntimeError: this build of PyTorch does not take the setting.
    """
    backends = torch.backends
    operations = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn)
    operations += (backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        if any(operation.fp32_precision != "ieee" for operation in operations):
            raise RuntimeError("PyTorch computes fp32 products at a lower precision (TF32)")
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def check_products(device: torch.device) -> None:
    """Multiply numbers that a lower precision would round, on each way that gradients take.

    A library may be told by the environment, where PyTorch does not see it: oneDNN computes in
    bf16 under ONEDNN_DEFAULT_FPMATH_MODE=BF16.

    Raises:
        UsageError: a product is not that of fp32.
    """
    ones = torch.full((64, 64), 1.0 + SMALL, device=device)
    images = ones.expand(32, 8, 64, 64).movedim(3, 1)  # channels last
    images = images.contiguous(memory_format=torch.channels_last)
    middle = F.pad(ones[:, :, None, None], (1, 1, 1, 1))  # a kernel of 3 x 3, of which one counts
    with highest_precision(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        found = {
            "mm": ones @ ones,
            "bmm": ones.expand(4, 64, 64) @ ones.expand(4, 64, 64),
            "linear": linear(ones, ones),
            "conv2d": F.conv2d(images, middle),
        }
    exact = 64 * (1 + SMALL) ** 2
    wrong = [name for name, got in found.items() if (got / exact - 1).abs().max() > SMALL / 16]
    if wrong:
        raise UsageError(
            f"fp32 products ({', '.join(wrong)}) are computed at a lower precision here, so that "
            "no contribution could be bounded exactly: unset ONEDNN_DEFAULT_FPMATH_MODE and "
            "DNNL_DEFAULT_FPMATH_MODE, and whatever else asks for bf16 or TF32; "
            "--mixed_precision bf16 is the way to train faster"
        )
