"""Sums over units: what one unit can move, however many rows it has and whatever is in them."""

import pytest
import torch

from utils.privacy.unit_sums import sum_units

HOSTILE = {"ordinary": 0.5, "huge": 1e30, "overflowing": 1e200, "nan": float("nan"),
           "inf": float("inf"), "zero": 0.0}  # fmt: skip
KINDS = [*HOSTILE, "huge", "ordinary"]


def build_rows(kinds: list[str], rows_each: list[int], places: int = 3) -> list:
    """Units with several rows each, and contributions that are as large as a row says."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for unit, (kind, count) in enumerate(zip(kinds, rows_each, strict=True)):
        for index in range(count):
            numbers = torch.randn(48, generator=generator).double() * HOSTILE[kind]
            rows.append((unit, {(unit + index) % places: numbers}))
    return rows


def add_up(rows: list, bound: float, places: int = 3) -> torch.Tensor:
    return sum_units(rows, torch.zeros(places, 48, dtype=torch.float64), bound)


@pytest.mark.parametrize("rows_each", [[1] * 8, [3] * 8, [1, 2, 3, 4, 5, 6, 7, 8]])
@pytest.mark.parametrize("bound", [1.0, 0.25])
def test_one_unit_moves_the_sum_by_at_most_the_bound(rows_each, bound):
    """By replay, with and without each unit; and all others' part stays to the last digits."""
    rows = build_rows(KINDS, rows_each)
    whole = add_up(rows, bound)
    assert whole.isfinite().all()
    for unit, kind in enumerate(KINDS):
        rest = add_up([row for row in rows if row[0] != unit], bound)
        alone = add_up([row for row in rows if row[0] == unit], bound)
        move = (whole - rest).norm().item()
        assert move <= bound * (1 + 1e-9), kind
        torch.testing.assert_close(whole - rest, alone, rtol=0, atol=1e-12)
        if kind in ("huge", "ordinary"):
            assert move > 0.9 * bound
        if kind in ("nan", "inf"):
            assert move == 0


def test_without_the_bound_a_unit_would_move_it_further():
    """The replay above notices: a unit of several rows, and no bound to speak of."""
    rows = build_rows(["ordinary"] * 3, [1, 5, 1])
    rest = [row for row in rows if row[0] != 1]
    assert (add_up(rows, 1e9) - add_up(rest, 1e9)).norm() > 1.0


def test_a_unit_is_the_mean_of_its_rows():
    numbers = torch.full((48,), 0.01).double()
    rows = [(0, {0: numbers}), (0, {0: 3 * numbers}), (0, {1: 2 * numbers})]
    total = add_up(rows, 1.0, places=2)
    torch.testing.assert_close(total[:, 0], torch.tensor([0.04 / 3, 0.02 / 3]).double())


def test_a_row_may_contribute_nothing():
    assert add_up([(0, {}), (1, {})], 1.0).abs().sum() == 0
    half = add_up([(0, {}), (0, {2: torch.full((48,), 0.02)})], 1.0)
    torch.testing.assert_close(half[2], torch.full((48,), 0.01).double())
