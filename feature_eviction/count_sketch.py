"""How often has an id without a row been seen? A count-min sketch that forgets.

Four rows of saturating uint8 counters with conservative update (only those below the new estimate rise),
so that an estimate never falls short of what was added since the last halving. After `width` additions all
are halved: an addition touches 4 bytes, a halving 4 * width bytes once in `width` additions.

Source: Cormode and Muthukrishnan, J. Algorithms 2005; conservative update: Estan and Varghese, SIGCOMM 2002.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.jit import kernel
from feature_eviction.keys import Int64Array, as_keys, mix64

NUM_ROWS = 4
COUNT_MAX = 255

_SKETCH_SALT = np.uint64(0xA3C59AC2F1036E5D)
_ODD = np.uint64(1)
_HALF = np.uint64(32)


@kernel
def sketch_add(counters_RW: Any, additions_1: Any, key: Any, count: Any) -> Any:
    """Add `count` sightings of a key and return the estimate of all, at most 255."""
    num_rows, width = counters_RW.shape
    mask = np.uint64(width - 1)
    mixed = mix64(np.uint64(key) ^ _SKETCH_SALT)
    # An odd stride makes four distinct columns out of one hash.
    stride = (mixed >> _HALF) | _ODD
    estimate: Any = COUNT_MAX
    column = mixed
    for row in range(num_rows):
        estimate = min(estimate, np.int64(counters_RW[row, column & mask]))
        column += stride
    estimate = min(COUNT_MAX, estimate + count)
    column = mixed
    for row in range(num_rows):
        if counters_RW[row, column & mask] < estimate:
            counters_RW[row, column & mask] = estimate
        column += stride
    additions_1[0] += 1
    if additions_1[0] >= width:
        additions_1[0] = 0
        for row in range(num_rows):
            for halved in range(width):
                counters_RW[row, halved] >>= 1
    return estimate


@kernel
def _add(counters_RW: Any, additions_1: Any, keys_N: Any, counts_N: Any, estimates_N: Any) -> None:
    for i in range(len(keys_N)):
        estimates_N[i] = sketch_add(counters_RW, additions_1, keys_N[i], counts_N[i])


class CountSketch:
    """The sketch by itself; IdTable's kernels work on its two arrays."""

    def __init__(self, width: int) -> None:
        """Args: width: counters a row, a power of two; 0 = a sketch that is never asked.

        Raises: ValueError for other widths.
        """
        if width < 0 or width & (width - 1):
            raise ValueError(f"count sketch: width must be a power of two, found {width}")
        self.counters_RW: npt.NDArray[np.uint8] = np.zeros((NUM_ROWS, width), np.uint8)
        self.additions_1: Int64Array = np.zeros(1, np.int64)

    @property
    def bytes_used(self) -> int:
        return self.counters_RW.nbytes

    def add(self, keys_N: npt.ArrayLike, counts_N: npt.ArrayLike) -> Int64Array:
        """Add one by one; the estimate after each addition, int64 [N] in 0..255."""
        keys_N = as_keys(keys_N)
        counts_N = as_keys(counts_N, name="counts_N")
        estimates_N = np.empty(len(keys_N), np.int64)
        _add(self.counters_RW, self.additions_1, keys_N, counts_N, estimates_N)
        return estimates_N
