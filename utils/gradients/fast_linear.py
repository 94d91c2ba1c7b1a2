"""Linear layers on a CPU: their products through oneDNN, and each row by itself.

PyTorch computes fp32 linear layers with MKL, which keeps to AVX2 on processors that are not
Intel's; oneDNN, which it has for convolutions and bf16, uses what there is. The operator for it is
the one that torch.compile calls. MKL also adds a row up by where it lies in memory, and by where
its threads' shares end: one unit more would round those behind it anew. On a GPU, or under
autocast, nothing changes.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

ALIKE = 4  # numbers: rows of a multiple of so many begin alike, at multiples of 16 bytes
ONEDNN = torch.backends.mkldnn.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [..., in] times weight [out, in], plus bias: [..., out]; for use without autograd."""
    if not is_plain(x, weight):
        return F.linear(x, weight, bias)
    if ONEDNN:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    if zeros := -x.shape[-1] % ALIKE:
        x, weight = F.pad(x, (0, zeros)), F.pad(weight, (0, zeros))
    return F.linear(x.contiguous(), weight.contiguous(), bias)


def is_pixelwise(conv: nn.Conv2d) -> bool:
    """Whether it is a linear layer of each pixel."""
    sizes = (conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return sizes == ((1, 1), (1, 1), (0, 0), 1)


def convolve(conv: nn.Conv2d, x: torch.Tensor, weight: torch.Tensor, bias) -> torch.Tensor:
    """`conv` of x [R, in, H, W], by these weights: [R, out, H, W]; for use without autograd. A thin
    one of single pixels rounds a row by its place, where rows do not begin alike."""
    uneven = x[0].numel() % ALIKE or weight.shape[0] % ALIKE or weight.shape[1] % ALIKE
    if uneven and is_pixelwise(conv) and is_plain(x, weight):
        return linear(x.movedim(1, -1), weight.flatten(1), bias).movedim(-1, 1)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, conv.dilation)


def use_fast_linear(model: nn.Module) -> None:
    """Let the plain Linear layers of `model` that stay frozen go through `linear`."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(_forward, module)


def _forward(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    frozen = not any(parameter.requires_grad for parameter in layer.parameters(recurse=False))
    if not frozen or not is_plain(x, layer.weight):
        return F.linear(x, layer.weight, layer.bias)
    return _FrozenLinear.apply(x, layer.weight, layer.bias)


def is_plain(x: torch.Tensor, weight: torch.Tensor) -> bool:
    if x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return x.dtype == weight.dtype == torch.float32


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (weight,) = ctx.saved_tensors
        return linear(grad_output, weight.t()), None, None
