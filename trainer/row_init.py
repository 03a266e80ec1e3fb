"""The first value of a row: a pure function of seed, key and column.

Whichever rank makes the row, whenever, in whatever slot: an id starts from the same values, so a run in
which no row is evicted does not depend on the number of ranks, and a row that was starts again from there.
Shapes: N rows, D dim.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def first_rows(
    keys_N: npt.NDArray[np.int64], *, dim: int, scale: float, seed: int
) -> npt.NDArray[np.float32]:
    """Returns: float32 [N, D], uniform in [-scale, scale)."""
    seed_mix = _splitmix64(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], np.uint64))
    with np.errstate(over="ignore"):
        key_mix_N = _splitmix64(keys_N.astype(np.int64).view(np.uint64) ^ seed_mix)
        counter_ND = key_mix_N[:, None] + np.arange(1, dim + 1, dtype=np.uint64)[None, :] * _GOLDEN
    unit_ND = (_splitmix64(counter_ND) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    return (unit_ND * np.float32(2.0) - np.float32(1.0)) * np.float32(scale)


def _splitmix64(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    with np.errstate(over="ignore"):
        x = x + _GOLDEN
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))
