"""What the progress bar says of a private run."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from tests.worlds import build_plan
from utils.gradients.per_unit_gradients import PerUnitGradients
from utils.privacy import training
from utils.privacy.accounting import pld_epsilon, quote
from utils.privacy.training import TrainingState, _Progress

BASE = {"events": [build_plan(steps=9).event()], "delta": 1e-5}


@pytest.mark.parametrize("behind", [None, BASE])
@pytest.mark.parametrize("first, recharged", [(0, 0), (3, 2)])
@pytest.mark.parametrize("steps", [4, 5, 8, 20, 47])
def test_the_bar_says_epsilon_ahead_and_images_a_second(
    accelerator, monkeypatch, steps, first, recharged, behind
):
    plan, clock = build_plan(steps=steps), [100.0]
    monkeypatch.setattr(training.time, "perf_counter", lambda: clock[0])
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    state = TrainingState(PerUnitGradients(model), optimizer, None, step=first)
    state.recharged, state.behind = recharged, behind
    progress = _Progress(accelerator, plan, state)
    seen = []
    for _ in range(steps - first):
        clock[0] += 2.0
        progress.step(0.5)
        seen.append((progress.bar.n, progress.bar.postfix))
    # A time for each step would tell the sizes of the batches.
    shown = [first, *dict.fromkeys(step for step, _ in seen if step > first)]
    pauses = [after - before for before, after in pairwise(shown)]
    assert shown[-1] == steps and len(shown) <= 14
    assert min(pauses) >= min(2, steps - first)
    for done, (at, text) in enumerate(seen, first + 1):
        if at == first:
            continue
        ahead = min((step for step in shown if step > at), default=steps)
        events, delta = plan.events(ahead + recharged), plan.delta
        if behind is not None:
            events, delta = [*behind["events"], *events], min(behind["delta"], delta)
        epsilon = pld_epsilon(events, delta)
        assert at <= done <= ahead
        assert text == f"epsilon <= {quote(epsilon)}, 30 images/s"  # B = 60 in two seconds
    progress.close()
