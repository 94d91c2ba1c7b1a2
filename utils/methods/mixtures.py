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
TINY = 1e-12
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
    """From the noisy mean over all units of what they add (`Places.measure`).

    What the noise hides is left out: places where there may be nobody, the distance of a mean from
    its place (James and Stein 1961), directions of no more variance than noise alone would give,
    and what tells the covariance of a class from that of all.

    Args:
        released: [C, K + K * d + d * (d + 1) / 2].
        noise: the deviation of every number in it.
    """
    num_classes, components, size = places.centres.shape
    split = [components, components * size, size * (size + 1) // 2]
    counts, firsts, seconds = released.double().split(split, 1)

    # Who is where, and how far from there: in units of the reach.
    counts = counts / COUNT
    somebody = counts > TOLD_APART * noise / COUNT
    somebody[:, 0] |= ~somebody.any(1)
    counts = torch.where(somebody, counts.clamp_min(max(noise / COUNT, TINY)), 0)
    at = torch.where(somebody, counts, 1)[..., None]
    away = somebody[..., None] * firsts.view(num_classes, components, size) / FIRST / at
    doubt = size * (noise / FIRST / at).square()
    away = away * (1 - doubt / away.square().sum(2, keepdim=True).clamp_min(TINY)).clamp_min(0)

    # Their covariance, about the means: of each class, and of all.
    sizes, all_of_them = counts.sum(1), counts.sum()
    raw = torch.stack([unpack(packed, size) for packed in seconds / SECOND])
    raw = raw - torch.einsum("ck,cki,ckj->cij", counts, away, away)
    pooled = raw.sum(0) / all_of_them
    hidden = noise / SECOND * (2 * size * num_classes) ** 0.5 / all_of_them  # radius of noise alone
    values, directions = torch.linalg.eigh(pooled)
    told = values > hidden
    told[-1] = True
    values, directions = values[told].clamp_min(TINY), directions[:, told]
    root, whiten = directions * values.sqrt(), directions / values.sqrt()
    roots = []
    for covariance, count in zip(raw, sizes, strict=True):
        differs = whiten.T @ (covariance / count) @ whiten - torch.eye(len(values))
        variance = (noise / SECOND / count).square() / torch.outer(values, values)
        squares = differs.square()
        differs = differs * squares / (squares + 2 * variance).clamp_min(TINY)
        shape, turned = torch.linalg.eigh(torch.eye(len(values)) + differs)
        roots.append(root @ (turned * shape.clamp_min(FLAT).sqrt()))
    reach = places.reach
    return Mixture(
        places.basis,
        (counts / sizes[:, None]).float(),
        places.centres + reach * away.float(),
        reach * torch.stack(roots).float(),
    )


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
