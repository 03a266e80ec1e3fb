"""The one table and its few ids. Legend: U ids of the universe, N some of them."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

DIM = 4
TABLE = "t"
CLASS_BITS = 1 << 52

Keys = npt.NDArray[np.int64]


def keys_of(num_ids: int) -> Keys:
    """int64 [U]: the key of every id of the universe."""
    return CLASS_BITS | np.arange(num_ids, dtype=np.int64)


def index_of(keys_N: Keys) -> Keys:
    """Where keys stand in the universe."""
    return keys_N & (CLASS_BITS - 1)
