"""Rows that come back from a checkpoint into a table of any size: the best that fit.

Legend: N rows given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_eviction.cells import lookup_cells
from feature_eviction.keys import Int64Array, as_keys, class_of
from feature_eviction.layout import BY_SCORE, NUM_ROWS_HELD, RECORD_DTYPE, Table
from feature_eviction.mapping import UPDATES_MAX, insert_records
from feature_eviction.score import KRAKEN, LFU, LRU, SCORE_EPOCH_S

LAST_SEEN_S_MAX = 2**32 - 1


class RowColumns(NamedTuple):
    """The columns of rows to insert, checked."""

    keys_N: Int64Array
    scores_N: npt.NDArray[np.float32]
    last_seen_s_N: Int64Array
    updates_N: Int64Array

    @classmethod
    def checked(
        cls,
        keys_N: npt.ArrayLike,
        *,
        scores_N: npt.ArrayLike,
        last_seen_s_N: npt.ArrayLike,
        updates_N: npt.ArrayLike,
    ) -> RowColumns:
        """Raises: ValueError for differing lengths, a score that is not finite, or numbers out of range."""
        columns = cls(
            as_keys(keys_N),
            np.asarray(scores_N, dtype=np.float32),
            as_keys(last_seen_s_N, name="last_seen_s_N"),
            as_keys(updates_N, name="updates_N"),
        )
        num_rows = len(columns.keys_N)
        for name in cls._fields:
            shape = getattr(columns, name).shape
            if shape != (num_rows,):
                raise ValueError(f"insert_rows: {name} must be [{num_rows}], found {list(shape)}")
        if not np.isfinite(columns.scores_N).all():
            raise ValueError("insert_rows: scores_N must be finite")
        bounds = (("last_seen_s_N", LAST_SEEN_S_MAX), ("updates_N", UPDATES_MAX))
        for name, highest in bounds:
            column = getattr(columns, name)
            if num_rows and not (column.min() >= 0 and column.max() <= highest):
                raise ValueError(
                    f"insert_rows: {name} must be in 0..{highest}, found {column.min()}..{column.max()}"
                )
        if len(np.unique(columns.keys_N)) != num_rows:
            raise ValueError("insert_rows: keys_N must be distinct, found a key twice")
        return columns


def insert_best_rows(table: Table, columns: RowColumns, *, score_kind: int, released: int) -> Int64Array:
    """Slots int64 [N]; -1 for the rows that did not fit, counted as evicted for their score."""
    keys_N = columns.keys_N
    slots_N = np.empty(len(keys_N), np.int64)
    lookup_cells(table.cells_C2, keys_N, slots_N)
    if (slots_N >= 0).any():
        raise ValueError(f"insert_rows: key {keys_N[int(slots_N.argmax())]} is held already")
    rules_N = table.rules.rule_of_class[class_of(keys_N)]
    kept_N = np.ones(len(keys_N), np.bool_)
    num_free = len(table.keys_S) - int(table.cursors[NUM_ROWS_HELD])
    num_left_out = len(keys_N) - num_free
    if num_left_out > 0:
        # Ties leave by the later place first, so that the order given decides.
        places_N = np.arange(len(keys_N))
        order_N = np.lexsort((-places_N, _worth(columns, score_kind), table.rules.protected_R[rules_N]))
        left_out = order_N[:num_left_out]
        kept_N[left_out] = False
        np.add.at(table.counters_RK[:, BY_SCORE], rules_N[left_out], 1)
    kept_slots = np.empty(int(kept_N.sum()), np.int64)
    insert_records(table, keys_N[kept_N], _records(columns, score_kind, released)[kept_N], kept_slots)
    slots_N[kept_N] = kept_slots
    return slots_N


def _worth(columns: RowColumns, score_kind: int) -> npt.NDArray[np.float64]:
    by_kind: dict[int, npt.NDArray[Any]] = {
        KRAKEN: columns.scores_N,
        LRU: columns.last_seen_s_N,
        LFU: columns.updates_N,
    }
    return by_kind[score_kind].astype(np.float64)


def _records(columns: RowColumns, score_kind: int, released: int) -> npt.NDArray[np.void]:
    """In no batch in flight, as if last used in the newest released one."""
    records_N = np.empty(len(columns.keys_N), RECORD_DTYPE)
    records_N["last_seen_s"] = columns.last_seen_s_N
    records_N["updates"] = columns.updates_N
    records_N["last_batch"] = released % 2**32
    if score_kind == KRAKEN:
        records_N["score"] = columns.scores_N
    elif score_kind == LRU:
        records_N["score"] = columns.last_seen_s_N - SCORE_EPOCH_S
    else:
        records_N["score"] = columns.updates_N
    return records_N
