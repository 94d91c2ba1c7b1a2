"""The PRV accountant for replacing one unit, which Opacus has for adding or removing one only."""

import numpy as np
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv import (
    Domain,
    TruncatedPrivacyRandomVariable,
    compose_heterogeneous,
    discretize,
)
from scipy.special import logsumexp
from scipy.stats import norm

ORDERS = np.array([1.1, 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128])


class ReplaceOnePRV:
    """The privacy loss log P(x) / Q(x), x ~ P, of one Poisson-subsampled Gaussian release.

    Replacing a unit turns its contribution +C into -C where it is sampled, so (Zhu, Dong and Wang
    2022, section 4), in units of C:
    P = (1 - q) N(0, sigma^2) + q N(1, sigma^2), Q = (1 - q) N(0, sigma^2) + q N(-1, sigma^2).
    """

    def __init__(self, sample_rate: float, noise_multiplier: float):
        self.q, self.sigma = sample_rate, noise_multiplier

    def cdf(self, t):
        """P(loss <= t): the loss grows with x, so this is P(x <= the x whose loss is t).

        With u = exp(x / sigma^2) and c = exp(-1 / (2 sigma^2)), that x solves
        q c u^2 + (1 - q) (1 - e^t) u - e^t q c = 0.
        """
        t = np.asarray(t, dtype=float)
        flat = np.abs(t)  # by symmetry u(-t) = 1 / u(t); for t >= 0 the root below cancels nothing
        growth = np.exp(np.minimum(flat, 700.0))
        a = self.q * np.exp(-0.5 / self.sigma**2)
        b = (1 - self.q) * (growth - 1)
        u = (b + np.sqrt(b**2 + 4 * a * a * growth)) / (2 * a)
        x = np.sign(t) * self.sigma**2 * np.log(u)
        return (1 - self.q) * norm.cdf(x / self.sigma) + self.q * norm.cdf((x - 1) / self.sigma)

    def rdp(self, alpha: float) -> float:
        """The Renyi divergence of order alpha, by quadrature."""
        spread = 12 * self.sigma + 2 * alpha
        x = np.linspace(-spread, spread, 200_001)
        log_p, log_q = self._log_density(x, 1.0), self._log_density(x, -1.0)
        integral = logsumexp(alpha * log_p + (1 - alpha) * log_q) + np.log(x[1] - x[0])
        return float(integral / (alpha - 1))

    def _log_density(self, x, shift: float):
        sampled = norm.logpdf(x, shift, self.sigma) + np.log(self.q)
        if self.q == 1:
            return sampled
        return np.logaddexp(norm.logpdf(x, 0, self.sigma) + np.log1p(-self.q), sampled)


class ReplaceOnePRVAccountant(PRVAccountant):
    """Opacus' PRV accountant, composing `ReplaceOnePRV`s."""

    def _get_dprv(self, eps_error, delta_error):
        prvs = [ReplaceOnePRV(q, sigma) for sigma, q, _ in self.history]
        steps = [count for _, _, count in self.history]
        domain = self._get_domain(prvs, steps, eps_error, delta_error)
        truncated = [TruncatedPrivacyRandomVariable(p, domain.t_min, domain.t_max) for p in prvs]
        return compose_heterogeneous([discretize(p, domain) for p in truncated], steps)

    def _get_domain(self, prvs, num_self_compositions, eps_error, delta_error):
        """A domain that the composed loss leaves with negligible probability (Gopi et al. 2021,
        remark 5.6): tail bounds of the composition, and of each release alone, by Renyi
        divergences."""
        total = sum(num_self_compositions)
        divergences = [np.array([prv.rdp(order) for order in ORDERS]) for prv in prvs]
        composed = sum(d * n for d, n in zip(divergences, num_self_compositions, strict=True))
        tails = [(composed, delta_error / 4)]
        tails += [(divergence, delta_error / (8 * total)) for divergence in divergences]
        bounds = [np.min(d + np.log(1 / mass) / (ORDERS - 1)) for d, mass in tails]
        size = max(*bounds, eps_error) + 3
        mesh = eps_error / np.sqrt(total * np.log(12 / delta_error) / 2)
        return Domain.create_aligned(-size, size, mesh)
