"""Gaussians, fitted to released moments; nothing here has seen a private image.

Shapes: d numbers an image; C classes; K Gaussians a class, all of one shape.
"""

from dataclasses import dataclass

import torch
from sklearn.cluster import KMeans

from utils.methods.mean_features import COUNT, SIDE
from utils.methods.moments import FIRST, SECOND, Places, unpack

DRAWS = 4000  # images a class from which the places of the next round are chosen
REACHED = 0.9  # of them are within its reach
TOLD_APART = 3.0  # noise deviations that a count must reach: below it there may be nobody
TINY = 1e-12  # in place of zero, where one divides
FLAT = 0.02  # the least variance a direction keeps, in that of all classes together


@dataclass(frozen=True)
class Mixture:
    """What images are drawn from.

    Attributes:
        basis: [d, channels * 32 * 32]. shares: [C, K], summing to one over K.
        means: [C, K, d]. roots: [C, d, r], whose products with themselves are the covariances.
    """

    basis: torch.Tensor
    shares: torch.Tensor
    means: torch.Tensor
    roots: torch.Tensor

    def draw(self, classes: torch.Tensor, seed: int) -> torch.Tensor:
        """The cosines of one image a class number: [n, d]."""
        draws = torch.Generator().manual_seed(seed)
        own = torch.multinomial(self.shares[classes], 1, generator=draws)[:, 0]
        noise = torch.randn(len(classes), self.roots.shape[2], generator=draws)
        away = torch.einsum("ndr,nr->nd", self.roots[classes], noise)
        return self.means[classes, own] + away

    def draw_images(self, classes: torch.Tensor, seed: int) -> torch.Tensor:
        """Images, uint8 [n, 3, 32, 32]."""
        seen = (self.draw(classes, seed) @ self.basis).view(len(classes), -1, SIDE, SIDE)
        return seen.expand(-1, 3, -1, -1).clamp(-1, 1).add(1).mul(127.5).round().byte()


def fit_mixture(released: torch.Tensor, places: Places, noise: float) -> Mixture:
    """From the noisy mean over all units of what they add (`Places.measure`); what the noise hides
    is left out.

    Args:
        released: [C, K + K * d + d * (d + 1) / 2].
        noise: the deviation of every number in it.
    """
    num_classes, components, size = places.centres.shape
    split = [components, components * size, size * (size + 1) // 2]
    counts, firsts, seconds = released.double().split(split, 1)
    firsts = firsts.view(num_classes, components, size)
    shares, away = find_means(counts / COUNT, firsts / FIRST, noise)
    seconds = torch.stack([unpack(packed, size) for packed in seconds / SECOND])
    about_means = seconds - torch.einsum("ck,cki,ckj->cij", shares, away, away)
    sizes = shares.sum(1)
    roots = find_roots(about_means, sizes, noise / SECOND)
    return Mixture(
        places.basis,
        (shares / sizes[:, None]).float(),
        places.centres + places.reach * away.float(),
        places.reach * roots.float(),
    )


def find_means(
    counts: torch.Tensor, firsts: torch.Tensor, noise: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The share of all units at each place [C, K], and how far their mean is from it [C, K, d], in
    units of the reach.

    Nobody is where a count may be noise alone. The noise draws means away from their places: they
    are drawn back (James and Stein 1961).
    """
    doubt, size = noise / COUNT, firsts.shape[2]
    somebody = counts > TOLD_APART * doubt
    somebody[:, 0] |= ~somebody.any(1)
    shares = torch.where(somebody, counts.clamp_min(max(doubt, TINY)), 0)
    at = torch.where(somebody, shares, 1)[..., None]
    away = somebody[..., None] * firsts / at
    by_noise = size * (noise / FIRST / at).square()
    shrunk = 1 - by_noise / away.square().sum(2, keepdim=True).clamp_min(TINY)
    return shares, away * shrunk.clamp_min(0)


def find_roots(seconds: torch.Tensor, sizes: torch.Tensor, noise: float) -> torch.Tensor:
    """Roots of the covariances [C, d, r], of sums of products about the means [C, d, d].

    Kept are the r directions in which all classes together vary by more than the largest eigenvalue
    that noise alone would have; and of what tells a class from all, number by number, what stands
    out of the noise.

    Args:
        sizes: [C], the share of all units. noise: of a number on the diagonal.
    """
    num_classes, size, everybody = len(seconds), seconds.shape[1], sizes.sum()
    values, directions = torch.linalg.eigh(seconds.sum(0) / everybody)
    told = values > noise * (2 * size * num_classes) ** 0.5 / everybody
    told[-1] = True
    values, directions = values[told].clamp_min(TINY), directions[:, told]
    root, whiten = directions * values.sqrt(), directions / values.sqrt()
    one, roots = torch.eye(len(values), dtype=values.dtype), []
    for products, share in zip(seconds, sizes, strict=True):
        differs = whiten.T @ (products / share) @ whiten - one
        variance = (noise / share).square() / torch.outer(values, values)
        squares = differs.square()
        differs = differs * squares / (squares + 2 * variance).clamp_min(TINY)
        spread, turned = torch.linalg.eigh(one + differs)
        roots.append(root @ (turned * spread.clamp_min(FLAT).sqrt()))
    return torch.stack(roots)


def choose_places(mixture: Mixture, seed: int) -> Places:
    """The places of the next round: centres of clusters of images drawn from the mixture."""
    num_classes, components, _ = mixture.means.shape
    centres, distances = [], []
    for number in range(num_classes):
        drawn = mixture.draw(torch.full((DRAWS,), number), seed + number)
        clusters = KMeans(components, n_init=1, random_state=seed).fit(drawn.double().numpy())
        centres.append(torch.from_numpy(clusters.cluster_centers_).float())
        distances.append(torch.cdist(drawn, centres[-1]).min(1).values)
    reach = torch.cat(distances).quantile(REACHED).item()
    return Places(mixture.basis, torch.stack(centres), reach)
