"""Attention to few keys under a CPU's autocast: in fp32.

Autocast would compute it in bf16, whose kernel is three to six times as slow as that of fp32 where
keys are few (forward and backward, keys of 8 to 64 numbers). What attends to more, or runs on a GPU
or without autocast, is left alone.
"""

import warnings
from functools import cache

import torch
import torch.nn.functional as F

FEW = 128  # keys: with twice as many neither is faster by much


@cache
def use_fast_attention() -> torch.library.Library:
    """Change autocast's rule for attention, in this process, while what is returned lives."""
    rules = torch.library.Library("aten", "IMPL", "AutocastCPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "[\\s\\S]*Overriding a previously registered kernel")
        rules.impl("scaled_dot_product_attention", _attend, allow_override=True)
    return rules


def _attend(query, key, value, attn_mask=None, *rest, **options) -> torch.Tensor:
    """As F.scaled_dot_product_attention, query [..., L, E], key [..., S, E], value [..., S, V]; the
    result [..., L, V] is in the precision that it was computed in."""
    dtype = torch.float32 if key.shape[-2] <= FEW else torch.get_autocast_dtype("cpu")
    if query.dtype == torch.float64:  # which autocast leaves alone
        dtype = torch.float64
    if attn_mask is not None and attn_mask.is_floating_point():
        attn_mask = attn_mask.to(dtype)
    with torch.autocast("cpu", enabled=False):
        parts = (part.to(dtype) for part in (query, key, value))
        return F.scaled_dot_product_attention(*parts, attn_mask, *rest, **options)
