"""Votes: what one unit can move, who may vote for what, and what is kept."""

import numpy as np
import pytest
import torch

from utils.methods.votes import count_votes, keep_best, resample

VOTES = 3
CLASSES = torch.tensor([0, 1] * 10)


def network(pixels: torch.Tensor) -> torch.Tensor:
    """Two numbers of an image; of a dark one, none that is finite."""
    assert len(pixels) == 1, "an image must be seen alone"
    seen = pixels.double()
    if (pixels == 0).all():
        return torch.tensor([[float("nan"), 0.0]])
    if (pixels == 1).all():
        return torch.tensor([[float("inf"), 1.0]])
    return torch.stack([seen.mean((1, 2, 3)), seen[:, 0].mean((1, 2))], 1) * 1e30 ** (
        seen.max() == 2
    )


def build_world(rows_each: list[int]) -> tuple[list, torch.Tensor]:
    """Units of ordinary, huge, and not finite features; candidates to vote for."""
    generator = torch.Generator().manual_seed(0)
    features = 255 * torch.rand(20, 2, generator=generator)
    rows = []
    for unit, count in enumerate(rows_each):
        for index in range(count):
            pixels = torch.randint(3, 256, (3, 8, 8), generator=generator, dtype=torch.uint8)
            if unit in (1, 3, 5):  # nan, inf, huge
                pixels = torch.full((3, 8, 8), unit // 2, dtype=torch.uint8)
            rows.append((unit, (unit + index) % 2, pixels))
    return rows, features


@pytest.mark.parametrize("rows_each", [[1] * 8, [4] * 8, [1, 2, 3, 4, 5, 6, 7, 8]])
def test_one_unit_moves_the_votes_by_at_most_the_root_of_its_votes(rows_each):
    """By replay, with and without each unit; nobody else's votes change."""
    rows, features = build_world(rows_each)
    bound = VOTES**0.5

    def count(some: list) -> torch.Tensor:
        return count_votes(some, network, features, CLASSES, VOTES, bound)

    whole, moved = count(rows), []
    for unit in range(8):
        rest = count([row for row in rows if row[0] != unit])
        moved.append((whole - rest).norm().item())
        assert moved[-1] <= bound * (1 + 1e-9)
        alone = count([row for row in rows if row[0] == unit])
        torch.testing.assert_close(whole - rest, alone, rtol=0, atol=1e-12)
    assert moved[1] == moved[3] == 0 and moved[5] > 0  # not finite, not finite, huge
    if rows_each[0] == 1:
        assert moved[0] == pytest.approx(bound, rel=1e-5)  # a unit of one row


def test_votes_that_are_not_bounded_would_move_them_further():
    rows, features = build_world([1] * 8)
    more = count_votes(rows, network, features, CLASSES, 2 * VOTES, 1e9)
    rest = count_votes(rows[1:], network, features, CLASSES, 2 * VOTES, 1e9)
    assert (more - rest).norm() > VOTES**0.5


def test_a_row_votes_for_the_nearest_of_its_class():
    features = torch.tensor([[0.0, 0], [10, 10], [20, 20], [30, 30]])
    classes = torch.tensor([0, 0, 1, 1])
    pixels = torch.full((3, 4, 4), 9, dtype=torch.uint8)

    def count(number: int, votes: int) -> list[float]:
        found = count_votes([(0, number, pixels)], network, features, classes, votes, 10.0)
        return found.tolist()

    assert count(0, 1) == pytest.approx([0, 1, 0, 0])
    assert count(1, 1) == pytest.approx([0, 0, 1, 0])
    assert count(1, 5) == pytest.approx([0, 0, 1, 1])
    assert count(-1, 1) == [0, 0, 0, 0]  # of no class that there is


def test_a_unit_of_two_rows_shares_its_votes():
    features, classes = torch.tensor([[4.0, 4], [200, 200]]), torch.zeros(2)
    images = [torch.full((3, 4, 4), value, dtype=torch.uint8) for value in (5, 201)]
    rows = [(0, 0, image) for image in images]
    found = count_votes(rows, network, features, classes, 1, 1.0)
    assert found.tolist() == pytest.approx([0.5, 0.5])


def test_the_best_are_kept_and_classes_take_turns():
    votes, classes = np.array([5.0, 1, 9, -2, 3, 7]), np.array([0, 0, 0, 1, 1, 1])
    assert keep_best(votes, classes, 4) == [2, 5, 0, 4]
    assert keep_best(votes, classes, 100) == [2, 5, 0, 4, 1, 3]
    uneven = np.array([0, 0, 0, 0, 0, 1])
    assert keep_best(votes, uneven, 4) == [2, 5, 0, 4]


def test_resampling_follows_the_votes():
    """Shares of 4,000 draws: a false alarm is a deviation by six standard errors."""
    votes, classes = np.array([3.0, 1, -5, 0.0, 2, 2]), np.array([0, 0, 0, 1, 1, 1])
    drawn = np.array(resample(votes, classes, 8000, seed=1))
    counts = np.bincount(drawn, minlength=6) / 4000
    expected = np.array([0.75, 0.25, 0, 0, 0.5, 0.5])
    assert (np.abs(counts - expected) <= 6 * np.sqrt(expected * (1 - expected) / 4000)).all()
    assert set(classes[drawn[:2]]) == {0, 1}
    assert len(resample(-votes.clip(0), classes, 7, seed=1)) == 7  # no vote left: any of them
