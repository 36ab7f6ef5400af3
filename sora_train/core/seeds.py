"""Counter-based random numbers for data order, timesteps and noise seeds: a hash of integers, the same on any machine.

The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014),
a bijection on 64 bits that passes the usual statistical tests, needs no state, and vectorises over uint64 arrays.
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


Part = int | np.integer | np.ndarray


def hash64(*parts: Part) -> np.ndarray:
    """Hash integers, or broadcastable arrays of them, to uint64. The order of the parts matters."""
    state = np.zeros((), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            value = np.asarray(part if isinstance(part, np.ndarray) else int(part) & 0xFFFFFFFFFFFFFFFF)
            state = (state ^ value.astype(np.uint64)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _MIX_1
            state = (state ^ (state >> np.uint64(27))) * _MIX_2
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state, dtype=np.uint64)


def uniform(*parts: Part) -> np.ndarray:
    """Uniform float64 in [0, 1), one for each hash of the parts (53 random bits)."""
    return (hash64(*parts) >> np.uint64(11)).astype(np.float64) * (1.0 / (1 << 53))


def below(limit: int | np.ndarray, *parts: Part) -> np.ndarray:
    """Uniform int64 in [0, limit), one for each hash of the parts; the bias is below limit / 2**32."""
    high = (hash64(*parts) >> np.uint64(32)).astype(np.uint64)
    return ((high * np.asarray(limit).astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def order(*parts: Part) -> np.ndarray:
    """Random permutation: the one that sorts the hashes of the parts."""
    return np.argsort(hash64(*parts), kind="stable")


# Purposes of a visit's seed. Every use includes one of these in the hash, so that no two uses draw the same numbers.
TASK, FIRST_FRAME, CAPTION, DROP_CAPTION, TIMESTEP, NOISE, GIVEN_FRAMES, POSTERIOR, PER_FRAME, AUGMENT = range(10)


def stream(seed: int, purpose: int) -> int:
    """Seed of a visit for one purpose, as a non-negative integer that torch.Generator accepts."""
    return int(hash64(np.uint64(seed), purpose)) >> 1
