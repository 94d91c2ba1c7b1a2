"""What is refused before anything is reserved, and the numbers in the sentences."""

import math
import re

import pytest

from tests.worlds import build_plan
from utils.errors import UsageError
from utils.privacy.accounting import Spent, pld_epsilon, split_budget
from utils.privacy.plan import calibrate_table, make_plan, summarise_plan

PLAN = {
    "num_units": 200,
    "expected_batch_size": 60.0,
    "steps": 3,
    "max_grad_norm": 1.0,
    "delta": 1e-4,
    "noise_multiplier": 1.0,
}


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"delta": None}, "give --target_delta, below 1/N = 0.005"),
        (
            {"delta": 0.005},
            "--target_delta 0.005 must be positive and below 1/N = 0.005 for 200 units: at 1/N a "
            "mechanism may publish one unit outright",
        ),
        ({"delta": -1e-4}, "--target_delta -0.0001 must be positive"),
        ({"delta": 0.0}, "--target_delta 0 must be positive"),
        ({"delta": 9.99e-10}, "--target_delta 9.99e-10 is below 1e-09, where the rounding"),
        (
            {"expected_batch_size": 200.5},
            "--expected_batch_size 200.5 must be between 1 and the number of units, 200",
        ),
        ({"expected_batch_size": -1}, "--expected_batch_size -1 must be"),
        ({"expected_batch_size": 0}, "--expected_batch_size 0 must be"),
        ({"steps": -1}, "--max_train_steps -1 must be at least 1"),
        ({"steps": 0}, "--max_train_steps 0 must be at least 1"),
        ({"noise_multiplicity": 0}, "--noise_multiplicity 0 must be at least 1"),
        ({"max_grad_norm": 0}, "--max_grad_norm 0 must be between 1e-10 and 1e+10"),
        ({"max_grad_norm": -1.0}, "--max_grad_norm -1.0 must be between 1e-10 and 1e+10"),
        ({"max_grad_norm": math.inf}, "--max_grad_norm inf must be between 1e-10 and 1e+10"),
        ({"max_grad_norm": math.nan}, "--max_grad_norm nan must be between 1e-10 and 1e+10"),
        ({"noise_multiplier": 0.199}, "--noise_multiplier 0.199 must be between 0.2 and 10000"),
        ({"noise_multiplier": 10001.0}, "--noise_multiplier 10001.0 must be between 0.2 and"),
        ({"noise_multiplier": None}, "give exactly one of --target_epsilon and --noise_mult"),
        ({"target_epsilon": 1.0}, "give exactly one of --target_epsilon and --noise_mult"),
    ],
)
def test_a_plan_out_of_range_is_refused_with_its_numbers(changes, sentence):
    with pytest.raises(UsageError, match=re.escape(sentence)):
        make_plan(**(PLAN | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"delta": 1e-9},
        {"delta": 0.00499},
        {"expected_batch_size": 200},
        {"expected_batch_size": 0.5},
        {"steps": 1},
        {"noise_multiplier": 0.2},
        {"noise_multiplier": 10000.0},
        {"max_grad_norm": 1e-9},
    ],
)
def test_the_ends_of_each_range_are_taken(changes):
    plan = make_plan(**(PLAN | changes))
    for name, value in changes.items():
        assert getattr(plan, name) == value


def test_a_table_of_targets_is_sorted_and_each_is_reached():
    table = calibrate_table(make_plan(**PLAN), {8.0, 2.0})
    assert [entry["epsilon"] for entry in table] == [2.0, 8.0]
    for entry in table:
        sigma = entry["noise_multiplier"]
        spent = pld_epsilon([make_plan(**PLAN | {"noise_multiplier": sigma}).event()], 1e-4)
        assert entry["epsilon"] - 0.01 < spent <= entry["epsilon"]


def test_a_table_of_targets_is_of_what_is_left():
    prior = (make_plan(**PLAN | {"noise_multiplier": 2.0}).event(),)
    spent = pld_epsilon(list(prior), 1e-4)
    table = calibrate_table(make_plan(**PLAN, prior=prior), {spent / 2, spent, spent + 2})
    assert [entry["epsilon"] for entry in table] == [spent + 2]
    again = make_plan(**PLAN | {"noise_multiplier": table[0]["noise_multiplier"]}, prior=prior)
    assert spent + 1.99 < pld_epsilon(again.events(), 1e-4) <= spent + 2


def test_a_plan_in_numbers():
    plan = make_plan(**PLAN)
    assert (plan.noise_multiplicity, plan.clipping, plan.unit_name) == (1, "flat", "image")
    assert (plan.purpose, plan.prior, plan.builds_on) == ("training", (), ())
    plan = build_plan(noise_multiplier=2.0, max_grad_norm=0.5, prior=({"mechanism": "x"},))
    assert (plan.sampling_rate, plan.sensitivity, plan.noise_std) == (0.3, 0.5, 1.0)
    assert plan.event(0)["steps"] == 0 and plan.event()["steps"] == 1
    assert plan.events(7) == [{"mechanism": "x"}, plan.event(7)]
    summary = summarise_plan(plan, Spent(1.0, 2.0, 3.0, 4.0, 5.0))
    assert summary["sampling_rate"] == 0.3 and summary["num_units"] == 200
    assert list(summary["epsilon"].values()) == [1.0, 2.0, 3.0, 4.0, 5.0]


def test_what_each_event_adds_makes_up_epsilon():
    """In the order of the ledger; each adds less than it would cost alone."""
    events = [build_plan(steps=n, purpose=p).event() for n, p in ((1, "means"), (9, "training"))]
    parts = split_budget(events, 1e-5)
    assert sum(parts) == pytest.approx(pld_epsilon(events, 1e-5), rel=1e-9)
    assert parts[0] == pld_epsilon(events[:1], 1e-5)
    assert 0 < parts[1] < pld_epsilon(events[1:], 1e-5)
