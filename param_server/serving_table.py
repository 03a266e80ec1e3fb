"""One table of a replica: packed rows by slot, what decides who stays, and the map from key to slot.

Rows stay in their row format, so int8 rows take a quarter of the memory; they are unpacked when gathered.
Shapes: C slots, N rows of a version or keys of a gather, W columns of a packed row.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.big_arrays import big_array
from feature_eviction.slot_map import SlotMap
from proto.row_formats import ROW_DTYPES, RowFormat, packed_row_bytes, packed_width

CAPACITY_MIN = 256
INDEX_BYTES_PER_SLOT = 28
"""A slot map's 16 bytes a cell at a load of 0.8, and 8 a slot."""
INDEX_BYTES = 64

Keys = npt.NDArray[np.int64]


class ServingTable:
    """A slot without a key is free. One writer; readers need the store's lock."""

    def __init__(
        self, dim: int, row_format: RowFormat, *, capacity: int, keeps_seen: bool, keeps_worth: bool
    ) -> None:
        self.dim = dim
        self.row_format = row_format
        self.slots = SlotMap(max(1, capacity))
        num = self.slots.capacity
        self.rows_CW: npt.NDArray[Any] = big_array(
            (num, packed_width(dim, row_format)), ROW_DTYPES[row_format]
        )
        self.last_seen_s_C = big_array(num, np.uint32) if keeps_seen else None
        self.worth_C = big_array(num, np.float64) if keeps_worth else None

    @property
    def num_bytes(self) -> int:
        columns = (self.rows_CW, self.last_seen_s_C, self.worth_C)
        return self.slots.bytes_used + sum(column.nbytes for column in columns if column is not None)

    def grown(self, capacity: int) -> dict[str, npt.NDArray[Any]]:
        """Larger copies of the columns, to be put in place together with the map's `grow`."""
        copies = {}
        for name in ("rows_CW", "last_seen_s_C", "worth_C"):
            column = getattr(self, name)
            if column is not None:
                copies[name] = big_array((capacity, *column.shape[1:]), column.dtype)
                copies[name][: len(column)] = column
        return copies

    def put_grown(self, copies: dict[str, npt.NDArray[Any]]) -> None:
        for name, column in copies.items():
            setattr(self, name, column)
        self.slots.grow(len(self.rows_CW))

    def write(
        self,
        slots_N: Keys,
        rows_NW: npt.NDArray[Any],
        last_seen_s_N: npt.NDArray[np.int64],
        worth_N: npt.NDArray[np.float64],
    ) -> None:
        """Fill slots that no key points to."""
        self.rows_CW[slots_N] = rows_NW
        if self.last_seen_s_C is not None:
            self.last_seen_s_C[slots_N] = np.clip(last_seen_s_N, 0, 2**32 - 1)
        if self.worth_C is not None:
            self.worth_C[slots_N] = worth_N

    def gather(self, keys_N: Keys) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
        """Packed rows [N, W], undefined where a key is absent, and which are present."""
        slots_N = self.slots.lookup(keys_N)
        return self.rows_CW[slots_N], slots_N >= 0


def bytes_per_row(dim: int, row_format: str, *, keeps_seen: bool, keeps_worth: bool) -> int:
    return INDEX_BYTES_PER_SLOT + packed_row_bytes(dim, row_format) + 4 * keeps_seen + 8 * keeps_worth


def capacity_within(num_bytes: int, *, row_bytes: int) -> int:
    """Slots of a table that takes at most `num_bytes`."""
    return max(0, (num_bytes - INDEX_BYTES) // row_bytes)
