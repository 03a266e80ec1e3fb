"""An IdTable as flat arrays and back: what is saved, and what is checked before it is believed.

The cells are not saved: where keys lie in them depends on the order of insertions, what a lookup answers does
not.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.cells import fill_cells
from feature_eviction.errors import StateError
from feature_eviction.jit import kernel
from feature_eviction.keys import Int64Array
from feature_eviction.layout import EXPIRY_HAND, FREE_HEAD, NUM_ROWS_HELD, VICTIM_HAND, Table, empty_table
from feature_eviction.policy import TablePolicy
from feature_eviction.score import SCORE_KINDS

State = dict[str, npt.NDArray[Any]]

_RECORD_FIELDS = ("score", "last_seen_s", "updates", "last_batch")


def state_of(table: Table, policy: TablePolicy, *, batch: int, released: int) -> State:
    """Copies; int64, uint32, uint64, uint8 and float32 arrays of one or two dimensions."""
    return {
        "keys": table.keys_S.copy(),
        **{name: table.records_S[name].copy() for name in _RECORD_FIELDS},
        "counters": table.counters_RK.copy(),
        "cursors": table.cursors.copy(),
        "random": table.random_1.copy(),
        "sketch": table.sketch_RW.copy(),
        "sketch_additions": table.sketch_additions_1.copy(),
        "batches": np.array([batch, released], np.int64),
        "classes": _class_ids(policy),
        "score_kind": np.array([SCORE_KINDS[policy.score.kind]], np.int64),
    }


def restored_table(policy: TablePolicy, state: State) -> tuple[Table, int, int]:
    """The table, its newest batch and its newest released one. Raises: StateError naming an array."""
    table = empty_table(policy)
    expected = state_of(table, policy, batch=0, released=0)
    if state.keys() != expected.keys():
        differing = sorted(state.keys() ^ expected.keys())
        raise StateError(f"id table state: arrays {sorted(expected)} expected, differing in {differing}")
    for name, like in expected.items():
        found = state[name]
        _check(
            name,
            found.dtype == like.dtype and found.shape == like.shape,
            f"{like.dtype} {list(like.shape)} expected, found {found.dtype} {list(found.shape)}",
        )
    for name in ("classes", "score_kind"):
        same = np.array_equal(state[name], expected[name])
        _check(name, same, f"{expected[name].tolist()} by the policy, found {state[name].tolist()}")
    batch, released = (int(number) for number in state["batches"])
    _check("batches", 0 <= released <= batch, f"0 <= released <= newest expected, found {released}, {batch}")
    _check("counters", bool((state["counters"] >= 0).all()), "a count is negative")
    additions = int(state["sketch_additions"][0])
    limit = max(1, policy.sketch_width_used)
    _check("sketch_additions", 0 <= additions < limit, f"0..{limit - 1} expected, found {additions}")
    _copy_into(table, state)
    _check_slots(table)
    return table, batch, released


def _class_ids(policy: TablePolicy) -> Int64Array:
    return np.array([one.class_id for one in policy.classes], np.int64)


def _copy_into(table: Table, state: State) -> None:
    table.keys_S[:] = state["keys"]
    for name in _RECORD_FIELDS:
        table.records_S[name] = state[name]
    table.counters_RK[:] = state["counters"]
    table.cursors[:] = state["cursors"]
    table.random_1[:] = state["random"]
    table.sketch_RW[:] = state["sketch"]
    table.sketch_additions_1[:] = state["sketch_additions"]


def _check_slots(table: Table) -> None:
    """Rows, free list and cursors must agree; fills the cells."""
    num_slots = len(table.keys_S)
    scores_S = table.records_S["score"]
    _check("score", not np.isinf(scores_S).any(), "finite scores expected, NaN in free slots")
    held_S = ~np.isnan(scores_S)
    num_held = int(table.cursors[NUM_ROWS_HELD])
    _check(
        "cursors",
        num_held == int(held_S.sum()),
        f"{num_held} rows by the cursor, {int(held_S.sum())} by their scores",
    )
    hands = table.cursors[[VICTIM_HAND, EXPIRY_HAND]]
    _check(
        "cursors", bool(((hands >= 0) & (hands < num_slots)).all()), f"a hand is outside: {hands.tolist()}"
    )
    free_head = int(table.cursors[FREE_HEAD])
    _check("cursors", -1 <= free_head < num_slots, f"the free list begins at {free_head}")
    num_free = int(_length_of_free_list(table.keys_S, held_S, free_head))
    _check(
        "keys",
        num_free == num_slots - num_held,
        f"the list of free slots is broken: {num_slots - num_held} slots expected in it",
    )
    slots = np.flatnonzero(held_S).astype(np.int64)
    repeated = int(fill_cells(table.cells_C2, table.keys_S[slots], slots))
    _check("keys", repeated < 0, f"slot {slots[repeated] if repeated >= 0 else ''} repeats another's key")


@kernel
def _length_of_free_list(keys_S: Any, held_S: Any, head: Any) -> Any:
    """-1 if it leaves the slots, meets a row, or runs in a circle."""
    length = 0
    slot = head
    while slot != -1:
        if slot < 0 or slot >= len(keys_S) or held_S[slot] or length == len(keys_S):
            return -1
        length += 1
        slot = keys_S[slot]
    return length


def _check(name: str, holds: bool, found: str) -> None:
    if not holds:
        raise StateError(
            f"id table state: array '{name}': {found}. The state is damaged or belongs to another policy; "
            f"load an older checkpoint, or restore its rows with insert_rows()."
        )
