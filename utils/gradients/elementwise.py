"""Activations on a CPU: each number by its value alone, wherever it lies.

PyTorch computes them in vectors, and what is left at the end of a thread's share, of fewer numbers
than two vectors have, by another routine, which rounds some of them otherwise. One unit more in
front would bring other numbers there, and change the gradients of others. So nothing is left at an
end: what does not fill the threads' vectors is computed after the rest, with zeros behind it.
"""

import math
import warnings
from collections.abc import Callable
from functools import cache

import torch

VECTORS = 64  # numbers: whole vectors of any precision, two of them on every processor
GRAIN = 32768  # at::internal::GRAIN_SIZE: a thread more gets to work for as many numbers
GELU = 16384  # GELU_MIN_ELEMENTS_FOR_MULTI_THREADING: of more, each thread gets a share of gelu
# Those whose two routines differ; and their backward passes.
FORWARD = ("silu", "sigmoid", "softplus", "rsqrt")
BACKWARD = ("silu_backward", "gelu_backward", "sigmoid_backward", "softplus_backward")


@cache
def use_alike_activations() -> torch.library.Library:
    """Change how a CPU computes activations, in this process, while what is returned lives."""
    rules, aten = torch.library.Library("aten", "IMPL", "CPU"), torch.ops.aten
    kernels = {name: _by_value(getattr(aten, name).out, "out") for name in FORWARD}
    kernels["gelu"] = _by_value(aten.gelu.out, "out", GELU)
    kernels |= {name: _by_value(getattr(aten, name).grad_input, "grad_input") for name in BACKWARD}
    for name, kernel in kernels.items():
        override(rules, name, kernel)
    return rules


def override(rules: torch.library.Library, name: str, kernel: Callable, **options) -> None:
    """Register a kernel in place of PyTorch's own, without its warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[\\s\\S]*Overriding a previously registered kernel")
        rules.impl(name, kernel, allow_override=True, **options)


def _by_value(whole: Callable, target: str, eager: float = math.inf) -> Callable:
    """An operator of tensors of one shape, and of settings, that writes to `target`: the same, of
    each number by itself. Of more numbers than `eager` all threads get a share."""

    def apply(*arguments, **options) -> torch.Tensor:
        count = sum(isinstance(argument, torch.Tensor) for argument in arguments)
        tensors, settings = arguments[:count], arguments[count:]
        if not (tensors[0].is_floating_point() or tensors[0].is_complex()):
            tensors = [tensor.to(torch.get_default_dtype()) for tensor in tensors]
        out = torch.empty_like(tensors[0])
        if any(tensor.stride() != out.stride() for tensor in tensors):  # not dense, or not alike
            tensors = [tensor.contiguous() for tensor in tensors]
            out = torch.empty_like(tensors[0])
        flat, result = [_flatten(tensor) for tensor in tensors], _flatten(out)
        filled = _count_filled(len(result), eager)
        whole(*(x[:filled] for x in flat), *settings, **options, **{target: result[:filled]})
        if filled < len(result):
            rest = [_fill(x[filled:]) for x in flat]
            last = torch.empty_like(rest[0])
            whole(*rest, *settings, **options, **{target: last})
            result[filled:] = last[: len(result) - filled]
        return out

    return apply


def _flatten(dense: torch.Tensor) -> torch.Tensor:
    """Its numbers as they lie in memory."""
    return dense.as_strided((dense.numel(),), (1,))


def _count_filled(count: int, eager: float) -> int:
    """The most numbers, at most `count`, of which each thread's share is whole vectors."""
    while count:
        threads = torch.get_num_threads()
        if count <= eager:
            threads = min(threads, -(-count // GRAIN))
        if count % (VECTORS * threads) == 0:
            break
        count -= count % (VECTORS * threads)
    return count


def _fill(rest: torch.Tensor) -> torch.Tensor:
    """With zeros, to whole vectors; too few for a second thread."""
    return torch.nn.functional.pad(rest, (0, -len(rest) % VECTORS))
