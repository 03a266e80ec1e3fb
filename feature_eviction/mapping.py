"""From key to slot: score the rows that are held, then admit what is not. Kernels over one table.

All rows held are touched before the first id is admitted, so that no id of a call can push out another's row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from feature_eviction.cells import PREFETCH_BLOCK, find_cell, find_from, home_cell
from feature_eviction.count_sketch import sketch_add
from feature_eviction.eviction import NUM_NEW, evict_expired, make_room, rule_of_key
from feature_eviction.jit import kernel, prefetch
from feature_eviction.keys import Int64Array, mix64
from feature_eviction.layout import (
    ADMITTED,
    COUNT,
    FREE_HEAD,
    NUM_ROWS_HELD,
    PROBABILITY,
    REFUSED_COUNT,
    REFUSED_NO_VICTIM,
    REFUSED_PROBABILITY,
)
from feature_eviction.score import KRAKEN, LFU, SCORE_EPOCH_S, gain, kraken_score

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


@kernel
def derived_score(kind: Any, last_seen_s: Any, updates: Any) -> Any:
    """The score column of lru and lfu, which compare by last_seen_s and updates themselves."""
    if kind == LFU:
        return np.float32(updates)
    return np.float32(np.int64(last_seen_s) - SCORE_EPOCH_S)


@kernel
def touch(table: Any, step: Any, slot: Any, shows: Any, positives: Any) -> None:
    """Add one sighting to a row and put it into this batch."""
    record = table.records_S[slot]
    # Event time may run back a little: the last use stays the latest one.
    record.last_seen_s = max(np.int64(record.last_seen_s), step.now_s)
    record.updates = min(np.int64(record.updates) + shows, UPDATES_MAX)
    record.last_batch = step.batch
    if step.score_kind == KRAKEN:
        log_gain = gain(shows, positives, step.positive_weight)
        record.score = kraken_score(record.score, log_gain, step.aging)
    else:
        record.score = derived_score(step.score_kind, record.last_seen_s, record.updates)


@kernel
def touch_held(table: Any, step: Any, sightings: Any) -> Any:
    """Touch every row that is held; the number of sightings without one (slot -1)."""
    keys_N, slots_N = sightings.keys_N, sightings.slots_N
    num_keys = len(keys_N)
    homes_B = np.empty(PREFETCH_BLOCK, np.int64)
    num_missing = 0
    for start in range(0, num_keys, PREFETCH_BLOCK):
        stop = min(start + PREFETCH_BLOCK, num_keys)
        for i in range(start, stop):
            home = home_cell(table.cells_C2, keys_N[i])
            homes_B[i - start] = home
            prefetch(table.cells_C2, home)
        for i in range(start, stop):
            slot = table.cells_C2[find_from(table.cells_C2, homes_B[i - start], keys_N[i]), 1]
            slots_N[i] = slot
            if slot >= 0:
                prefetch(table.records_S, slot)
        for i in range(start, stop):
            if slots_N[i] >= 0:
                touch(table, step, slots_N[i], sightings.shows_N[i], sightings.positives_N[i])
            else:
                num_missing += 1
    return num_missing


@kernel
def draw(random_1: Any) -> Any:
    """Uniform in [0, 1); SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)."""
    random_1[0] += _RANDOM_STEP
    return np.float64(mix64(random_1[0]) >> _RANDOM_SHIFT) * _RANDOM_UNIT


@kernel
def refusal(table: Any, rule: Any, key: Any, shows: Any) -> Any:
    """The counter of the reason why an unseen key may not enter; -1 = it may."""
    admission = table.rules.admission_R[rule]
    if admission == PROBABILITY:
        stays_out = (1.0 - table.rules.probability_R[rule]) ** shows
        if draw(table.random_1) < stays_out:
            return REFUSED_PROBABILITY
    elif admission == COUNT:
        count = sketch_add(table.sketch_RW, table.sketch_additions_1, key, shows)
        if count < table.rules.min_count_R[rule]:
            return REFUSED_COUNT
    return -1


@kernel
def insert(table: Any, cell: Any, key: Any) -> Any:
    """Give a key the first free slot; its record is empty, in no batch."""
    slot = table.cursors[FREE_HEAD]
    table.cursors[FREE_HEAD] = table.keys_S[slot]
    table.cursors[NUM_ROWS_HELD] += 1
    table.cells_C2[cell, 0] = key
    table.cells_C2[cell, 1] = slot
    table.keys_S[slot] = key
    record = table.records_S[slot]
    record.score = -np.inf
    record.last_seen_s = 0
    record.updates = 0
    return slot


@kernel
def admit_missing(table: Any, step: Any, sightings: Any, changes: Any) -> None:
    """Admit in the order of the call; slots_N stays -1 for what is refused."""
    keys_N, slots_N = sightings.keys_N, sightings.slots_N
    num_refused = 0
    may_evict = True
    for i in range(len(keys_N)):
        if slots_N[i] >= 0:
            continue
        key, shows = keys_N[i], sightings.shows_N[i]
        slot = table.cells_C2[find_cell(table.cells_C2, key), 1]
        if slot < 0:
            rule = rule_of_key(table.rules, key)
            reason = refusal(table, rule, key, shows)
            if reason < 0 and table.cursors[FREE_HEAD] < 0:
                # A row that may not leave now may not leave later in this call either.
                may_evict = may_evict and make_room(table, step, changes)
                if not may_evict:
                    reason = REFUSED_NO_VICTIM
            if reason >= 0:
                table.counters_RK[rule, reason] += 1
                num_refused += 1
                continue
            # Sought again: the eviction may have moved the cell that the key shall have.
            slot = insert(table, find_cell(table.cells_C2, key), key)
            table.counters_RK[rule, ADMITTED] += 1
            changes.new_keys_M[changes.counts[NUM_NEW]] = key
            changes.new_slots_M[changes.counts[NUM_NEW]] = slot
            changes.counts[NUM_NEW] += 1
        touch(table, step, slot, shows, sightings.positives_N[i])
        slots_N[i] = slot
    if num_refused > 0 and changes.counts[NUM_NEW] > 0:
        # A key refused at first and admitted later in the call has one slot at all its places.
        for i in range(len(keys_N)):
            if slots_N[i] < 0:
                slots_N[i] = table.cells_C2[find_cell(table.cells_C2, keys_N[i]), 1]


@kernel
def expire_and_admit(table: Any, step: Any, sightings: Any, changes: Any) -> None:
    """The second half of a map call, after touch_held."""
    evict_expired(table, step, changes)
    admit_missing(table, step, sightings, changes)


@kernel
def insert_records(table: Any, keys_N: Any, records_N: Any, slots_N: Any) -> None:
    """Insert absent keys with ready records, as far as there are free slots."""
    for i in range(len(keys_N)):
        slot = insert(table, find_cell(table.cells_C2, keys_N[i]), keys_N[i])
        record = table.records_S[slot]
        record.score = records_N[i].score
        record.last_seen_s = records_N[i].last_seen_s
        record.updates = records_N[i].updates
        record.last_batch = records_N[i].last_batch
        slots_N[i] = slot
