"""Formulas for the operations that PyTorch's counter does not know, for `FlopCounterMode`."""

from math import prod

import torch
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count


def linear(x_shape, weight_shape, *_, **__) -> int:
    """The oneDNN product that fp32 linear layers go through."""
    return 2 * prod(x_shape) * weight_shape[0]


def add_product(_, x_shape, y_shape, **__) -> int:
    return 2 * prod(x_shape) * y_shape[1]


def attention(query_shape, key_shape, value_shape, *_, **__) -> int:
    return sdpa_flop_count(query_shape, key_shape, value_shape)


def attention_backward(grad_shape, query_shape, key_shape, value_shape, *_, **__) -> int:
    return sdpa_backward_flop_count(grad_shape, query_shape, key_shape, value_shape)


COUNTED = {
    torch.ops.mkldnn._linear_pointwise: linear,
    torch.ops.aten.addmm_: add_product,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
}
