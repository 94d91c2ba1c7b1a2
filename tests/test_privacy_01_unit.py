"""Clause 1: the unit is one row, or all rows that share a value; epsilon under both relations."""

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.worlds import TAIL
from utils.accounting import REPLACE_ONE, account, make_plan, pld_epsilon, privacy_statement
from utils.arguments import PrivacyArguments
from utils.data import units_of
from utils.entropy import SecretRandomness
from utils.errors import UsageError
from utils.latents import EncodedUnits


def encoded(sizes: list[int], shuffle_seed: int | None = None) -> EncodedUnits:
    """Units of the given sizes; the latent of a row is the number of its unit."""
    unit_of_row = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    if shuffle_seed is not None:
        order = torch.randperm(
            len(unit_of_row), generator=torch.Generator().manual_seed(shuffle_seed)
        )
        unit_of_row = unit_of_row[order]
    count = unit_of_row.bincount()
    latents = unit_of_row.float()[:, None, None, None, None].clone()
    order, first = unit_of_row.argsort(stable=True), count.cumsum(0) - count
    nothing = torch.zeros(1)
    return EncodedUnits(latents, nothing, nothing, nothing, order, first, count)


def test_rows_are_units_unless_a_column_says_otherwise():
    rows = Dataset.from_dict({"patient": ["b", "a", "b", "c", "a", "b"]})
    assert units_of(rows, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert units_of(rows, "patient").tolist() == [0, 1, 0, 2, 1, 0]


@pytest.mark.parametrize("hole", [None, "", float("nan")])
def test_rows_that_nobody_owns_are_refused(hole):
    values = [1.0, hole, 2.0] if isinstance(hole, float) else ["1", hole, "2"]
    with pytest.raises(UsageError, match="1 row.s. have no value"):
        units_of(Dataset.from_dict({"patient": values}), "patient")
    with pytest.raises(UsageError, match="the columns are patient"):
        units_of(Dataset.from_dict({"patient": values}), "user")


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=6),
    draws=st.integers(1, 6),
    seed=st.integers(0, 50),
)
def test_a_unit_draws_its_own_rows_only_and_distinct_if_it_can(sizes, draws, seed):
    units = encoded(sizes, seed)
    wanted = torch.arange(len(sizes))
    rows = units.draw_rows(wanted, draws, SecretRandomness())
    assert rows.shape == (len(sizes), draws)
    assert (units.latents[rows].flatten(1) == wanted[:, None]).all()
    for unit, size in enumerate(sizes):
        assert len(set(rows[unit].tolist())) == min(draws, size)


def test_every_row_of_a_unit_is_equally_likely():
    units, repeats = encoded([1, 7, 50]), 20_000
    rows = units.draw_rows(torch.full((repeats,), 2), 3, SecretRandomness())
    counts = (rows.flatten() - 8).bincount(minlength=50).double()
    share = 3 / 50
    deviation = (repeats * share * (1 - share)) ** 0.5
    assert (counts - repeats * share).abs().max() < TAIL * deviation


def test_epsilon_is_for_units_and_says_which():
    privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-4, expected_batch_size=50)
    plan = make_plan(500, privacy, 10, "patient_id")
    spent = account([plan.event()], plan.delta)
    statement = privacy_statement(plan, True, spent)
    assert statement["num_units"] == 500
    assert statement["privacy_unit"] == "all images of one patient_id"
    assert statement["max_rows_per_unit"] is None
    epsilon = statement["epsilon"]
    assert epsilon["replace_one"] == pld_epsilon([plan.event()], 1e-4, REPLACE_ONE)
    assert epsilon["replace_one"] > epsilon["add_or_remove_one"] > 0


def test_a_larger_unit_costs_no_more_than_a_small_one(accelerator, monkeypatch):
    """One of 300 rows moves the sum by C, as one of one row does; a clip per row would not."""
    from tests.worlds import LinearWorld
    from utils import training

    world = LinearWorld(["huge"] * 6, draws=4)
    assert world.largest_move(accelerator, max_grad_norm=0.3) <= 0.3 * (1 + 1e-5)
    once = training.clipped_gradient_sum

    def a_clip_per_row(accelerator, engine, losses, units, plan, micro):
        return sum(once(accelerator, engine, losses, units, plan, micro) for _ in range(300))

    assert a_clip_per_row is not once
    plan = {"max_grad_norm": 0.3}
    monkeypatch.setattr("tests.worlds.clipped_gradient_sum", a_clip_per_row)
    assert world.largest_move(accelerator, **plan) > 0.3 * 200
