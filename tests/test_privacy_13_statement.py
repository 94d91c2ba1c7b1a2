"""Clause 13: the statement can be recomputed, by public tools, from itself alone."""

import json

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from utils.accounting import account, make_plan, privacy_statement
from utils.arguments import PrivacyArguments


@pytest.fixture(scope="module", params=["flat", "automatic", "per_layer"])
def statement(request):
    privacy = PrivacyArguments(
        target_epsilon=3.0, target_delta=1e-5, expected_batch_size=250, clipping=request.param
    )
    plan = make_plan(5000, privacy, 40)
    events = [plan.event()]
    return json.loads(json.dumps(privacy_statement(plan, events, account(events, 1e-5), True)))


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
        assert epsilon == pytest.approx(statement["epsilon"][relation.lower()], abs=1e-9)


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
    assert statement["not_covered"] and statement["software"]["opacus"]


def test_reproducible_noise_gives_no_epsilon():
    privacy = PrivacyArguments(noise_multiplier=1.0, target_delta=1e-5)
    plan = make_plan(5000, privacy, 40)
    events = [plan.event()]
    statement = privacy_statement(plan, events, account(events, 1e-5), False)
    assert statement["private"] is False and "NOT PRIVATE" in statement["warning"]
    assert set(statement["epsilon"].values()) == {None}
    assert {a["epsilon"] for a in statement["accountants"].values()} == {None}
