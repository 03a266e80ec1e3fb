"""How a row leaves, whatever the reason: out of the index, its slot free, counted and remembered."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from feature_eviction.jit import inlined, kernel
from feature_eviction.keys import Int64Array, class_of_key
from feature_eviction.layout import FREE_HEAD, NUM_REMEMBERED, NUM_ROWS_HELD
from feature_eviction.row_cells import remove_row


class Step(NamedTuple):
    """What one map call knows besides the table: numbers only."""

    now_s: int
    score: Any
    """ShippedScore, or the tag of a user's score."""
    window_cells: int
    """Cells examined for one victim."""
    expiry_scan: int
    room_scan: int
    """Due rows examined before a row leaves for its score."""
    tick_s: int
    count_window_s: int


class Changes(NamedTuple):
    """What the call changes; counts = (number of new, number of evicted), and room to choose victims in."""

    new_keys_M: Int64Array
    new_slots_M: Int64Array
    evicted_keys_K: Int64Array
    evicted_slots_K: Int64Array
    counts: Int64Array
    victim_slots_V: Int64Array
    victim_cells_V: Int64Array
    victim_worths_V: Any
    quota_failed_R: Any
    """Rules whose classes have no row that may make room for another of theirs in this call."""


NUM_NEW, NUM_EVICTED = range(2)

_ONE = np.uint8(1)


@inlined
def rule_of_key(rules: Any, key: Any) -> Any:
    """The row of the rule columns that a key's class follows."""
    return np.int64(rules.rule_of_class[class_of_key(key)])


@inlined
def is_in_flight(in_flight_B: Any, slot: Any) -> Any:
    """Whether a batch that is not released uses the slot."""
    return (in_flight_B[slot >> 3] >> np.uint8(slot & 7)) & _ONE != 0


@inlined
def set_in_flight(in_flight_B: Any, slot: Any) -> None:
    """Until the batch is released."""
    in_flight_B[slot >> 3] |= _ONE << np.uint8(slot & 7)


@kernel
def set_all_in_flight(in_flight_B: Any, slots_N: Any, flying: Any) -> None:
    """Mark or unmark slots; -1 is skipped."""
    for i in range(len(slots_N)):
        slot = slots_N[i]
        if slot >= 0:
            bit = np.uint8(_ONE << np.uint8(slot & 7))
            if flying:
                in_flight_B[slot >> 3] |= bit
            else:
                in_flight_B[slot >> 3] &= ~bit


@inlined
def unlink(links_S2: Any, buckets_W: Any, slot: Any) -> None:
    """Take a slot out of its wheel bucket, if it is in one."""
    before, after = links_S2[slot, 0], links_S2[slot, 1]
    if before == -1:
        return
    if before >= 0:
        links_S2[before, 1] = after
    else:
        buckets_W[-2 - before] = after
    if after >= 0:
        links_S2[after, 0] = before
    links_S2[slot, 0] = -1
    links_S2[slot, 1] = -1


@inlined
def evict(table: Any, cell: Any, reason: Any, now_s: Any, changes: Any) -> None:
    """Take the row in a cell out of the index and put its slot at the head of the free list."""
    row = table.cells_C[cell]
    key, slot = row.key, np.int64(row.slot)
    rule = rule_of_key(table.rules, key)
    table.counters_RK[rule, reason] += 1
    table.rows_R[rule] -= 1
    num_evicted = changes.counts[NUM_EVICTED]
    changes.evicted_keys_K[num_evicted] = key
    changes.evicted_slots_K[num_evicted] = slot
    changes.counts[NUM_EVICTED] = num_evicted + 1
    if len(table.recent_E) > 0:
        memory = table.recent_E[table.cursors[NUM_REMEMBERED] % len(table.recent_E)]
        memory.key = key
        memory.when_s = now_s
        memory.score = row.score
        memory.reason = reason
    table.cursors[NUM_REMEMBERED] += 1
    if len(table.links_S2) > 0:
        unlink(table.links_S2, table.buckets_W, slot)
    table.homes_S[slot] = -2 - table.cursors[FREE_HEAD]
    table.cursors[FREE_HEAD] = slot
    table.cursors[NUM_ROWS_HELD] -= 1
    remove_row(table.cells_C, cell)
