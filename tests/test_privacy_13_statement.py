"""Clause 13: the statement can be recomputed, by public tools, from itself alone."""

import json

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant
from scipy.stats import norm

from tests.worlds import build_plan
from utils.hub.privacy_words import describe_plainly
from utils.ledger.checks import check_statement
from utils.ledger.statement import Circumstances, build_statement
from utils.privacy.accounting import account, membership_power, quote
from utils.privacy.plan import make_plan


@pytest.mark.parametrize(
    "epsilon, told",
    [(1.0, "1.000"), (9.9996, "10.000"), (1.0041, "1.005"), (12.3456, "12.346"), (3e-9, "0.001")]
    + [
        (0.9999999999, "1.000"),
        (1.0000000001, "1.000"),
        (0.0, "0.000"),
        (float("inf"), "inf"),
        (9.6e-10, "0.001"),
    ],
)
def test_an_epsilon_is_told_as_no_less_than_it_is(epsilon, told):
    assert quote(epsilon) == told


@pytest.fixture(scope="module", params=["flat", "automatic", "per_layer"])
def statement(request):
    numbers = {"num_units": 5000, "expected_batch_size": 250, "steps": 40, "max_grad_norm": 1.0}
    plan = make_plan(target_epsilon=3.0, delta=1e-5, clipping=request.param, **numbers)
    events = [plan.event()]
    return json.loads(
        json.dumps(build_statement(plan, events, account(events, 1e-5), Circumstances()))
    )


def test_epsilon_is_recomputed_with_dp_accounting_alone(statement):
    events = [
        dp_accounting.SelfComposedDpEvent(
            dp_accounting.PoissonSampledDpEvent(
                e["sampling_rate"], dp_accounting.GaussianDpEvent(e["noise_multiplier"])
            ),
            e["steps"],
        )
        for e in statement["events"]
    ]
    for relation in ("ADD_OR_REMOVE_ONE", "REPLACE_ONE"):
        accountant = PLDAccountant(dp_accounting.NeighboringRelation[relation], 1e-3)
        accountant.compose(dp_accounting.ComposedDpEvent(events))
        epsilon = accountant.get_epsilon(statement["delta"])
        margin = statement["epsilon"][relation.lower()] - epsilon
        assert 0 <= margin < 1e-6  # for what the accountant's transforms round


def test_epsilon_is_recomputed_with_opacus_alone(statement):
    accountant = PRVAccountant()
    accountant.history = [
        (e["noise_multiplier"], e["sampling_rate"], e["steps"]) for e in statement["events"]
    ]
    epsilon = accountant.get_epsilon(statement["delta"], eps_error=0.01)
    assert epsilon == pytest.approx(statement["accountants"]["prv"]["epsilon"], abs=1e-6)


def test_the_statement_says_what_it_is_about(statement):
    assert statement["num_units"] == 5000 and statement["private"] is True
    assert statement["privacy_unit"] == "image" and statement["max_rows_per_unit"] == 1
    assert {"clipping", "max_grad_norm", "noise_multiplicity"} <= set(statement["events"][0])
    assert any("prompts" in what for what in statement["not_covered"])
    assert statement["software"]["opacus"]


def event(sigma, q=1.0, steps=1):
    return build_plan(
        num_units=10**6, expected_batch_size=q * 10**6, steps=steps, noise_multiplier=sigma
    ).event()


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("rate", [0.01, 0.001])
def test_membership_power_of_a_gaussian_is_that_of_the_likelihood_ratio_test(sigma, rate):
    """Dong et al. 2022, section 2: the best test of N(0, 1) against N(mu, 1) finds
    Phi(mu - Phi^-1(1 - rate)) of the members."""
    best = norm.cdf(1 / sigma - norm.isf(rate))
    power = membership_power([event(sigma)])[f"{rate:g}"]
    assert best - 1e-9 <= power <= best + 0.002


def test_membership_power_bounds_an_attacker_who_sees_every_step():
    """The likelihood ratio test, simulated: 4 standard errors of slack, 3e-5 a rate; two rates."""
    q, sigma, steps, count = 0.3, 1.0, 20, 200_000
    power = membership_power([event(sigma, q, steps)])
    generator = np.random.default_rng(5)

    def score(member: bool) -> np.ndarray:
        seen = sigma * generator.standard_normal((steps, count))
        seen += member * (generator.random((steps, count)) < q)
        return np.log1p(q * np.expm1((2 * seen - 1) / (2 * sigma**2))).sum(0)

    out, members = score(False), score(True)
    for rate in (0.01, 0.001):
        found = (members > np.quantile(out, 1 - rate)).mean()
        slack = 5 * (power[f"{rate:g}"] / (rate * count)) ** 0.5 * power[f"{rate:g}"] ** 0.5
        assert 0.5 * power[f"{rate:g}"] < found <= power[f"{rate:g}"] + slack


def test_no_release_gives_no_power_and_no_noise_gives_all():
    assert membership_power([event(1e4)])["0.01"] == pytest.approx(0.01, abs=1e-4)
    assert membership_power([event(0.2, steps=10)])["0.001"] == pytest.approx(1.0)


def test_power_is_checked_and_an_older_statement_needs_none(statement):
    statement = json.loads(json.dumps(statement)) | {"files": {}}
    assert check_statement(statement) == []
    less = statement["membership_inference"] | {"0.001": 0.001}
    for wrong in (less, {}, less | {"0.001": float("nan")}):
        assert (
            "membership inference"
            in check_statement(statement | {"membership_inference": wrong})[0]
        )
    del statement["membership_inference"]
    assert "lacks membership_inference" in check_statement(statement)[0]
    assert check_statement(statement | {"schema_version": 1}) == []
    for schema in (0, 3, None, "2"):
        assert "schema version" in check_statement(statement | {"schema_version": schema})[0]


def test_the_words_name_the_unit_and_round_up(statement):
    words = describe_plainly(statement)
    assert "any one image was among" in words and "for each image whether it was used" in words
    patients = statement | {"privacy_unit": "all images of one patient_id"}
    patients |= {"membership_inference": {"0.01": 0.31201, "0.001": 0.05}}
    words = describe_plainly(patients)
    assert "any one patient's images were among" in words
    assert "at most 31.3 in a hundred" in words and "at most 5 in a hundred" in words
    for epsilon, odds in ((2.35, "11"), (1.0, "2.72"), (0.5, "1.65"), (20.0, "4.86e+08")):
        told = describe_plainly(statement | {"epsilon": {"add_or_remove_one": epsilon}})
        assert f"a factor of at most e^epsilon = {odds}, except" in told


def test_reproducible_noise_gives_no_epsilon():
    plan = build_plan(num_units=5000, steps=40, delta=1e-5)
    events = [plan.event()]
    statement = build_statement(
        plan, events, account(events, 1e-5), Circumstances(is_private=False)
    )
    assert statement["private"] is False and "NOT PRIVATE" in statement["warning"]
    assert set(statement["epsilon"].values()) == {None}
    assert {a["epsilon"] for a in statement["accountants"].values()} == {None}
