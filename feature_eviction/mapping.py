"""From key to slot: expire what is due, score the rows that are held, then admit what is not. Kernels over
one table.

All rows held are touched before the first id is admitted, so that no id of a call can push out another's row.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from feature_eviction.cells import PREFETCH_BLOCK, home_cell
from feature_eviction.count_sketch import sketch_add
from feature_eviction.eviction import make_room, make_room_in_class, shrink, shrink_classes
from feature_eviction.expiry import expire_due, schedule_row
from feature_eviction.jit import borrowed, inlined, kernel, prefetch
from feature_eviction.keys import Int64Array, mix64
from feature_eviction.layout import (
    ADMITTED,
    BAD_SCORES,
    COUNT,
    DELETED,
    FREE_HEAD,
    NUM_ROWS_HELD,
    PROBABILITY,
    REFUSED_COUNT,
    REFUSED_NO_VICTIM,
    REFUSED_PROBABILITY,
    REFUSED_QUOTA,
    ROW_LIMIT,
)
from feature_eviction.leaving import NUM_EVICTED, NUM_NEW, evict, is_in_flight, rule_of_key, set_in_flight
from feature_eviction.row_cells import find_row, find_row_from
from feature_eviction.user_score import apply_score

UPDATES_MAX = 2**32 - 1

_RANDOM_STEP = np.uint64(0x9E3779B97F4A7C15)
_RANDOM_SHIFT = np.uint64(11)
_RANDOM_UNIT = 2.0**-53


class Sightings(NamedTuple):
    """One call's columns; slots_N is filled."""

    keys_N: Int64Array
    shows_N: Int64Array
    positives_N: Int64Array
    slots_N: Int64Array


@kernel
def first_bad_sighting(shows_N: Any, positives_N: Any) -> Any:
    """The first position without 1 <= shows and 0 <= positives <= shows; else -1."""
    for i in range(len(shows_N)):
        if shows_N[i] < 1 or positives_N[i] < 0 or positives_N[i] > shows_N[i]:
            return i
    return -1


@inlined
def touch(cells_C: Any, cell: Any, step: Any, shows: Any, positives: Any) -> Any:
    """Add one sighting to a row; whether its score was a finite float32.

    Hot functions take single arrays: a whole Table is some 20 reference counts at each call.
    """
    row = cells_C[cell]
    last_seen_s = np.int64(row.last_seen_s)
    updates = min(np.int64(row.updates) + shows, UPDATES_MAX)
    age_s = max(0, step.now_s - last_seen_s)
    value = np.float32(apply_score(step.score, np.float64(row.score), shows, positives, age_s, updates))
    # Event time may run back a little: the last use stays the latest one.
    row.last_seen_s = max(last_seen_s, step.now_s)
    row.updates = updates
    if not math.isfinite(value):
        return False
    row.score = value
    return True


@kernel
def touch_held(table: Any, step: Any, sightings: Any) -> Any:
    """Touch every row that is held; the number of sightings without one (slot -1)."""
    keys_N, slots_N = sightings.keys_N, sightings.slots_N
    shows_N, positives_N = sightings.shows_N, sightings.positives_N
    cells_C, in_flight_B = table.cells_C, table.in_flight_B
    num_keys = len(keys_N)
    homes_B = np.empty(PREFETCH_BLOCK, np.int64)
    num_missing, num_bad = 0, 0
    for start in range(0, num_keys, PREFETCH_BLOCK):
        stop = min(start + PREFETCH_BLOCK, num_keys)
        for i in range(start, stop):
            home = home_cell(cells_C, keys_N[i])
            homes_B[i - start] = home
            prefetch(cells_C, home)
        for i in range(start, stop):
            cell = find_row_from(cells_C, homes_B[i - start], keys_N[i])
            slot = np.int64(cells_C[cell].slot)
            slots_N[i] = slot
            if slot < 0:
                num_missing += 1
            else:
                in_flight_B[slot >> 3] |= np.uint8(1 << (slot & 7))
                if not touch(cells_C, cell, step, shows_N[i], positives_N[i]):
                    num_bad += 1
    table.cursors[BAD_SCORES] += num_bad
    return num_missing


@inlined
def draw(random_1: Any) -> Any:
    """Uniform in [0, 1); SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    random_1[0] += _RANDOM_STEP
    return np.float64(mix64(random_1[0]) >> _RANDOM_SHIFT) * _RANDOM_UNIT


@inlined
def refusal(table: Any, step: Any, rule: Any, key: Any, shows: Any) -> Any:
    """The counter of the reason why an unseen key may not enter; -1 = it may."""
    admission = table.rules.admission_R[rule]
    if admission == PROBABILITY:
        stays_out = (1.0 - table.rules.probability_R[rule]) ** shows
        if draw(table.random_1) < stays_out:
            return REFUSED_PROBABILITY
    elif admission == COUNT:
        sketch = (table.sketch_RW, table.sketch_halved_RB, table.sketch_clock_3)
        count = sketch_add(sketch, key, shows, step.now_s, step.count_window_s)
        if count < table.rules.min_count_R[rule]:
            return REFUSED_COUNT
    return -1


@inlined
def fill_cell(table: Any, cell: Any, home: Any, rule: Any, key: Any, now_s: Any) -> None:
    """Give an absent key the first free slot, in the cell that ends its probe. The row is of age 0, in no
    batch and no bucket."""
    slot = table.cursors[FREE_HEAD]
    table.cursors[FREE_HEAD] = -2 - np.int64(table.homes_S[slot])
    table.cursors[NUM_ROWS_HELD] += 1
    table.rows_R[rule] += 1
    table.homes_S[slot] = home
    row = table.cells_C[cell]
    row.key = key
    row.slot = slot
    row.score = 0.0
    row.last_seen_s = now_s
    row.updates = 0


@inlined
def find_room(table: Any, step: Any, rule: Any, may_evict: Any, changes: Any) -> Any:
    """Free a slot that the class may take; the counter of the reason why there is none, else -1."""
    quota = table.rules.max_rows_R[rule]
    if quota >= 0 and table.rows_R[rule] >= quota:
        # What may not leave now may not leave later in this call either.
        if changes.quota_failed_R[rule] or not make_room_in_class(table, step, rule, changes):
            changes.quota_failed_R[rule] = True
            return REFUSED_QUOTA
        return -1
    if table.cursors[NUM_ROWS_HELD] >= table.cursors[ROW_LIMIT] and (
        not may_evict or not make_room(table, step, changes)
    ):
        return REFUSED_NO_VICTIM
    return -1


@kernel
def admit_missing(table: Any, step: Any, sightings: Any, changes: Any) -> None:
    """Admit in the order of the call, by blocks; slots_N stays -1 for what is refused."""
    keys_N, slots_N = sightings.keys_N, sightings.slots_N
    shows_N, positives_N = sightings.shows_N, sightings.positives_N
    cells_C, counters_RK, rules = table.cells_C, table.counters_RK, table.rules
    places_B, homes_B = np.empty(PREFETCH_BLOCK, np.int64), np.empty(PREFETCH_BLOCK, np.int64)
    num_keys, num_refused, num_bad, num_new = len(keys_N), 0, 0, 0
    may_evict = True
    start = 0
    while start < num_keys:
        num_missing = 0
        while start < num_keys and num_missing < PREFETCH_BLOCK:
            if slots_N[start] < 0:
                places_B[num_missing] = start
                homes_B[num_missing] = home_cell(cells_C, keys_N[start])
                prefetch(cells_C, homes_B[num_missing])
                num_missing += 1
            start += 1
        for j in range(num_missing):
            i, home = places_B[j], homes_B[j]
            key, shows = keys_N[i], shows_N[i]
            cell = find_row_from(cells_C, home, key)
            is_new = cells_C[cell].slot < 0
            rule = rule_of_key(rules, key)
            if is_new:
                reason = refusal(table, step, rule, key, shows)
                if reason < 0:
                    num_evicted = changes.counts[NUM_EVICTED]
                    reason = find_room(table, step, rule, may_evict, changes)
                    may_evict = may_evict and reason != REFUSED_NO_VICTIM
                    if changes.counts[NUM_EVICTED] != num_evicted:
                        # Rows moved up may have taken the cell, or freed one before it.
                        cell = find_row_from(cells_C, home, key)
                if reason >= 0:
                    counters_RK[rule, reason] += 1
                    num_refused += 1
                    continue
                fill_cell(table, cell, home, rule, key, step.now_s)
                counters_RK[rule, ADMITTED] += 1
                changes.new_keys_M[num_new] = key
                changes.new_slots_M[num_new] = cells_C[cell].slot
                num_new += 1
            if not touch(cells_C, cell, step, shows, positives_N[i]):
                num_bad += 1
            slot = np.int64(cells_C[cell].slot)
            set_in_flight(table.in_flight_B, slot)
            if is_new and len(table.buckets_W) > 0:
                schedule_row(table, cell, rule, step.tick_s)
            slots_N[i] = slot
    changes.counts[NUM_NEW] = num_new
    table.cursors[BAD_SCORES] += num_bad
    if num_refused > 0 and num_new > 0:
        # A key refused at first and admitted later in the call has one slot at all its places.
        for i in range(num_keys):
            if slots_N[i] < 0:
                slots_N[i] = cells_C[find_row(cells_C, keys_N[i])].slot


@kernel
def map_sightings(table: Any, step: Any, sightings: Any, changes: Any) -> None:
    """One map call, in three steps."""
    table, step, sightings, changes = borrowed((table, step, sightings, changes))
    expire_due(table, step, step.expiry_scan, step.expiry_scan, changes)
    num_missing = touch_held(table, step, sightings)
    shrink_classes(table, step, changes)
    shrink(table, step, changes)
    if num_missing > 0:
        admit_missing(table, step, sightings, changes)


@kernel
def delete_rows(table: Any, step: Any, keys_N: Any, slots_N: Any, changes: Any) -> None:
    """Evict the rows of keys; slots_N: the slots that became free, -1 where absent or in flight."""
    table, changes = borrowed((table, changes))
    for i in range(len(keys_N)):
        cell = find_row(table.cells_C, keys_N[i])
        slot = np.int64(table.cells_C[cell].slot)
        if slot >= 0 and is_in_flight(table.in_flight_B, slot):
            slot = np.int64(-1)
        if slot >= 0:
            evict(table, cell, DELETED, step.now_s, changes)
        slots_N[i] = slot


@kernel
def insert_columns(table: Any, keys_N: Any, columns: Any, tick_s: Any, slots_N: Any) -> None:
    """Insert absent keys with ready columns, as far as there are free slots; by blocks as map does."""
    table, columns = borrowed((table, columns))
    cells_C = table.cells_C
    num_keys = len(keys_N)
    homes_B = np.empty(PREFETCH_BLOCK, np.int64)
    for start in range(0, num_keys, PREFETCH_BLOCK):
        stop = min(start + PREFETCH_BLOCK, num_keys)
        for i in range(start, stop):
            homes_B[i - start] = home_cell(cells_C, keys_N[i])
            prefetch(cells_C, homes_B[i - start])
        for i in range(start, stop):
            home, rule = homes_B[i - start], rule_of_key(table.rules, keys_N[i])
            cell = find_row_from(cells_C, home, keys_N[i])
            fill_cell(table, cell, home, rule, keys_N[i], np.int64(0))
            row = cells_C[cell]
            row.score = columns.scores_N[i]
            row.last_seen_s = columns.last_seen_s_N[i]
            row.updates = columns.updates_N[i]
            if len(table.buckets_W) > 0:
                schedule_row(table, cell, rule, tick_s)
            slots_N[i] = row.slot
