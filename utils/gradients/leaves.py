"""The layers whose per-unit gradients we know, each as an autograd function.

The backward pass of a leaf returns the gradient of the layer's input, as always, but none of its
weights: it hands those, unit by unit, to a `Recording`.

Shapes: U units, K draws a unit, R = U * K rows of the batch with a unit's draws contiguous; T
positions of a unit, over all its draws.
"""

import torch
import torch.nn.functional as F
from diffusers.models.normalization import RMSNorm
from torch import nn
from torch.autograd.function import once_differentiable

from utils.errors import UsageError
from utils.gradients.fast_linear import convolve, linear
from utils.gradients.products import by_unit, conv2d_unit_gradient, product_is_smaller
from utils.gradients.recording import Recording

LEAVES = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm, RMSNorm, nn.Embedding)


def check_leaf(name: str, module: nn.Module) -> None:
    """Raises: UsageError if the per-unit gradients of this module are not known."""
    kind = type(module)
    if kind not in LEAVES:
        known = ", ".join(dict.fromkeys(leaf.__name__ for leaf in LEAVES))
        raise UsageError(
            f"{name} ({kind.__name__}) has trainable parameters; only plain {known} may"
        )
    if kind is nn.Conv2d and (
        module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str)
    ):
        raise UsageError(
            f"{name}: grouped, named-padding or non-zero-padded Conv2d is not supported"
        )
    if kind is nn.Embedding and (
        module.max_norm is not None or module.scale_grad_by_freq or module.sparse
    ):
        raise UsageError(
            f"{name}: Embedding with max_norm, scale_grad_by_freq or sparse is not supported"
        )


def run_leaf(leaf: nn.Module, record: Recording, x: torch.Tensor) -> torch.Tensor:
    """`leaf(x)`, whose backward pass hands `record` each unit's gradients.

    Raises:
        MixedRows: see `Recording.check_rows`.
    """
    record.check_rows(x)
    if type(leaf) is nn.Linear:
        return _UnitLinear.apply(x, leaf.weight, leaf.bias, leaf, record)
    if type(leaf) is nn.Conv2d:
        return _UnitConv2d.apply(x, leaf.weight, leaf.bias, leaf, record)
    if type(leaf) is nn.Embedding:
        return _UnitEmbedding.apply(leaf.weight, x, leaf, record)
    if type(leaf) is nn.GroupNorm:
        normalised = F.group_norm(x, leaf.num_groups, None, None, leaf.eps)
        return _UnitScale.apply(
            normalised.transpose(1, -1), leaf.weight, leaf.bias, leaf, record
        ).transpose(1, -1)
    if type(leaf) is RMSNorm:  # of diffusers, which works in fp32
        variance = x.float().square().mean(-1, keepdim=True)
        normalised = x * torch.rsqrt(variance + leaf.eps)
    elif type(leaf) is nn.RMSNorm:
        normalised = F.rms_norm(x, leaf.normalized_shape, None, leaf.eps)
    else:
        normalised = F.layer_norm(x, leaf.normalized_shape, None, None, leaf.eps)
    bias = getattr(leaf, "bias", None)
    return _UnitScale.apply(normalised, leaf.weight, bias, leaf, record)


class _UnitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, leaf, record):
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.record = leaf, record
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        leaf, record = ctx.leaf, ctx.record
        if leaf.weight.requires_grad:
            record.add_products(leaf, x, grad_output)
        if leaf.bias is not None and leaf.bias.requires_grad:
            grads = by_unit(grad_output, record.num_units)  # [U, T, out]
            record.add_rows(leaf.bias, grads.sum(1, dtype=torch.float32))
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = linear(grad_output, weight.t().to(grad_output.dtype))
        return grad_x, None, None, None, None


class _UnitConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, leaf, record):
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.record = leaf, record
        return convolve(leaf, x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        leaf, record = ctx.leaf, ctx.record
        if leaf.weight.requires_grad:
            positions = grad_output[0, 0].numel() * len(x) // record.num_units
            if product_is_smaller(positions, len(weight), weight[0].numel()):
                same = x.to(grad_output.dtype)
                rows = conv2d_unit_gradient(same, grad_output, leaf, record.num_units)
                record.add_rows(leaf.weight, rows)
            else:
                record.add_factors(leaf, x, grad_output)
        if leaf.bias is not None and leaf.bias.requires_grad:
            sums = grad_output.sum((2, 3), dtype=torch.float32)
            record.add_rows(leaf.bias, by_unit(sums, record.num_units).sum(1))
        grad_x = None
        if ctx.needs_input_grad[0]:
            same = weight.to(grad_output.dtype)
            geometry = (leaf.stride, leaf.padding, leaf.dilation)
            grad_x = torch.nn.grad.conv2d_input(x.shape, same, grad_output, *geometry)
        return grad_x, None, None, None, None


class _UnitScale(torch.autograd.Function):
    """x * weight + bias over the last dimensions: what a normalisation layer learns."""

    @staticmethod
    def forward(ctx, x, weight, bias, leaf, record):
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.record = leaf, record
        scaled = x * weight if bias is None else torch.addcmul(bias, x, weight)
        return scaled.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        # Not the saved weight: under checkpointing that is a copy.
        for parameter, gradient in (
            (ctx.leaf.weight, grad_output * x),
            (getattr(ctx.leaf, "bias", None), grad_output),
        ):
            if parameter is not None and parameter.requires_grad:
                summands = gradient.flatten(-parameter.dim())
                rows = by_unit(summands, ctx.record.num_units).sum(1, dtype=torch.float32)
                ctx.record.add_rows(parameter, rows)
        return (grad_output * weight).to(x.dtype), None, None, None, None


class _UnitEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, ids, leaf, record):
        ctx.save_for_backward(ids)
        ctx.leaf, ctx.record = leaf, record
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        (ids,) = ctx.saved_tensors
        if ctx.leaf.padding_idx is not None:
            grad_output = grad_output.masked_fill((ids == ctx.leaf.padding_idx)[..., None], 0.0)
        ctx.record.add_factors(ctx.leaf, ids, grad_output)
        return None, None, None, None
