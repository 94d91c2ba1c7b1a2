"""Secret randomness, kept apart from the seeded randomness of everything else.

Everything random inside private training comes from here: which units are sampled, the noise of
DP-SGD, and each unit's images, diffusion noise, timesteps and flips. The last need not
be secret, but if they came from a generator that anyone can re-seed, adding one unit would visibly
shift the values of all others, and one unit's influence would no longer be bounded by its gradient.

PyTorch's CPU generator keeps only the low 32 bits of its seed (seeds 5 and 5 + 2**32 give the same
stream), few enough to try them all. The values come from NumPy's Philox with a 128-bit key, or from
the operating system's cryptographic generator.
"""

import math
import os
import secrets

import numpy as np
import torch

from utils.errors import UsageError


class SecretRandomness:
    """Random values whose key comes from the operating system, never from `--seed`; never saved.

    Args:
        debug_seed: a fixed key, for debugging and tests only: whatever is trained with it is NOT
            PRIVATE, and `is_private` says so.
    """

    def __init__(self, debug_seed: int | None = None):
        self.is_private = debug_seed is None
        self.source = "Philox, keyed by the operating system's entropy"
        if not self.is_private:
            self.source = "a fixed seed"
        key = secrets.randbits(128) if debug_seed is None else debug_seed
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Independent uniforms on [0, 1), 53 bits each, fp64, on the CPU."""
        return torch.from_numpy(self._generator.random(shape))

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Independent standard normals for the diffusion loss, fp32, on the CPU."""
        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Independent standard normals for the private sum, fp64, on the CPU."""
        return torch.from_numpy(self._generator.standard_normal(shape))

    def bernoulli(self, probability: float, count: int) -> torch.Tensor:
        """`count` independent coins, each True with `probability` (compared at 53 bits)."""
        return self.uniform((count,)) < probability

    def __reduce__(self):
        raise TypeError("secret randomness is never saved or copied: make a fresh one")


class SecureRandomness(SecretRandomness):
    """The same, from the operating system's cryptographic generator (`--secure_noise`).

    One floating-point Gaussian can take so few values that a noisy sum may tell which sum it came
    from (Mironov 2012). So each noise value is the scaled sum of four (two Box-Muller pairs), whose
    combinations are too many to search (Holohan and Braghin 2021).
    """

    def __init__(self):
        super().__init__()
        self.source = "the operating system's cryptographic generator"

    def uniform(self, shape: tuple[int, ...]) -> torch.Tensor:
        bits = np.frombuffer(os.urandom(8 * math.prod(shape)), dtype=np.uint64) >> np.uint64(11)
        return torch.from_numpy((bits * 2.0**-53).reshape(shape))

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        return self._pairs(shape, 1)[0].float()

    def noise(self, shape: tuple[int, ...]) -> torch.Tensor:
        first, second = self._pairs(shape, 2), self._pairs(shape, 2)
        return (first.sum(0) + second.sum(0)) / 2

    def _pairs(self, shape: tuple[int, ...], kept: int) -> torch.Tensor:
        """One or both values of a Box-Muller pair: [kept, *shape], independent."""
        radius = (-2 * torch.log1p(-self.uniform(shape))).sqrt()
        angle = 2 * math.pi * self.uniform(shape)
        return torch.stack([radius * angle.cos(), radius * angle.sin()][:kept])


def make_randomness(secure: bool = False, debug_seed: int | None = None) -> SecretRandomness:
    """The source of the noise and of the batches: `--secure_noise`, `--debug_noise_seed`.

    Raises:
        UsageError: both reproducible and secure noise were asked for.
    """
    if not secure:
        return SecretRandomness(debug_seed)
    if debug_seed is not None:
        raise UsageError("--secure_noise and --debug_noise_seed exclude each other")
    return SecureRandomness()
