"""What the progress bar says of a private run."""

import pytest
import torch
from torch import nn

from tests.worlds import build_plan
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.privacy import training
from utils.privacy.accounting import pld_epsilon
from utils.privacy.training import TrainingState, _Progress


@pytest.mark.parametrize("first, recharged", [(0, 0), (3, 2)])
def test_the_bar_says_epsilon_ahead_and_images_a_second(accelerator, monkeypatch, first, recharged):
    plan, clock = build_plan(steps=20), [100.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainingState(PerUnitGradients(model), optimizer, None, step=first)
    state.recharged = recharged
    progress = _Progress(accelerator, plan, state)
    seen = []
    for _ in range(20 - first):
        clock[0] += 2.0
        progress.step(0.5)
        seen.append((progress.bar.n, progress.bar.postfix))
    # Every second step, and the last: a time for each step would tell the sizes of the batches.
    shown = list(dict.fromkeys(step for step, _ in seen))
    assert shown == sorted({first + 1, *range(first + 1 + first % 2, 21, 2), 20} - {0})
    for step, text in seen:
        ahead = min((step - 1) // 2 * 2 + 2, 20) + recharged
        epsilon = pld_epsilon(plan.events(ahead), plan.delta)
        assert text == f"epsilon <= {epsilon:.2f}, 30 images/s"  # B = 60 in two seconds
    progress.close()
