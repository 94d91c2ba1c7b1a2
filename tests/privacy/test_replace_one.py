"""The domain on which replacing one unit is accounted for."""

import numpy as np
import pytest
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv.prvs import PoissonSubsampledGaussianPRV

from utils.privacy.replace_one import ORDERS, ReplaceOnePRV, ReplaceOnePRVAccountant


@pytest.mark.parametrize("steps", [[1], [100], [7, 50]])
def test_the_mesh_is_that_of_opacus_and_the_domain_is_wide_enough(steps):
    ours = [ReplaceOnePRV(0.1, 1.0) for _ in steps]
    theirs = [PoissonSubsampledGaussianPRV(0.1, 1.0) for _ in steps]
    domain = ReplaceOnePRVAccountant()._get_domain(ours, steps, 0.01, 1e-8)
    known = PRVAccountant()._get_domain(theirs, steps, 0.01, 1e-8)
    assert domain.dt == pytest.approx(known.dt, rel=1e-12)
    assert domain.t_max > known.t_max / 2 and domain.t_min == pytest.approx(-domain.t_max, rel=1e-3)
    tail = 1 - ours[0].cdf(np.array([domain.t_max]))[0]
    assert tail * sum(steps) <= 1e-8


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0, 20.0])
def test_without_sampling_the_divergence_is_that_of_two_gaussians(sigma, order):
    """Of N(1, s^2) and N(-1, s^2): 2 alpha / s^2 (van Erven and Harremoes 2014, eq. 10)."""
    assert ReplaceOnePRV(1.0, sigma).rdp(order) == pytest.approx(2 * order / sigma**2, rel=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 4.0])
def test_with_sampling_it_is_smaller_and_grows_with_the_order(sigma):
    found = [ReplaceOnePRV(0.1, sigma).rdp(order) for order in ORDERS]
    assert found == sorted(found) and found[0] > 0
    assert all(rdp < 2 * order / sigma**2 for rdp, order in zip(found, ORDERS, strict=True))
