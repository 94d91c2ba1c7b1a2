"""Under a CPU's autocast, attention to few keys is that of fp32, and nothing else changes."""

import pytest
import torch
import torch.nn.functional as F

from utils.gradients.short_attention import FEW, use_fast_attention


def attend(keys: int, **options) -> list[torch.Tensor]:
    """The result, then the gradients of query, key and value."""
    draws = torch.Generator().manual_seed(0)
    sizes = (16, keys, keys)
    parts = [torch.randn(2, 3, n, 8, generator=draws).requires_grad_() for n in sizes]
    result = F.scaled_dot_product_attention(*parts, **options)
    result.float().square().sum().backward()
    return [result.detach(), *(part.grad for part in parts)]


def masks(keys: int) -> dict[str, dict]:
    kept = torch.arange(keys) < keys - 1
    return {
        "none": {},
        "of truths": {"attn_mask": kept.expand(16, keys)},
        "of numbers": {"attn_mask": torch.where(kept, 0.0, -1e4).bfloat16().expand(16, keys)},
        "scaled": {"scale": 0.1},
        "causal": {"is_causal": True},
    }


@pytest.mark.parametrize("options", ["none", "of truths", "of numbers", "scaled", "causal"])
def test_few_keys_are_attended_to_in_fp32(options):
    use_fast_attention()
    chosen = masks(16)[options]
    with torch.autocast("cpu", torch.bfloat16):
        found = attend(16, **chosen)
    if "attn_mask" in chosen and chosen["attn_mask"].is_floating_point():
        chosen = {"attn_mask": chosen["attn_mask"].float()}
    torch.testing.assert_close(found, attend(16, **chosen), rtol=0, atol=0)


def test_nobody_elses_row_changes_because_of_one():
    """Not by a bit: a unit's part must not depend on who else is in the batch."""
    use_fast_attention()
    parts = torch.randn(3, 4, 2, 16, 8, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        before = F.scaled_dot_product_attention(*parts)
        parts[:, 2] *= 100
        after = F.scaled_dot_product_attention(*parts)
    changed = (before != after).flatten(1).any(1)
    assert changed.tolist() == [False, False, True, False]


def test_many_keys_are_attended_to_in_bf16():
    use_fast_attention()
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(FEW + 1)[0].dtype == torch.bfloat16


def test_fp64_stays_fp64():
    use_fast_attention()
    parts = torch.randn(3, 2, 3, 16, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*parts).dtype == torch.float64


def test_nothing_changes_without_autocast():
    use_fast_attention()
    halves = torch.randn(2, 3, 16, 8).bfloat16()
    assert F.scaled_dot_product_attention(halves, halves, halves).dtype == torch.bfloat16
    assert attend(16)[0].dtype == torch.float32
