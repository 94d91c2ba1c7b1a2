"""A layer that is used several times in one pass, at one size or at several."""

import pytest
import torch
from torch import nn

from tests.gradients.test_leaves import engine_rows, reference_rows
from utils.gradients.per_unit_gradients import PerUnitGradients


class Reused(nn.Module):
    """One layer used `times` times; the last time, with `smaller`, on the mean over positions."""

    def __init__(self, times: int, smaller: bool):
        super().__init__()
        self.layer, self.times, self.smaller = nn.Linear(30, 30), times, smaller

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for turn in range(self.times):
            if self.smaller and turn == self.times - 1:
                x = x.mean(1)
            x = torch.tanh(self.layer(x))
        return x


@pytest.mark.parametrize("units, draws", [(1, 1), (2, 1), (2, 3)])
@pytest.mark.parametrize("positions", [1, 2, 40])  # factors, factors, and rows
@pytest.mark.parametrize("times, smaller", [(2, False), (3, False), (2, True)])
def test_the_uses_of_a_layer_add_up(units, draws, positions, times, smaller):
    torch.manual_seed(0)
    model, x = Reused(times, smaller), torch.randn(units * draws, positions, 30)
    expected = reference_rows(model, x, units)
    torch.testing.assert_close(engine_rows(model, x, units), expected, rtol=1e-3, atol=1e-6)


def test_norms_that_were_read_between_two_passes_are_not_the_last_word():
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 30), torch.randn(2, 1, 30)
    norms = []
    with PerUnitGradients(layer).recording(2) as record:
        for _ in range(2):
            layer(x).square().sum().backward()
            norms.append(record.squared_norms())
    torch.testing.assert_close(norms[1], 4 * norms[0], rtol=1e-3, atol=0)
    torch.testing.assert_close(
        record.rows().double().square().sum(1), norms[1].sum(1), rtol=1e-3, atol=0
    )
