"""Zipf-distributed ranks over a bounded population, fast enough to be drawn between rounds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ZIPF_EXPONENT = 1.05


def zipf_ranks(
    generator: np.random.Generator, num: int, *, num_ranks: int, exponent: float = ZIPF_EXPONENT
) -> npt.NDArray[np.int64]:
    """int64 [num] in 0..num_ranks-1, rank 0 the most frequent; exponent other than 1.

    By the inverse of the continuous distribution with density x^-exponent on [1, num_ranks + 1).
    """
    power = 1.0 - exponent
    edge = (num_ranks + 1.0) ** power
    ranks_N: npt.NDArray[np.float64] = (1.0 + generator.random(num) * (edge - 1.0)) ** (1.0 / power) - 1.0
    return np.minimum(ranks_N, num_ranks - 1).astype(np.int64)
