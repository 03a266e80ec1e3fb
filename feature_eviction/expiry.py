"""When a row's lifetime ends: a timing wheel over slots that forgives being late to hear of sightings.

Each row of a class with a lifetime stands in the bucket of the tick in which it would expire as of the moment
it was put there. Sightings move nothing. When a bucket comes due, a row in it that was seen since goes to the
bucket of its new end, one that was not leaves. Each row is thus looked at once a lifetime at most for having
been seen, and no expired row is looked for among those that are not.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from feature_eviction.jit import inlined, kernel
from feature_eviction.layout import EXPIRED, EXPIRY_TICK, FEW_UPDATES
from feature_eviction.leaving import NUM_EVICTED, evict, is_in_flight, rule_of_key, unlink
from feature_eviction.row_cells import find_slot


@inlined
def schedule(table: Any, slot: Any, tick: Any) -> None:
    """Put a slot, in no bucket, into that of a tick; a tick done already counts as the next one."""
    num_buckets = len(table.buckets_W)
    next_tick = table.cursors[EXPIRY_TICK]
    bucket = min(max(tick, next_tick), next_tick + num_buckets - 2) % num_buckets
    first = table.buckets_W[bucket]
    table.links_S2[slot, 0] = -2 - bucket
    table.links_S2[slot, 1] = first
    if first >= 0:
        table.links_S2[first, 0] = slot
    table.buckets_W[bucket] = slot


@inlined
def schedule_row(table: Any, cell: Any, rule: Any, tick_s: Any) -> None:
    """Put a row that is in no bucket where its lifetime ends; nothing for a class that never expires."""
    ttl_s = table.rules.ttl_s_R[rule]
    if ttl_s >= 0:
        last_tick = (np.int64(table.cells_C[cell].last_seen_s) + ttl_s) // tick_s
        schedule(table, table.cells_C[cell].slot, last_tick + 1)


@kernel
def reschedule(table: Any, changed_R: Any, tick_s: Any) -> None:
    """Put the rows of these rules where their lifetimes end now, out of where they stood before."""
    for cell in range(len(table.cells_C)):
        row = table.cells_C[cell]
        if row.slot >= 0:
            rule = rule_of_key(table.rules, row.key)
            if changed_R[rule]:
                unlink(table.links_S2, table.buckets_W, row.slot)
                schedule_row(table, cell, rule, tick_s)


@kernel
def _settle(table: Any, step: Any, slot: Any, changes: Any) -> None:
    """Evict a due row or put it where its lifetime ends now; one in flight is looked at a tick later."""
    cell = find_slot(table.cells_C, table.homes_S[slot], slot)
    row = table.cells_C[cell]
    rule = rule_of_key(table.rules, row.key)
    expired = step.now_s - np.int64(row.last_seen_s) > table.rules.ttl_s_R[rule]
    too_few = np.int64(row.updates) < table.rules.min_updates_R[rule]
    if not expired and not too_few:
        unlink(table.links_S2, table.buckets_W, slot)
        schedule_row(table, cell, rule, step.tick_s)
    elif is_in_flight(table.in_flight_B, slot):
        unlink(table.links_S2, table.buckets_W, slot)
        schedule(table, slot, step.now_s // step.tick_s + 1)
    else:
        evict(table, cell, EXPIRED if expired else FEW_UPDATES, step.now_s, changes)


@kernel
def expire_due(table: Any, step: Any, budget: Any, evicted_max: Any, changes: Any) -> Any:
    """Look at up to `budget` due rows, evicting up to `evicted_max`; how many left."""
    num_buckets = len(table.buckets_W)
    if num_buckets == 0:
        return 0
    now_tick = step.now_s // step.tick_s
    hand = table.cursors[EXPIRY_TICK]
    if now_tick - hand > num_buckets or hand - now_tick > num_buckets:
        # A leap of event time over more than a turn: one turn meets every row.
        hand = max(0, now_tick - num_buckets)
    before = changes.counts[NUM_EVICTED]
    while hand <= now_tick and budget > 0 and changes.counts[NUM_EVICTED] - before < evicted_max:
        # What is put back while a bucket is emptied goes to later ones.
        table.cursors[EXPIRY_TICK] = hand + 1
        slot = table.buckets_W[hand % num_buckets]
        if slot < 0:
            hand += 1
        else:
            _settle(table, step, slot, changes)
            budget -= 1
    table.cursors[EXPIRY_TICK] = hand
    return changes.counts[NUM_EVICTED] - before
