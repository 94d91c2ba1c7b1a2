"""Clause 13: the statement can be recomputed, by public tools, from itself alone."""

import json

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from opacus.accountants import PRVAccountant

from tests.worlds import build_plan
from utils.ledger.statement import Circumstances, build_statement
from utils.privacy.accounting import account
from utils.privacy.plan import make_plan


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
    assert any("prompts" in what for what in statement["not_covered"])
    assert statement["software"]["opacus"]


def test_reproducible_noise_gives_no_epsilon():
    plan = build_plan(num_units=5000, steps=40, delta=1e-5)
    events = [plan.event()]
    statement = build_statement(
        plan, events, account(events, 1e-5), Circumstances(is_private=False)
    )
    assert statement["private"] is False and "NOT PRIVATE" in statement["warning"]
    assert set(statement["epsilon"].values()) == {None}
    assert {a["epsilon"] for a in statement["accountants"].values()} == {None}
