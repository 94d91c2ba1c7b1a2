"""Norms of per-unit gradients are never below the true ones, for any finite input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from utils.gradients import products
from utils.gradients.products import (
    conv2d_unit_gradient,
    product_is_smaller,
    squared_norms_of_products,
    squared_norms_of_rows,
    sum_of_products,
)

SCALES = st.floats(-30, 30).map(lambda power: 10.0**power)


@settings(max_examples=150, deadline=None)
@given(
    size=st.sampled_from([1, 7, 1023, 1024, 1025, 5000]),
    scale=SCALES,
    spread=st.floats(0, 8),
    seed=st.integers(0, 1000),
)
def test_norms_of_rows_are_never_below_the_true_ones(size, scale, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    powers = spread * (torch.rand(3, size, generator=generator) - 0.5)
    rows = scale * torch.randn(3, size, generator=generator) * 10.0**powers
    exact = rows.double().square().sum(1)
    found = squared_norms_of_rows([rows]).squeeze(1)
    assert (found >= exact).all()
    assert ((found <= exact * (1 + 1e-3) + size * 1e-36) | found.isinf()).all()


def test_a_long_row_does_not_drift():
    row = torch.full((1, 29_500_000), 1.0)
    row[0, ::2] = 0.731
    exact = row.double().square().sum(1)
    assert exact <= squared_norms_of_rows([row])[:, 0] <= exact * 1.001


def test_a_row_of_many_chunks_does_not_drift():
    """One large number, and 80,000 whose squares fp32 would lose beside it."""
    row = torch.zeros(1, 80_000 * 1024)
    row[0, ::1024] = 0.999 * 2.0**-12
    row[0, 0] = 1.0
    exact = row[0, ::1024].double().square().sum()
    assert exact <= squared_norms_of_rows([row])[0, 0] <= exact * 1.001


def test_squares_too_small_for_fp32_are_not_lost():
    row = torch.full((1, 20_000_000), 2.6e-23)  # their squares are 0 in fp32
    assert squared_norms_of_rows([row])[0, 0] >= row.double().square().sum()


def bend(shape, scale, spread, generator) -> torch.Tensor:
    powers = spread * (torch.rand(shape, generator=generator) - 0.5)
    return scale * torch.randn(shape, generator=generator) * 10.0**powers


def check_products(x: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """The estimate of one unit covers the true product, and the one that fp32 computes."""
    estimate = squared_norms_of_products(x, grads)[0].sqrt()
    true = (grads[0].double().T @ x[0].double()).norm()
    weight = torch.empty(grads.shape[2], x.shape[2])
    computed = sum_of_products(x, grads, weight).double().norm()
    assert estimate >= true and (estimate >= computed or not computed.isfinite())
    return estimate / true


@settings(max_examples=200, deadline=None)
@given(
    positions=st.sampled_from([1, 2, 5, 64]),
    features=st.sampled_from([3, 40, 2500]),
    scales=st.tuples(SCALES, SCALES),
    spread=st.floats(0, 6),
    cancel=st.sampled_from([None, 0.0, 1e-7, 1e-4, 1e-2]),
    seed=st.integers(0, 1000),
)
def test_norms_of_products_are_never_below_the_true_ones(
    positions, features, scales, spread, cancel, seed
):
    generator = torch.Generator().manual_seed(seed)
    x = bend((1, positions, features), scales[0], spread, generator)
    grads = bend((1, positions, 30), scales[1], spread, generator)
    if cancel is not None:  # positions that undo one another, but for a part
        half = positions // 2
        x[:, half : 2 * half] = x[:, :half] * (1 + cancel)
        grads[:, half : 2 * half] = -grads[:, :half]
    check_products(x, grads)


@pytest.mark.parametrize("shape", [(64, 1280, 1280), (64, 640, 640), (5, 300, 70)])
def test_the_estimate_is_close_for_ordinary_gradients(shape):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, *shape[:2], generator=generator)
    grads = 1e-4 * torch.randn(1, shape[0], shape[2], generator=generator)
    assert check_products(x, grads) < 1.001


def alternating() -> tuple[torch.Tensor, torch.Tensor]:
    """Features of one large entry in 192 and small ones just under 2^-12.5, whose signs alternate
    over the positions: an fp32 Gram matrix loses the small ones."""
    signs = torch.tensor([1.0, -1.0]).repeat(32)[:, None]
    features = torch.full((64, 1280), 0.999 * 2**-12.5)
    large = torch.zeros(1280, dtype=torch.bool)
    large[::192] = True
    features[:, large] = 1.0
    return torch.where(large, features, signs * features)[None], (signs * features)[None]


def test_positions_that_cancel_in_fp32_do_not_hide_a_norm():
    check_products(*alternating())


def test_squares_that_underflow_do_not_hide_a_norm():
    assert check_products(torch.full((1, 64, 8), 2.6e-8), torch.full((1, 64, 8), 2e-17)) < 1.01
    # Beyond any ordinary activation or gradient, a unit is not used at all.
    assert squared_norms_of_products(
        torch.full((1, 1, 8), 1e-20), torch.full((1, 1, 8), 1e16)
    ).isinf()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2e15])
def test_a_factor_beyond_all_bounds_is_flagged(value):
    ones = torch.ones(2, 3, 4)
    bad = ones.clone()
    bad[1, 2, 3] = value
    for x, grads in ((bad, ones), (ones, bad), (torch.zeros(2, 3, dtype=torch.long), bad)):
        assert squared_norms_of_products(x, grads).isfinite().tolist() == [True, False]


def test_embeddings_count_an_id_that_comes_twice_once():
    ids, grads = torch.tensor([[4, 4, 1]]), torch.tensor([[[1.0], [2.0], [5.0]]])
    weight = nn.Embedding(6, 1).weight
    exact = sum_of_products(ids, grads, weight).square().sum().double()
    assert exact <= squared_norms_of_products(ids, grads)[0] <= exact * 1.0001


def test_the_slack_of_the_fp64_sum_is_there_too():
    """Two positions that cancel: the true norm is 0, and only the slack is left. Over so many
    features the fp64 sum could hide more than the fp32 product: the bound of Higham, section 3.1.
    """
    width = 200_000
    x = torch.ones(1, 2, width)
    grads = torch.tensor([[[1.0], [-1.0]]])
    lengths = 2 * width**0.5
    found = squared_norms_of_products(x, grads).sqrt().item()
    assert found >= ((width + 4) * torch.finfo(torch.float64).eps) ** 0.5 * lengths


def test_of_two_forms_of_one_size_the_product_is_taken():
    assert product_is_smaller(2, 4, 4) and not product_is_smaller(1, 3, 2)


@pytest.mark.parametrize("width, groups", [(16, 1), (2**17, 1), (2**18, 2), (2**19, 4), (2**20, 4)])
def test_gram_matrices_are_made_in_groups_that_a_cache_holds(width, groups):
    x = torch.ones(4, 1, width)
    with torch.profiler.profile() as profile:
        gram = products._gram(x)
    assert (gram == width).all() and gram.dtype == torch.float64
    assert sum(event.name == "aten::bmm" for event in profile.events()) == groups


@pytest.mark.parametrize("units", [3, 5, 7])
def test_every_group_has_the_same_size(units):
    """So that no unit is multiplied in another shape than its neighbours."""
    x = torch.ones(units, 1, 2**18)
    with torch.profiler.profile(record_shapes=True) as profile:
        products._gram(x)
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::bmm"]
    assert shapes == [[1, 1, 2**18]] * units


@pytest.mark.parametrize("kernel", [1, 3])
def test_the_place_of_a_unit_changes_no_gradient_of_a_convolution(kernel):
    """Whose products begin at any place of memory, where sides and channels are odd."""
    torch.manual_seed(0)
    for before, after in ((66, 3), (10, 6), (6, 10), (3, 66)):
        conv = nn.Conv2d(before, after, kernel, padding=kernel // 2)
        for side in (3, 5):
            x, grads = torch.randn(6, before, side, side), torch.randn(6, after, side, side)
            first, second = (
                conv2d_unit_gradient(x[part].clone(), grads[part].clone(), conv, 5)
                for part in (slice(5), slice(1, 6))
            )
            assert torch.equal(first[1:], second[:-1])
