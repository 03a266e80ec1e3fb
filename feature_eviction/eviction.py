"""Who leaves: expired rows first, then the lowest score; never a row in flight, never for its score a
protected one. Kernels over the arrays of one table.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from feature_eviction.cells import clear_cell, find_cell
from feature_eviction.jit import kernel
from feature_eviction.keys import Int64Array, class_of_key
from feature_eviction.layout import BY_SCORE, EXPIRED, EXPIRY_HAND, FREE_HEAD, NUM_ROWS_HELD, VICTIM_HAND
from feature_eviction.score import worth

_UINT32_MASK = 0xFFFFFFFF


class Step(NamedTuple):
    """What one map call knows besides the table: numbers only."""

    now_s: int
    batch: int
    """This call's number, modulo 2^32."""
    num_in_flight: int
    """Batches that are not released, this one included."""
    score_kind: int
    positive_weight: float
    aging: float
    victim_window: int
    expiry_scan: int
    shortest_ttl_s: int
    """Of all classes; a row seen more recently has surely not expired."""


class Changes(NamedTuple):
    """What the call changes; counts = (number of new, number of evicted)."""

    new_keys_M: Int64Array
    new_slots_M: Int64Array
    evicted_keys_K: Int64Array
    evicted_slots_K: Int64Array
    counts: Int64Array


NUM_NEW, NUM_EVICTED = range(2)


@kernel
def rule_of_key(rules: Any, key: Any) -> Any:
    """The row of the rule columns that a key's class follows."""
    return np.int64(rules.rule_of_class[class_of_key(key)])


@kernel
def in_flight(record: Any, step: Any) -> Any:
    """Counted modulo 2^32: a row untouched for just so many batches is spared once; nothing else."""
    age = (step.batch - np.int64(record.last_batch)) & _UINT32_MASK
    return age < step.num_in_flight


@kernel
def may_have_expired(record: Any, step: Any) -> Any:
    """Without a look at the row's class, which lies elsewhere in memory."""
    return step.now_s - np.int64(record.last_seen_s) > step.shortest_ttl_s


@kernel
def is_expired(rules: Any, rule: Any, last_seen_s: Any, now_s: Any) -> Any:
    """Unseen for longer than the class's lifetime; a row seen later than now_s is not."""
    ttl_s = rules.ttl_s_R[rule]
    return ttl_s >= 0 and now_s - np.int64(last_seen_s) > ttl_s


@kernel
def evict(table: Any, slot: Any, reason: Any, changes: Any) -> None:
    """Take the row out of the index and put its slot at the head of the free list."""
    key = table.keys_S[slot]
    clear_cell(table.cells_C2, find_cell(table.cells_C2, key))
    table.counters_RK[rule_of_key(table.rules, key), reason] += 1
    num_evicted = changes.counts[NUM_EVICTED]
    changes.evicted_keys_K[num_evicted] = key
    changes.evicted_slots_K[num_evicted] = slot
    changes.counts[NUM_EVICTED] = num_evicted + 1
    table.records_S[slot].score = np.nan
    table.keys_S[slot] = table.cursors[FREE_HEAD]
    table.cursors[FREE_HEAD] = slot
    table.cursors[NUM_ROWS_HELD] -= 1


@kernel
def evict_expired(table: Any, step: Any, changes: Any) -> None:
    """Move the expiry hand over `expiry_scan` slots."""
    num_slots = len(table.keys_S)
    slot = table.cursors[EXPIRY_HAND]
    for _ in range(min(step.expiry_scan, num_slots)):
        record = table.records_S[slot]
        if may_have_expired(record, step) and not math.isnan(record.score) and not in_flight(record, step):
            rule = rule_of_key(table.rules, table.keys_S[slot])
            if is_expired(table.rules, rule, record.last_seen_s, step.now_s):
                evict(table, slot, EXPIRED, changes)
        slot += 1
        if slot == num_slots:
            slot = 0
    table.cursors[EXPIRY_HAND] = slot


@kernel
def choose_victim(table: Any, step: Any) -> Any:
    """The slot to evict and whether it has expired; (-1, False) if none may leave.

    Examines one window from the victim hand, and further ones only while no row in them may leave. Rows
    are ordered by (expired first, worth, slot).
    """
    num_slots = len(table.keys_S)
    slot = table.cursors[VICTIM_HAND]
    best, best_expired, best_worth = -1, False, np.inf
    examined = 0
    while best < 0 and examined < num_slots:
        window = min(step.victim_window, num_slots - examined)
        examined += window
        for _ in range(window):
            record = table.records_S[slot]
            value = worth(step.score_kind, record.score, record.last_seen_s, record.updates)
            is_less = best < 0 or value < best_worth or (value == best_worth and slot < best)
            # Most rows are neither less worth nor possibly expired: their class is not looked up.
            if (
                (may_have_expired(record, step) or (is_less and not best_expired))
                and not math.isnan(record.score)
                and not in_flight(record, step)
            ):
                rule = rule_of_key(table.rules, table.keys_S[slot])
                expired = is_expired(table.rules, rule, record.last_seen_s, step.now_s)
                may_leave = expired or not table.rules.protected_R[rule]
                if may_leave and (is_less if expired == best_expired else expired):
                    best, best_expired, best_worth = slot, expired, value
            slot += 1
            if slot == num_slots:
                slot = 0
    table.cursors[VICTIM_HAND] = slot
    return best, best_expired


@kernel
def make_room(table: Any, step: Any, changes: Any) -> Any:
    """Evict one victim; False if no row may leave."""
    slot, expired = choose_victim(table, step)
    if slot < 0:
        return False
    evict(table, slot, EXPIRED if expired else BY_SCORE, changes)
    return True
