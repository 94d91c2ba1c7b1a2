"""Group norm on a CPU: each image by itself, wherever it lies in a batch.

Of images in channels_last PyTorch shares out the pixels of a whole batch among its threads, if an
image has 1,024 of them (backward: 2,048): a group that lies across a border is added up in two
parts. One unit more in front would move the borders into other units, and change their gradients:
under autocast to bf16 by a tenth of C in all, of 30. In the usual layout a group is one thread's.
"""

from collections.abc import Callable
from functools import cache

import torch

from utils.gradients.elementwise import override

# By operator, how many tensors of images come first: a gradient, too, in the second.
TENSORS = {"native_group_norm": 1, "native_group_norm_backward": 2}


@cache
def use_whole_groups() -> torch.library.Library:
    """Change how several threads of a CPU compute group norm, in this process, while what is
    returned lives."""
    rules = torch.library.Library("aten", "IMPL", "CPU")
    for name, count in TENSORS.items():
        kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
        override(rules, name, _lay_out(kernel, count), with_keyset=True)
    return rules


def _lay_out(kernel, count: int) -> Callable:
    """The same kernel, of its first tensors in the usual layout."""

    def apply(keys, *arguments):
        tensors, others = arguments[:count], arguments[count:]
        if torch.get_num_threads() > 1:
            tensors = [tensor.contiguous() for tensor in tensors]
        return kernel.call_boxed(keys, *tensors, *others)

    return apply
