"""What is chosen where nothing was asked for, and what a plan can be expected to do."""

import math
from dataclasses import replace

import pytest

from tests.worlds import build_plan
from utils.arguments.training import PrivacyArguments, TrainingArguments
from utils.errors import UsageError
from utils.privacy.accounting import calibrate_noise_multiplier, pld_epsilon
from utils.privacy.defaults import (
    ADAPTER_RATE,
    MOST_DRAWS,
    PublicFacts,
    choose_missing,
    least_noise,
    median_width,
    noise_to_signal,
)
from utils.privacy.verdict import BORDERLINE, NOISE_WINS, WILL_LEARN, judge

BUDGET = PrivacyArguments(target_epsilon=10.0, target_delta=1e-5)
TRAINING = TrainingArguments(output_dir="x")


def facts(num_units: int, num_parameters: int = 60_000, **more) -> PublicFacts:
    return PublicFacts(num_units, num_parameters, width=64, rate=ADAPTER_RATE, **more)


def choose(num_units: int, budget=BUDGET, training=TRAINING, **more):
    return choose_missing(budget, training, facts(num_units, **more))


@pytest.mark.parametrize("epsilon", [1.0, 10.0])
@pytest.mark.parametrize("num_units", [1, 40, 500, 1437, 60_000, 10**7])
def test_what_is_chosen_makes_a_plan(num_units, epsilon):
    privacy, training, reasons = choose(num_units, replace(BUDGET, target_epsilon=epsilon))
    assert 1 <= privacy.expected_batch_size <= num_units
    assert 8 <= training.max_train_steps <= 128 and 1 <= privacy.noise_multiplicity <= MOST_DRAWS
    assert 0 < training.learning_rate < 0.1
    assert len(reasons) == 4 and all(reason.startswith("--") for reason in reasons)


def test_few_units_are_all_in_every_step_and_draw_more_often():
    few, _, _ = choose(1437)
    many, longer, _ = choose(60_000)
    assert few.expected_batch_size == 1437 and few.noise_multiplicity > many.noise_multiplicity
    assert many.expected_batch_size < 60_000 and longer.max_train_steps > 8


def test_what_was_asked_for_is_kept():
    asked = replace(BUDGET, expected_batch_size=77.5, noise_multiplicity=3)
    training = replace(TRAINING, max_train_steps=9, learning_rate=0.5)
    assert choose(1000, asked, training) == (asked, training, [])


def test_a_batch_larger_than_the_set_is_all_of_it_and_says_so():
    privacy, _, reasons = choose(40, replace(BUDGET, expected_batch_size=4096))
    assert privacy.expected_batch_size == 40
    assert any("all that there are, not 4096" in reason for reason in reasons)


def test_a_warm_start_moves_less():
    _, cold, _ = choose(1437)
    _, warm, _ = choose(1437, has_warm_start=True)
    assert warm.learning_rate < cold.learning_rate / 3


def test_with_a_noise_multiplier_the_rest_is_chosen():
    privacy, training, _ = choose(1437, PrivacyArguments(noise_multiplier=2.0, target_delta=1e-4))
    assert training.max_train_steps == 100 and privacy.expected_batch_size == 115
    with pytest.raises(UsageError, match="target_delta"):
        choose(1437, PrivacyArguments(target_epsilon=2.0))


@pytest.mark.parametrize("epsilon", [0.5, 3.0, 10.0])
def test_no_plan_has_less_noise_than_one_with_everyone_in_every_step(epsilon):
    least = least_noise(facts(5000), epsilon, 1e-5)
    for steps in (8, 64):
        everyone = calibrate_noise_multiplier(epsilon, 1e-5, 1.0, steps)
        assert abs(noise_to_signal(60_000, everyone, 5000, steps) / least - 1) < 1e-3
        sampled = calibrate_noise_multiplier(epsilon, 1e-5, 0.1, steps)
        assert noise_to_signal(60_000, sampled, 500, steps) > 1.01 * least


@pytest.mark.parametrize(
    "budget",
    [
        {},  # of a selection alone, or forgotten
        {"noise_multiplier": 0.0},
        {"noise_multiplier": math.nan},
        {"noise_multiplier": math.inf},
        {"noise_multiplier": 1.0, "expected_batch_size": -3.0},
    ],
)
def test_what_the_plan_will_refuse_is_left_to_it(budget):
    chosen, training, _ = choose(1437, PrivacyArguments(target_delta=1e-4, **budget))
    assert chosen.noise_multiplicity == 1 and training.learning_rate > 0


def test_the_width_is_that_of_matrices():
    assert median_width([(4, 64), (128, 4), (4, 32, 3, 3), (999,)]) == 64
    assert median_width([(7,)]) == 7


@pytest.mark.parametrize(
    "num_units, epsilon, grade",
    [(60_000, 10.0, WILL_LEARN), (1437, 2.0, BORDERLINE), (500, 1.0, NOISE_WINS)],
)
def test_three_grades_and_what_would_help(num_units, epsilon, grade):
    numbers = {"num_units": num_units, "expected_batch_size": num_units, "steps": 8, "delta": 1e-5}
    sigma = calibrate_noise_multiplier(epsilon, 1e-5, 1.0, 8)
    plan = build_plan(noise_multiplier=sigma, **numbers)
    verdict = judge(plan, 60_000, epsilon)
    assert verdict.grade == grade and str(verdict).startswith(grade)
    assert math.isclose(verdict.in_all, verdict.per_step / math.sqrt(8))
    advice = " ".join(verdict.advice)
    assert ("more images" in advice) == (grade != WILL_LEARN) == ("--release_means" in advice)
    assert "--release_means" not in " ".join(judge(plan, 60_000, epsilon, True).advice)


def test_the_advice_is_worth_its_figures():
    """With the images, the budget or the weights that it names, the noise is what it says."""
    sigma = calibrate_noise_multiplier(1.0, 1e-5, 0.1, 8)
    plan = build_plan(
        num_units=5000, expected_batch_size=500, steps=8, noise_multiplier=sigma, delta=1e-5
    )
    epsilon = pld_epsilon(plan.events(), 1e-5)
    first = next(a for a in judge(plan, 60_000, epsilon, True).advice if "batch" in a)
    everyone = calibrate_noise_multiplier(epsilon, 1e-5, 1.0, 8)
    promised = float(first.split(": ")[1].split()[0])
    assert abs(noise_to_signal(60_000, everyone, 5000, 8) / promised - 1) < 0.06
