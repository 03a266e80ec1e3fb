"""The row store's memory budget, as pure functions: what a row takes, how many must go, which ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

INDEX_BYTES = 40
"""A key's part of the slot map: about two cells of 16 bytes at its usual fill, and two links of 4 bytes."""
SLACK = 0.05
"""A store at its budget frees so much more, so that not every version has to look at every score."""


def row_bytes(dim: int, *, columns: Iterable[np.dtype[Any]]) -> int:
    """What one row takes with its columns and its part of the index."""
    return 4 * dim + INDEX_BYTES + sum(dtype.itemsize for dtype in columns)


def rows_over_budget(num_rows: int, *, row_bytes: int, bytes_max: int, slack: float = SLACK) -> int:
    """How many of `num_rows` must go for the rest to fit `bytes_max`; 0: they fit."""
    allowed = max(0, bytes_max) // row_bytes
    if num_rows <= allowed:
        return 0
    return num_rows - int(allowed * (1 - slack))


def lowest_scores(scores_N: npt.NDArray[np.float32], num: int) -> npt.NDArray[np.int64]:
    """The positions of the `num` lowest scores, in no order."""
    if num >= len(scores_N):
        return np.arange(len(scores_N))
    return np.argpartition(scores_N, num)[:num]
