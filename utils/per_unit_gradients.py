"""One backward pass -> one gradient row per privacy unit.

While `PerUnitGradients.recording` is open, the forward pass of every trainable Linear and Conv2d
goes through an autograd function of ours. Its backward pass returns the gradient of the layer's
input, as always, but no gradient of the weight: it computes that per unit with one batched matrix
product and adds it to the layer's slice of one flat buffer. Frozen layers cost nothing extra, there
are no hooks to pair, and recomputed (checkpointed) or reused layers need no special care.

Shapes: U units, K draws per unit, R = U * K rows of the batch with a unit's draws contiguous.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn

from utils.errors import UsageError

MIXES_ROWS = (nn.modules.batchnorm._BatchNorm,)


class PerUnitGradients:
    """The trainable leaves of a model, and the buffer their per-unit gradients go to.

    The rows follow `parameters`: the trainable tensors in the order of `model.named_parameters()`,
    each flattened.

    Raises:
        UsageError: nothing is trainable; a trainable parameter is not the weight or bias of a plain
            Linear or Conv2d, is shared, or is not fp32; a layer mixes rows of the batch.
    """

    def __init__(self, model: nn.Module):
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        if not named:
            raise UsageError("no parameter is trainable, so there is nothing to train privately")
        self.names = [name for name, _ in named]
        self.parameters = [parameter for _, parameter in named]
        self.num_parameters = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        self._slices, start = {}, 0
        for name, parameter in named:
            if parameter.dtype != torch.float32:
                raise UsageError(
                    f"trainable parameter {name} is {parameter.dtype}; it must be fp32"
                )
            self._slices[parameter] = (start, start + parameter.numel())
            start += parameter.numel()
        self._leaves = self._find_leaves(model)
        self._buffer, self._written = None, set()

    def _find_leaves(self, model: nn.Module) -> list[nn.Module]:
        leaves, owner = [], {}
        for name, module in model.named_modules():
            if isinstance(module, MIXES_ROWS):
                raise UsageError(f"{name} is a BatchNorm: it mixes the images of a batch")
            own = [p for p in module.parameters(recurse=False) if p.requires_grad]
            if own:
                _check_leaf(name, module)
                leaves.append(module)
            for parameter in own:
                if owner.setdefault(parameter, name) != name:
                    raise UsageError(f"{name} shares a trainable parameter with {owner[parameter]}")
        return leaves

    @contextmanager
    def recording(self, num_units: int) -> Iterator[torch.Tensor]:
        """Run forward and backward inside; yields the buffer [num_units, num_parameters], fp32.

        Call `backward()` on the SUM over units of each unit's own loss: row u then holds the
        gradient of the loss of unit u. The buffer is reused by the next recording.

        Raises:
            RuntimeError: on leaving, if a trainable parameter received no gradient.
        """
        if self._buffer is None or len(self._buffer) < num_units:
            self._buffer = torch.empty(num_units, self.num_parameters, device=self.device)
        rows = self._buffer[:num_units].zero_()
        self._written.clear()
        for leaf in self._leaves:
            leaf.forward = partial(_leaf_forward, leaf, self, rows)
        try:
            yield rows
        finally:
            for leaf in self._leaves:
                del leaf.forward
        silent = [
            n for n, p in zip(self.names, self.parameters, strict=True) if p not in self._written
        ]
        if silent:
            raise RuntimeError(f"no gradient reached {len(silent)} parameters, such as {silent[0]}")

    def add(self, rows: torch.Tensor, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        """Add [U, ...] per-unit gradients of `parameter` to its slice of `rows`."""
        start, stop = self._slices[parameter]
        rows[:, start:stop] += gradient.reshape(len(rows), -1)
        self._written.add(parameter)

    def assign(self, flat: torch.Tensor) -> None:
        """Set every parameter's `.grad` from one flat vector [num_parameters]."""
        for parameter in self.parameters:
            start, stop = self._slices[parameter]
            parameter.grad = flat[start:stop].view_as(parameter).clone()


def _check_leaf(name: str, module: nn.Module) -> None:
    if type(module) is nn.Linear:
        return
    if type(module) is not nn.Conv2d:
        kind = type(module).__name__
        raise UsageError(f"{name} ({kind}) has trainable parameters; only Linear and Conv2d may")
    if module.groups != 1 or module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise UsageError(
            f"{name}: grouped, named-padding or non-zero-padded Conv2d is not supported"
        )


def _leaf_forward(leaf, engine, rows, x):
    function = _UnitLinear if type(leaf) is nn.Linear else _UnitConv2d
    return function.apply(x, leaf.weight, leaf.bias, leaf, engine, rows)


def _record(engine, rows, leaf, weight_gradient, bias_gradient) -> None:
    """Store what a leaf's backward pass found; either callable is run only if it is needed."""
    if leaf.weight.requires_grad:
        engine.add(rows, leaf.weight, weight_gradient())
    if leaf.bias is not None and leaf.bias.requires_grad:
        engine.add(rows, leaf.bias, bias_gradient())


def _per_unit(x: torch.Tensor, num_units: int) -> torch.Tensor:
    """[R, ..., d] -> [U, K * ..., d]: a unit's draws and positions side by side."""
    if len(x) % num_units:
        raise RuntimeError(f"a layer saw {len(x)} rows for {num_units} units; it mixes rows")
    return x.reshape(num_units, -1, x.shape[-1])


class _UnitLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, leaf, engine, rows):
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.engine, ctx.rows = leaf, engine, rows
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        grad_units = _per_unit(grad_output, len(ctx.rows))  # [U, K*T, out]
        _record(
            ctx.engine,
            ctx.rows,
            ctx.leaf,
            lambda: grad_units.transpose(1, 2) @ _per_unit(x, len(ctx.rows)).to(grad_units.dtype),
            lambda: grad_units.sum(1, dtype=torch.float32),
        )
        grad_x = grad_output @ weight.to(grad_output.dtype) if ctx.needs_input_grad[0] else None
        return grad_x, None, None, None, None, None


class _UnitConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, leaf, engine, rows):
        ctx.save_for_backward(x, weight)
        ctx.leaf, ctx.engine, ctx.rows = leaf, engine, rows
        return F.conv2d(x, weight, bias, leaf.stride, leaf.padding, leaf.dilation)

    @staticmethod
    def backward(ctx, grad_output):
        x, weight = ctx.saved_tensors
        num_units = len(ctx.rows)
        _record(
            ctx.engine,
            ctx.rows,
            ctx.leaf,
            lambda: conv2d_unit_gradient(x.to(grad_output.dtype), grad_output, ctx.leaf, num_units),
            lambda: (
                grad_output.sum((2, 3), dtype=torch.float32)
                .view(num_units, -1, weight.shape[0])
                .sum(1)
            ),
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = torch.nn.grad.conv2d_input(
                x.shape,
                weight.to(grad_output.dtype),
                grad_output,
                ctx.leaf.stride,
                ctx.leaf.padding,
                ctx.leaf.dilation,
            )
        return grad_x, None, None, None, None, None


def conv2d_unit_gradient(x, grad_output, conv: nn.Conv2d, num_units: int) -> torch.Tensor:
    """Per-unit weight gradient [U, out, in, kh, kw] of a convolution.

    Args:
        x: [R, in, H, W]. grad_output: [R, out, Ho, Wo].

    The gradient correlates the two over positions, so either may be spread out over the kernel's
    offsets before one batched matrix product. The narrower one is: for LoRA, that is the output.
    """
    out_channels, in_channels, kh, kw = conv.weight.shape
    if (kh, kw) == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
        product = _channels_by_position(grad_output, num_units) @ _positions_by_channel(
            x, num_units
        )
        return product.view(num_units, out_channels, in_channels, 1, 1)
    if out_channels <= in_channels:
        shifted = _spread_output(grad_output, x.shape[2:], conv)  # [R, out*kh*kw, H*W]
        shifted = shifted.view(*shifted.shape[:2], *x.shape[2:])
        product = _channels_by_position(shifted, num_units) @ _positions_by_channel(x, num_units)
        product = product.view(num_units, out_channels, kh, kw, in_channels).flip(2, 3)
        return product.permute(0, 1, 4, 2, 3)
    spread = F.unfold(x, (kh, kw), conv.dilation, conv.padding, conv.stride)
    spread = spread.view(*spread.shape[:2], *grad_output.shape[2:])  # [R, in*kh*kw, Ho, Wo]
    product = _channels_by_position(grad_output, num_units) @ _positions_by_channel(
        spread, num_units
    )
    return product.view(num_units, out_channels, in_channels, kh, kw)


def _spread_output(grad_output, input_size, conv: nn.Conv2d) -> torch.Tensor:
    """For every input position and kernel offset, the output gradient that the weight there met.

    Input row y met kernel row i at output row (y + padding - i * dilation) / stride. Undo the
    stride by inserting zeros, pad so that all of these exist, and unfold; the offsets come out
    reversed.
    """
    pads = []
    (sh, sw), rows_out, cols_out = conv.stride, grad_output.shape[2], grad_output.shape[3]
    if (sh, sw) != (1, 1):
        size = ((rows_out - 1) * sh + 1, (cols_out - 1) * sw + 1)
        stuffed = grad_output.new_zeros(*grad_output.shape[:2], *size)
        stuffed[:, :, ::sh, ::sw] = grad_output
        grad_output = stuffed
    for axis in (1, 0):
        reach = (conv.kernel_size[axis] - 1) * conv.dilation[axis]
        before = reach - conv.padding[axis]
        after = input_size[axis] + reach - before - grad_output.shape[2 + axis]
        pads += [before, after]
    return F.unfold(F.pad(grad_output, pads), conv.kernel_size, conv.dilation)


def _channels_by_position(x: torch.Tensor, num_units: int) -> torch.Tensor:
    """[R, c, h, w] -> [U, c, K*h*w]."""
    return _positions_by_channel(x, num_units).transpose(1, 2)


def _positions_by_channel(x: torch.Tensor, num_units: int) -> torch.Tensor:
    """[R, c, h, w] -> [U, K*h*w, c]."""
    return _per_unit(x.permute(0, 2, 3, 1), num_units)
