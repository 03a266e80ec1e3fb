"""How often has an id without a row been seen lately? A count-min sketch that forgets by event time.

Four rows of saturating uint8 counters with conservative update (only those below the new estimate rise),
so that an estimate never falls short of what was added since the last halving. All counters are halved when
event time enters the next window of `window_s`, and after `width` additions, lest unseen ids fill the sketch.

Nothing stops to halve: halvings are numbered, each run of 64 counters knows which it has had, and makes up
for the others when one of its counters is next asked for. An addition so touches at most four runs.

Source: Cormode and Muthukrishnan, J. Algorithms 2005; conservative update: Estan and Varghese, SIGCOMM 2002.
Legend: R rows, W counters a row, B runs a row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.jit import kernel
from feature_eviction.keys import Int32Array, Int64Array, as_keys, mix64

NUM_ROWS = 4
COUNT_MAX = 255
RUN = 64
"""Counters that are halved together: a cache line."""

ADDITIONS, HALVINGS, WINDOW = range(3)
"""Places of the clock: additions since the last halving, halvings so far, the newest window of event time."""

_HALVINGS_TO_ZERO = 8
_SKETCH_SALT = np.uint64(0xA3C59AC2F1036E5D)
_ODD = np.uint64(1)
_HALF = np.uint64(32)
_RUN_SHIFT = np.uint64(6)


def num_runs(width: int) -> int:
    """Runs of a row."""
    return -(-width // RUN)


def sketch_bytes(width: int) -> int:
    """The counters, and 4 bytes a run."""
    return NUM_ROWS * (width + 4 * num_runs(width))


@kernel
def _make_up(counters_RW: Any, halved_RB: Any, row: Any, column: Any, halvings: Any) -> None:
    """Halve the run of a column as often as all others should have been."""
    run = np.int64(column >> _RUN_SHIFT)
    missed = halvings - np.int64(halved_RB[row, run])
    if missed > 0:
        shift = min(missed, _HALVINGS_TO_ZERO)
        for i in range(run * RUN, min((run + 1) * RUN, counters_RW.shape[1])):
            counters_RW[row, i] = counters_RW[row, i] >> shift
        halved_RB[row, run] = halvings


@kernel
def sketch_add(sketch: Any, key: Any, count: Any, now_s: Any, window_s: Any) -> Any:
    """Add `count` sightings of a key and return the estimate of all, at most 255.

    sketch: (counters_RW, halved_RB, clock_3). A now_s before the newest window counts into that one.
    """
    counters_RW, halved_RB, clock_3 = sketch
    num_rows, width = counters_RW.shape
    window = now_s // window_s
    if window > clock_3[WINDOW]:
        clock_3[HALVINGS] += min(window - clock_3[WINDOW], _HALVINGS_TO_ZERO)
        clock_3[WINDOW] = window
        clock_3[ADDITIONS] = 0
    halvings = clock_3[HALVINGS]
    mask = np.uint64(width - 1)
    mixed = mix64(np.uint64(key) ^ _SKETCH_SALT)
    # An odd stride makes four distinct columns out of one hash.
    stride = (mixed >> _HALF) | _ODD
    estimate: Any = COUNT_MAX
    column = mixed
    for row in range(num_rows):
        _make_up(counters_RW, halved_RB, row, column & mask, halvings)
        estimate = min(estimate, np.int64(counters_RW[row, column & mask]))
        column += stride
    estimate = min(COUNT_MAX, estimate + count)
    column = mixed
    for row in range(num_rows):
        if counters_RW[row, column & mask] < estimate:
            counters_RW[row, column & mask] = estimate
        column += stride
    clock_3[ADDITIONS] += 1
    if clock_3[ADDITIONS] >= width:
        clock_3[ADDITIONS] = 0
        clock_3[HALVINGS] += 1
    return estimate


@kernel
def _add(sketch: Any, keys_N: Any, counts_N: Any, now_s: Any, window_s: Any, estimates_N: Any) -> None:
    for i in range(len(keys_N)):
        estimates_N[i] = sketch_add(sketch, keys_N[i], counts_N[i], now_s, window_s)


class CountSketch:
    """The sketch by itself; IdTable's kernels work on its arrays."""

    def __init__(self, width: int, *, window_s: int = 86_400) -> None:
        """Args: width: counters a row, a power of two; 0 = a sketch that is never asked.

        Raises: ValueError for other widths, or a window below a second.
        """
        if width < 0 or width & (width - 1):
            raise ValueError(f"count sketch: width must be a power of two, found {width}")
        if window_s < 1:
            raise ValueError(f"count sketch: window_s must be at least 1, found {window_s}")
        self.window_s = window_s
        self.counters_RW: npt.NDArray[np.uint8] = np.zeros((NUM_ROWS, width), np.uint8)
        """As of each run's last halving."""
        self.halved_RB: Int32Array = np.zeros((NUM_ROWS, num_runs(width)), np.int32)
        self.clock_3: Int64Array = np.zeros(3, np.int64)

    @property
    def bytes_used(self) -> int:
        return self.counters_RW.nbytes + self.halved_RB.nbytes

    def add(self, keys_N: npt.ArrayLike, counts_N: npt.ArrayLike, *, now_s: int) -> Int64Array:
        """Add one by one; the estimate after each addition, int64 [N] in 0..255."""
        keys_N = as_keys(keys_N)
        counts_N = as_keys(counts_N, name="counts_N")
        estimates_N = np.empty(len(keys_N), np.int64)
        sketch = (self.counters_RW, self.halved_RB, self.clock_3)
        _add(sketch, keys_N, counts_N, now_s, self.window_s, estimates_N)
        return estimates_N
