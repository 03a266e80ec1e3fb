"""An IdTable as flat arrays and back: what is saved, and what is checked before it is believed.

Rows are columns [N] in the order of their cells, with the cell of each: a pass for victims reads cells, so
that only a table with each row in its old cell goes on as if it had never been saved. The wheel is saved with
the lifetimes that it was turned under: rows of classes that have another one now are put elsewhere in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction.count_sketch import ADDITIONS, HALVINGS
from feature_eviction.errors import StateError
from feature_eviction.expiry import reschedule
from feature_eviction.expiry_check import first_misplaced_slot
from feature_eviction.jit import kernel
from feature_eviction.keys import Int64Array, class_of
from feature_eviction.layout import (
    EXPIRY_TICK,
    FREE_HEAD,
    NUM_ROWS_HELD,
    ROW_LIMIT,
    VICTIM_HAND,
    Table,
    empty_table,
    wheel_for,
    wheel_of,
)
from feature_eviction.leaving import set_all_in_flight
from feature_eviction.policy import TablePolicy
from feature_eviction.restoring import home_cells
from feature_eviction.row_cells import lookup_rows

State = dict[str, npt.NDArray[Any]]

_ROW_COLUMNS = ("key", "slot", "score", "last_seen_s", "updates")
_WHOLE_ARRAYS = {
    "counters": "counters_RK",
    "cursors": "cursors",
    "random": "random_1",
    "recent": "recent_E",
    "sketch": "sketch_RW",
    "sketch_clock": "sketch_clock_3",
    "sketch_halved": "sketch_halved_RB",
    "wheel_links": "links_S2",
    "wheel_buckets": "buckets_W",
}
_OF_ANY_LENGTH = (*_ROW_COLUMNS, "cell", "free_slots", "in_flight", "score_kind")

InFlight = dict[int, Int64Array]
"""The slots of each batch that is not released."""


def state_of(
    table: Table, policy: TablePolicy, *, score_name: str, batches: tuple[int, int], in_flight: InFlight
) -> State:
    """Copies: integers, float32, and the score's name as bytes. batches: newest, newest released."""
    cells = np.flatnonzero(table.cells_C["slot"] >= 0)
    state: State = {name: table.cells_C[name][cells] for name in _ROW_COLUMNS}
    state["cell"] = cells.astype(np.int64)
    state["free_slots"] = _free_list(table)
    for name, field in _WHOLE_ARRAYS.items():
        array = getattr(table, field)
        state[name] = array.view(np.uint8).copy() if name == "recent" else array.copy()
    batch_of = [np.full(len(slots_N), batch, np.int64) for batch, slots_N in in_flight.items()]
    columns = (batch_of, list(in_flight.values()))
    state["in_flight"] = np.stack([np.concatenate([np.empty(0, np.int64), *one]) for one in columns], axis=1)
    state["batches"] = np.array(batches, np.int64)
    state["classes"] = np.array([one.class_id for one in policy.classes], np.int64)
    state["lifetimes"] = table.rules.ttl_s_R.copy()
    state["score_kind"] = np.frombuffer(score_name.encode(), np.uint8).copy()
    return state


def restored_table(
    policy: TablePolicy, state: State, *, score_name: str
) -> tuple[Table, tuple[int, int], InFlight]:
    """The table, its newest and newest released batch, and what is in flight.

    Raises: StateError naming an array.
    """
    table = empty_table(policy)
    expected = state_of(table, policy, score_name=score_name, batches=(0, 0), in_flight={})
    _check_shapes(state, expected)
    for name in ("classes", "score_kind"):
        same = np.array_equal(state[name], expected[name])
        _check(name, same, f"{_said(name, expected[name])} by the policy, found {_said(name, state[name])}")
    batch, released = (int(number) for number in state["batches"])
    _check("batches", 0 <= released <= batch, f"0 <= released <= newest expected, found {released}, {batch}")
    _check("counters", bool((state["counters"] >= 0).all()), "a count is negative")
    _check_sketch(policy, state)
    _restore_rows(table, state)
    for name, field in _WHOLE_ARRAYS.items():
        array = getattr(table, field)
        array[...] = state[name].view(array.dtype)
    _check_cursors(table, state)
    _restore_wheel(table, policy, state["lifetimes"])
    return table, (batch, released), _in_flight(table, state["in_flight"], batch=batch, released=released)


def _said(name: str, array: npt.NDArray[Any]) -> str:
    return array.tobytes().decode(errors="replace") if name == "score_kind" else str(array.tolist())


def _check_shapes(state: State, expected: State) -> None:
    if state.keys() != expected.keys():
        differing = sorted(state.keys() ^ expected.keys())
        raise StateError(f"id table state: arrays {sorted(expected)} expected, differing in {differing}")
    num_rows = len(state["key"])
    for name, like in expected.items():
        found = state[name]
        shape: tuple[int, ...] = like.shape
        if name in _OF_ANY_LENGTH:
            num = num_rows if name in (*_ROW_COLUMNS, "cell") else found.shape[0] if found.ndim else 0
            shape = (num, *like.shape[1:])
        _check(
            name,
            found.dtype == like.dtype and found.shape == shape,
            f"{like.dtype} {list(shape)} expected, found {found.dtype} {list(found.shape)}",
        )


def _check_sketch(policy: TablePolicy, state: State) -> None:
    clock_3, halved_RB = state["sketch_clock"], state["sketch_halved"]
    additions, halvings = int(clock_3[ADDITIONS]), int(clock_3[HALVINGS])
    limit = max(1, policy.sketch_width_used)
    _check("sketch_clock", 0 <= additions < limit, f"0..{limit - 1} additions expected, found {additions}")
    _check("sketch_clock", bool((clock_3 >= 0).all()), "a count is negative")
    within = bool(((halved_RB >= 0) & (halved_RB <= halvings)).all())
    _check("sketch_halved", within, f"0..{halvings} halvings expected")


def _restore_rows(table: Table, state: State) -> None:
    """Cells, homes and the free list; the key of each row must be found where it lies."""
    num_slots, num_cells = len(table.homes_S), len(table.cells_C)
    cells_N, slots_N, keys_N = state["cell"], state["slot"].astype(np.int64), state["key"]
    in_range = bool(((cells_N >= 0) & (cells_N < num_cells)).all()) and bool((np.diff(cells_N) > 0).all())
    _check("cell", in_range, f"ascending cells of 0..{num_cells - 1} expected")
    all_slots = np.concatenate([slots_N, state["free_slots"]])
    complete = len(all_slots) == num_slots and np.array_equal(np.sort(all_slots), np.arange(num_slots))
    _check("slot", complete, f"held and free slots together must be each of 0..{num_slots - 1} once")
    _check("score", bool(np.isfinite(state["score"]).all()), "finite scores expected")
    for name in _ROW_COLUMNS:
        table.cells_C[name][cells_N] = state[name]
    found_N = np.empty(len(keys_N), np.int64)
    lookup_rows(table.cells_C, keys_N, found_N)
    lost = np.flatnonzero(found_N != slots_N)
    _check("key", not len(lost), f"key {keys_N[lost[:1]].tolist()} is not found by its own probe, or twice")
    homes_N = np.empty(len(keys_N), np.int64)
    home_cells(table.cells_C, keys_N, homes_N)
    table.homes_S[slots_N] = homes_N
    following = np.append(state["free_slots"][1:], -1)
    table.homes_S[state["free_slots"]] = -2 - following[: len(state["free_slots"])]
    rules_N = table.rules.rule_of_class[class_of(keys_N)]
    table.rows_R[:] = np.bincount(rules_N, minlength=len(table.rows_R))


def _check_cursors(table: Table, state: State) -> None:
    cursors, free_slots = table.cursors, state["free_slots"]
    num_held = len(state["key"])
    free_head = int(free_slots[0]) if len(free_slots) else -1
    bounds = {
        NUM_ROWS_HELD: (num_held, num_held),
        FREE_HEAD: (free_head, free_head),
        VICTIM_HAND: (0, len(table.cells_C) - 1),
        ROW_LIMIT: (1, len(table.homes_S)),
        # Event times are below 2^32.
        EXPIRY_TICK: (0, 1 << 32),
    }
    for cursor, (lowest, highest) in bounds.items():
        found = int(cursors[cursor])
        fits = lowest <= found <= highest
        _check("cursors", fits, f"cursor {cursor}: {lowest}..{highest} expected, found {found}")
    _check("cursors", bool((cursors[cursors != free_head] >= 0).all()), "a cursor is negative")


def _restore_wheel(table: Table, policy: TablePolicy, saved_ttl_s_R: Int64Array) -> None:
    """Check the wheel by the lifetimes that it was saved under, then move what has another one now."""
    sound = bool(((saved_ttl_s_R == -1) | (saved_ttl_s_R >= 1)).all())
    saved_tick_s, num_buckets = wheel_for(saved_ttl_s_R[saved_ttl_s_R >= 1].tolist())
    sound = sound and num_buckets == len(table.buckets_W)
    expected = f"lifetimes of a wheel of {len(table.buckets_W)} buckets"
    _check("lifetimes", sound, f"{expected} expected, found {saved_ttl_s_R.tolist()}")
    if not num_buckets:
        return
    _check_wheel(table._replace(rules=table.rules._replace(ttl_s_R=saved_ttl_s_R)))
    changed_R = saved_ttl_s_R != table.rules.ttl_s_R
    tick_s, _ = wheel_of(policy)
    if tick_s != saved_tick_s:
        changed_R[:] = True
        table.cursors[EXPIRY_TICK] = int(table.cursors[EXPIRY_TICK]) * saved_tick_s // tick_s
    if changed_R.any():
        reschedule(table, changed_R, tick_s)


def _check_wheel(table: Table) -> None:
    num_slots = len(table.links_S2)
    low, high = -2 - len(table.buckets_W), num_slots
    within = bool(((table.links_S2 > low) & (table.links_S2 < high)).all())
    _check("wheel_links", within, f"links of {low + 1}..{high - 1} expected")
    within = bool(((table.buckets_W >= -1) & (table.buckets_W < high)).all())
    _check("wheel_buckets", within, f"slots of -1..{high - 1} expected")
    misplaced = int(first_misplaced_slot(table))
    _check("wheel_links", misplaced < 0, f"slot {misplaced} is not where the wheel must have it")


def _in_flight(table: Table, columns_N2: Int64Array, *, batch: int, released: int) -> InFlight:
    batches_N, slots_N = columns_N2[:, 0], columns_N2[:, 1]
    within = bool(((slots_N >= -1) & (slots_N < len(table.homes_S))).all())
    within = within and bool(((batches_N > released) & (batches_N <= batch)).all())
    _check("in_flight", within, f"slots of unreleased batches {released + 1}..{batch} expected")
    in_flight = {int(one): slots_N[batches_N == one].copy() for one in np.unique(batches_N)}
    set_all_in_flight(table.in_flight_B, np.ascontiguousarray(slots_N), True)
    return in_flight


@kernel
def _list_free(homes_S: Any, head: Any, slots_F: Any) -> Any:
    length = 0
    slot = head
    while slot != -1:
        slots_F[length] = slot
        length += 1
        slot = -2 - np.int64(homes_S[slot])
    return length


def _free_list(table: Table) -> Int64Array:
    """The free slots in the order in which they will be taken."""
    num_free = len(table.homes_S) - int(table.cursors[NUM_ROWS_HELD])
    slots_F = np.empty(num_free, np.int64)
    _list_free(table.homes_S, table.cursors[FREE_HEAD], slots_F)
    return slots_F


def _check(name: str, holds: bool, found: str) -> None:
    if not holds:
        raise StateError(
            f"id table state: array '{name}': {found}. The state is damaged or belongs to another policy; "
            f"load an older checkpoint, or restore its rows with insert_rows()."
        )
