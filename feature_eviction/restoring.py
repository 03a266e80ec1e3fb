"""Rows that come back from a checkpoint into a table of any size: the best that fit.

Legend: N rows given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from feature_eviction.cells import home_cell
from feature_eviction.jit import kernel
from feature_eviction.keys import Int64Array, as_keys, class_of
from feature_eviction.layout import BY_QUOTA, BY_SCORE, EXPIRY_TICK, NUM_ROWS_HELD, ROW_LIMIT, Table
from feature_eviction.mapping import UPDATES_MAX, insert_columns
from feature_eviction.row_cells import lookup_rows
from feature_eviction.user_score import apply_score

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


def insert_best_rows(table: Table, columns: RowColumns, *, score: Any, tick_s: int) -> Int64Array:
    """Slots int64 [N]; -1 for the rows that did not fit, counted as evicted for their score or quota.

    Rows are compared by what they are worth as of the newest sighting among them.
    """
    keys_N = columns.keys_N
    slots_N = np.empty(len(keys_N), np.int64)
    lookup_rows(table.cells_C, keys_N, slots_N)
    if (slots_N >= 0).any():
        raise ValueError(f"insert_rows: key {keys_N[int(slots_N.argmax())]} is held already")
    if len(keys_N) == 0:
        return slots_N
    rules_N = table.rules.rule_of_class[class_of(keys_N)].astype(np.int64)
    now_s = int(columns.last_seen_s_N.max())
    if table.cursors[NUM_ROWS_HELD] == 0:
        # The wheel has not turned yet: lifetimes count from here.
        table.cursors[EXPIRY_TICK] = now_s // tick_s
    worths_N = np.empty(len(keys_N), np.float64)
    _worths(score, columns, now_s, worths_N)
    # The best first; ties keep the order given.
    order_N = np.lexsort((np.arange(len(keys_N)), -worths_N, ~table.rules.protected_R[rules_N]))
    kept_N = np.ones(len(keys_N), np.bool_)
    for rule in np.flatnonzero((table.rules.max_rows_R >= 0) & ~table.rules.protected_R):
        room = max(0, int(table.rules.max_rows_R[rule] - table.rows_R[rule]))
        beyond_quota = order_N[rules_N[order_N] == rule][room:]
        kept_N[beyond_quota] = False
        table.counters_RK[rule, BY_QUOTA] += len(beyond_quota)
    room = max(0, int(table.cursors[ROW_LIMIT] - table.cursors[NUM_ROWS_HELD]))
    left_out = order_N[kept_N[order_N]][room:]
    kept_N[left_out] = False
    np.add.at(table.counters_RK[:, BY_SCORE], rules_N[left_out], 1)
    kept_columns = RowColumns(
        keys_N[kept_N],
        columns.scores_N[kept_N],
        columns.last_seen_s_N[kept_N],
        columns.updates_N[kept_N],
    )
    kept_slots = np.empty(int(kept_N.sum()), np.int64)
    insert_columns(table, kept_columns.keys_N, kept_columns, tick_s, kept_slots)
    slots_N[~kept_N] = -1
    slots_N[kept_N] = kept_slots
    return slots_N


@kernel
def _worths(score: Any, columns: Any, now_s: Any, worths_N: Any) -> None:
    for i in range(len(worths_N)):
        age_s = max(0, now_s - columns.last_seen_s_N[i])
        old = np.float64(columns.scores_N[i])
        worths_N[i] = apply_score(score, old, 0, 0, age_s, columns.updates_N[i])


@kernel
def home_cells(cells_C: Any, keys_N: Any, homes_N: Any) -> None:
    """The home cell of each key."""
    for i in range(len(keys_N)):
        homes_N[i] = home_cell(cells_C, keys_N[i])
