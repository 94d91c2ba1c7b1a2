"""Secret randomness, kept apart from the seeded randomness of everything else.

Everything random inside private training comes from here: which units are drawn, the noise of
DP-SGD, and each unit's diffusion noise, timestep and flip. The last three need no secrecy of their
own, but if they came from a generator that anyone can re-seed, adding one unit would visibly shift
the draws of all others, and one unit's influence would no longer be bounded by its own gradient.

PyTorch's CPU generator keeps only the low 32 bits of its seed (seeds 5 and 5 + 2**32 give the same
stream), few enough to try them all. The draws come from NumPy's Philox with a 128-bit key.
"""

import secrets

import numpy as np
import torch


class SecretRandomness:
    """Draws whose key comes from the operating system, never from `--seed`; cannot be saved.

    Args:
        debug_seed: a fixed key, for debugging and tests only: whatever is trained with it is NOT
            PRIVATE, and `is_private` says so.
    """

    def __init__(self, debug_seed: int | None = None):
        self.is_private = debug_seed is None
        key = secrets.randbits(128) if debug_seed is None else debug_seed
        self._generator = np.random.Generator(np.random.Philox(key=key))

    def normal(self, shape: tuple[int, ...]) -> torch.Tensor:
        """Independent standard normals, fp32, on the CPU."""
        return torch.from_numpy(self._generator.standard_normal(shape, dtype=np.float32))

    def bernoulli(self, probability: float, count: int) -> torch.Tensor:
        """`count` independent coins, each True with `probability` (compared at 53 bits)."""
        return torch.from_numpy(self._generator.random(count) < probability)

    def integers(self, high: int, shape: tuple[int, ...]) -> torch.Tensor:
        """Independent integers, uniform on 0 ... high - 1."""
        return torch.from_numpy(self._generator.integers(high, size=shape))

    def __reduce__(self):
        raise TypeError("secret randomness is never saved or copied: make a fresh one")
