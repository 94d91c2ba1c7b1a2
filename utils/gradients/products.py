"""The tensor mathematics of per-unit gradients: products of inputs and output gradients, by unit.

The gradient of a weight is a sum of products over positions, G^T X. Where a unit's product would be
larger than its factors, norms and weighted sums come from the factors (Goodfellow 2015; Bu et al.
2023).

Shapes: U units, K draws a unit, R = U * K rows of the batch with a unit's draws contiguous; T
positions of a unit, over all its draws.
"""

import torch
import torch.nn.functional as F
from torch import nn

from utils.gradients.fast_linear import ALIKE

EPS_32, EPS_64 = torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps
TINY_32 = torch.finfo(torch.float32).tiny
LARGEST_FACTOR = 1e15  # so that a product of two, over many positions, is far from fp32's limit
CHUNK = 1024  # squares that are added up in fp32
CACHED = 2**19  # numbers in fp64 that a processor's cache holds


def by_unit(x: torch.Tensor, num_units: int) -> torch.Tensor:
    """[R, ..., d] -> [U, K * ..., d]: a unit's draws and positions side by side."""
    return x.reshape(num_units, -1, x.shape[-1])


def squared_norms_of_rows(parts: list[torch.Tensor]) -> torch.Tensor:
    """||row||^2 of every part: L tensors [U, size] -> [U, L], fp64; never below the true one.

    An fp32 sum drifts over millions of squares, so they are added up in chunks, and the chunks in
    fp64. What rounding within a chunk, and squares too small for fp32, could hide is added.
    """
    norms = torch.stack([_chunked_norms(rows) for rows in parts], 1).double()
    tiny = norms.new_tensor([rows.shape[1] * TINY_32 for rows in parts])
    return norms.square() * (1 + (CHUNK + 4) * EPS_32) + tiny


def _chunked_norms(rows: torch.Tensor) -> torch.Tensor:
    size = rows.shape[1]
    if size <= CHUNK:
        return torch.linalg.vector_norm(rows, dim=1).double()
    whole = size // CHUNK * CHUNK
    chunks = torch.linalg.vector_norm(rows[:, :whole].unflatten(1, (-1, CHUNK)), dim=2)
    rest = torch.linalg.vector_norm(rows[:, whole:], dim=1, keepdim=True)
    return torch.linalg.vector_norm(torch.cat([chunks, rest], 1), dim=1, dtype=torch.float64)


def product_is_smaller(positions: int, out_features: int, in_features: int) -> bool:
    """Whether one unit's weight gradient holds fewer numbers than the factors it is made of.

    It is also when multiplying out costs less than the norm by Gram matrices does.
    """
    return out_features * in_features <= positions * (out_features + in_features)


def factor_matrices(leaf, x, grad_output, num_units: int) -> tuple[torch.Tensor, torch.Tensor]:
    """X and G such that the weight gradient of unit u is G[u]^T X[u].

    Returns:
        X: [U, T, in], or for an Embedding [U, T] integers that stand for one-hot vectors.
        G: [U, T, out], fp32.
    """
    if type(leaf) is nn.Embedding:
        return x.reshape(num_units, -1), by_unit(grad_output, num_units).float()
    if type(leaf) is nn.Conv2d:
        x = F.unfold(x.float(), leaf.kernel_size, leaf.dilation, leaf.padding, leaf.stride)
        x, grad_output = x.transpose(1, 2), grad_output.flatten(2).transpose(1, 2)
    return by_unit(x, num_units).float(), by_unit(grad_output, num_units).float()


def squared_norms_of_products(x: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """||G[u]^T X[u]||^2 for every unit, without the product: the sum of XX^T * GG^T. [U], fp64.

    Never below the true norm, nor below that of the product as fp32 will round it
    (`sum_of_products`), for any input: what rounding could hide is added. That is at most
    eps (in + out + T^2) L^2 of the sum here, in fp64, and eps T L of the product, in fp32; L, the
    sum over positions of |x| |g|, stands for all terms that may cancel (Higham 2002, section 3.1).

    A unit with a position longer than `LARGEST_FACTOR` gets infinity: its product could overflow.
    """
    squares, width = _gram(grads), grads.shape[2]
    lengths = squares.diagonal(dim1=1, dim2=2)  # |g|^2 of each position
    largest, terms = lengths.amax(1), lengths
    if x.is_floating_point():
        gram, width = _gram(x), width + x.shape[2]
        lengths = gram.diagonal(dim1=1, dim2=2)
        largest, terms = torch.maximum(largest, lengths.amax(1)), terms * lengths
    else:
        gram, width = x[:, :, None] == x[:, None, :], width + 1
    positions, terms = grads.shape[1], terms.sqrt().sum(1)  # L
    squared = (squares * gram).sum((1, 2))
    hidden = (width + positions**2 + 8) * EPS_64 * terms.square()
    norms = (squared.clamp_min(0) + hidden).sqrt() + (positions + 2) * EPS_32 * terms
    norms += positions * width * TINY_32  # of products too small for fp32
    usable = largest <= LARGEST_FACTOR**2  # not for NaN
    return norms.square().masked_fill(~usable, torch.inf)


def _gram(x: torch.Tensor) -> torch.Tensor:
    """The products of every two positions: [U, T, d] -> [U, T, T], fp64."""
    few = min(len(x), max(1, CACHED // x[0].numel()))
    while len(x) % few:  # groups of one size, so that every unit meets the same rounding
        few -= 1
    parts = map(torch.Tensor.double, x.split(few))  # one at a time
    return torch.cat([part @ part.transpose(1, 2) for part in parts])


def unit_products(x: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """G[u]^T X[u] for every unit: [U, T, in], [U, T, out] -> [U, out, in].

    The narrower matrix goes first: MKL takes a quarter of the time then. It adds up by where a
    unit's matrix lies in memory, so all begin alike.
    """
    width, height = x.shape[2], grads.shape[2]
    if width % ALIKE or height % ALIKE:
        x, grads = F.pad(x, (0, -width % ALIKE)), F.pad(grads, (0, -height % ALIKE))
        return unit_products(x, grads)[:, :height, :width]
    if x.shape[2] < grads.shape[2]:
        return (x.transpose(1, 2) @ grads).transpose(1, 2)
    return grads.transpose(1, 2) @ x


def products(x: torch.Tensor, grads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """G[u]^T X[u] for every unit: [U, size of the weight]."""
    if x.is_floating_point():
        return unit_products(x, grads).flatten(1)
    each = [sum_of_products(i[None], g[None], weight) for i, g in zip(x, grads, strict=True)]
    return torch.stack(each).flatten(1).float()


def sum_of_products(x: torch.Tensor, grads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The sum over units of G[u]^T X[u], in the shape of `weight`, in fp64.

    The positions of one unit may be a million times as large as their sum, and cancel: in fp32 what
    is added while one of them waits for the other would be lost, and that is of other units.
    """
    grads = grads.flatten(0, 1).double()
    if x.is_floating_point():
        return (grads.T @ x.flatten(0, 1).double()).view_as(weight)
    return grads.new_zeros(weight.shape).index_add_(0, x.flatten(), grads)


def weighted_sum_of_rows(scales: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The sum over units of scales[u] rows[u]: [U], [U, size] -> [size], fp64.

    Nor may it be in fp32, where one unit more can lift a running sum above a power of two, and what
    is added next, of thousands of others, is rounded as never before.
    """
    columns = max(1, CACHED // len(rows))
    return torch.cat([scales.double() @ part.double() for part in rows.split(columns, 1)])


def conv2d_unit_gradient(x, grad_output, conv: nn.Conv2d, num_units: int) -> torch.Tensor:
    """Per-unit weight gradient [U, out, in, kh, kw] of a convolution.

    Args:
        x: [R, in, H, W]. grad_output: [R, out, Ho, Wo].

    The gradient correlates the two over positions, so either may be spread out over the kernel's
    offsets before one batched matrix product. The narrower one is: for LoRA, that is the output.
    """
    out_channels, in_channels, kh, kw = conv.weight.shape
    if (kh, kw) == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0):
        return _correlate(grad_output, x, num_units)[..., None, None]
    if out_channels <= in_channels:
        shifted = _spread_output(grad_output, x.shape[2:], conv)  # [R, out*kh*kw, H*W]
        shifted = shifted.view(*shifted.shape[:2], *x.shape[2:])
        product = _correlate(shifted, x, num_units)
        product = product.reshape(num_units, out_channels, kh, kw, in_channels)
        return product.flip(2, 3).permute(0, 1, 4, 2, 3)
    spread = F.unfold(x, (kh, kw), conv.dilation, conv.padding, conv.stride)
    spread = spread.view(*spread.shape[:2], *grad_output.shape[2:])  # [R, in*kh*kw, Ho, Wo]
    product = _correlate(grad_output, spread, num_units)
    return product.reshape(num_units, out_channels, in_channels, kh, kw)


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


def _correlate(grads: torch.Tensor, x: torch.Tensor, num_units: int) -> torch.Tensor:
    """The sum over positions of each two channels' products: [R, c, h, w], [R, d, h, w] ->
    [U, c, d]."""
    x, grads = _positions_by_channel(x, num_units), _positions_by_channel(grads, num_units)
    return unit_products(x, grads)


def _positions_by_channel(x: torch.Tensor, num_units: int) -> torch.Tensor:
    """[R, c, h, w] -> [U, K*h*w, c]."""
    return by_unit(x.permute(0, 2, 3, 1), num_units)
