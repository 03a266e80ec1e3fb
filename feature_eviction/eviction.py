"""Who makes room: an expired row if one is due, else the lowest scores; never a row in flight, never for its
score a protected one. Kernels over the arrays of one table.

What is promised of the order: a pass reads `victim_window` slots' worth of cells a victim from where the last
one ended and evicts the lowest it met, by (worth now, slot). With a window of num_slots or more the order
is exact. Otherwise: keys lie in cells by hash, so the rows read are a sample of all, and of k victims out of
n rows one stands above the share q of all rows with the probability that fewer than k of n fall below q: for
the defaults, 16 of 1024, the highest at 1.6 % on average. That holds where passes have read evenly. Where
they came in bursts, one may meet a stretch whose lowest are gone already: in a table in use the highest
victim of a pass stood at 1.5 % on average, but above 5 % once in a hundred passes, and 7.4 % at worst
(benchmarks.id_table prints it).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from feature_eviction.expiry import expire_due
from feature_eviction.jit import inlined, kernel, prefetch
from feature_eviction.keys import class_of_key
from feature_eviction.layout import BY_QUOTA, BY_SCORE, NUM_ROWS_HELD, ROW_LIMIT, VICTIM_HAND
from feature_eviction.leaving import evict, is_in_flight
from feature_eviction.row_cells import find_slot
from feature_eviction.user_score import apply_score, floor_of_score

PASSES_MAX = 64
"""Passes without any row that may leave, before an id is refused: what one search costs at most."""
SHRINK_PASSES = 8
"""Passes that one call makes towards a lowered row limit, and as many towards lowered quotas."""
FLOOR_BLOCK = 64
"""Cells whose rows' worth is estimated before the first of them is looked at closely."""
ANY_RULE = -1


@inlined
def worth(score: Any, row: Any, now_s: Any) -> Any:
    """What a row is compared by: its score as of now."""
    age_s = max(0, now_s - np.int64(row.last_seen_s))
    return apply_score(score, np.float64(row.score), 0, 0, age_s, np.int64(row.updates))


@inlined
def keep_if_low(changes: Any, num_wanted: Any, num_kept: Any, value: Any, slot: Any, cell: Any) -> Any:
    """Sort a row into the lowest met so far (ascending); how many are kept then."""
    slots_V, worths_V, cells_V = changes.victim_slots_V, changes.victim_worths_V, changes.victim_cells_V
    place = num_kept
    if num_kept == num_wanted:
        place -= 1
    else:
        num_kept += 1
    while place > 0 and (
        worths_V[place - 1] > value or (worths_V[place - 1] == value and slots_V[place - 1] > slot)
    ):
        worths_V[place] = worths_V[place - 1]
        slots_V[place] = slots_V[place - 1]
        cells_V[place] = cells_V[place - 1]
        place -= 1
    worths_V[place] = value
    slots_V[place] = slot
    cells_V[place] = cell
    return num_kept


@kernel
def lowest_rows(table: Any, step: Any, rule: Any, num_wanted: Any, changes: Any) -> Any:
    """Fill victim_slots_V and victim_cells_V with the lowest rows of the next windows; how many, 0 if none
    may leave."""
    cells_C, in_flight_B = table.cells_C, table.in_flight_B
    rule_of_class, protected_R = table.rules.rule_of_class, table.rules.protected_R
    score, now_s = step.score, step.now_s
    num_cells = len(cells_C)
    floors_F = np.empty(FLOOR_BLOCK, np.float64)
    cell = table.cursors[VICTIM_HAND]
    num_kept, examined, passes = 0, 0, 0
    # Infinity until so many are kept as are wanted.
    highest_worth, highest_slot = math.inf, np.int64(-1)
    while num_kept == 0 and examined < num_cells and passes < PASSES_MAX:
        to_examine = min(step.window_cells * num_wanted, num_cells - examined)
        examined += to_examine
        passes += 1
        while to_examine > 0:
            stop = min(cell + min(to_examine, FLOOR_BLOCK), num_cells)
            to_examine -= stop - cell
            # Without a branch, and unsigned: several cells at a time. An empty cell's score is infinite.
            for i in range(stop - cell):
                row = cells_C[np.uint64(cell + i)]
                age_s = max(0, now_s - np.int64(row.last_seen_s))
                floors_F[i] = floor_of_score(score, np.float64(row.score), age_s)
            for here in range(cell, stop):
                # Most rows are far from leaving.
                if floors_F[here - cell] > highest_worth:
                    continue
                row = cells_C[here]
                slot = np.int64(row.slot)
                if slot < 0:
                    continue
                row_rule = rule_of_class[class_of_key(row.key)]
                if protected_R[row_rule] or (rule >= 0 and row_rule != rule):
                    continue
                value = worth(score, row, now_s)
                if value > highest_worth or (value == highest_worth and slot > highest_slot >= 0):
                    continue
                if not is_in_flight(in_flight_B, slot):
                    num_kept = keep_if_low(changes, num_wanted, num_kept, value, slot, here)
                    if num_kept == num_wanted:
                        highest_worth = changes.victim_worths_V[num_wanted - 1]
                        highest_slot = changes.victim_slots_V[num_wanted - 1]
            cell = stop if stop < num_cells else 0
    table.cursors[VICTIM_HAND] = cell
    return num_kept


@kernel
def evict_lowest(table: Any, step: Any, rule: Any, num_wanted: Any, changes: Any) -> Any:
    """Evict the lowest rows, of one class or of any; how many left."""
    num_victims = lowest_rows(table, step, rule, num_wanted, changes)
    reason = BY_SCORE if rule < 0 else BY_QUOTA
    cells_C, homes_S, links_S2 = table.cells_C, table.homes_S, table.links_S2
    slots_V, cells_V = changes.victim_slots_V, changes.victim_cells_V
    in_wheel = len(links_S2) > 0
    for i in range(num_victims):
        prefetch(homes_S, slots_V[i])
        if in_wheel:
            prefetch(links_S2, slots_V[i])
    if in_wheel:
        for i in range(num_victims):
            prefetch(links_S2, max(0, links_S2[slots_V[i], 0]))
            prefetch(links_S2, max(0, links_S2[slots_V[i], 1]))
    for i in range(num_victims):
        slot, cell = slots_V[i], cells_V[i]
        if cells_C[cell].slot != slot:
            # An eviction before this one has moved the row.
            cell = find_slot(cells_C, homes_S[slot], slot)
        evict(table, cell, reason, step.now_s, changes)
    return num_victims


@kernel
def make_room(table: Any, step: Any, changes: Any) -> Any:
    """Free at least one slot; False if no row may leave."""
    if expire_due(table, step, step.room_scan, 1, changes) > 0:
        return True
    # Above a lowered limit a pass of several would make no room for the ids after this one.
    above = table.cursors[NUM_ROWS_HELD] > table.cursors[ROW_LIMIT]
    num_wanted = 1 if above else len(changes.victim_slots_V)
    return evict_lowest(table, step, ANY_RULE, num_wanted, changes) > 0


@kernel
def make_room_in_class(table: Any, step: Any, rule: Any, changes: Any) -> Any:
    """Evict a row of the class; False if none may leave."""
    return evict_lowest(table, step, rule, 1, changes) > 0


@kernel
def shrink(table: Any, step: Any, changes: Any) -> None:
    """Towards a row limit that was lowered: a bounded number of passes."""
    num_wanted = len(changes.victim_slots_V)
    for _ in range(SHRINK_PASSES):
        excess = table.cursors[NUM_ROWS_HELD] - table.cursors[ROW_LIMIT]
        if excess <= 0:
            return
        if evict_lowest(table, step, ANY_RULE, min(excess, num_wanted), changes) == 0:
            return


@kernel
def shrink_classes(table: Any, step: Any, changes: Any) -> None:
    """Towards quotas that were lowered: a bounded number of passes over all classes together."""
    max_rows_R, protected_R, rows_R = table.rules.max_rows_R, table.rules.protected_R, table.rows_R
    num_wanted = len(changes.victim_slots_V)
    passes = 0
    for rule in range(len(rows_R)):
        while 0 <= max_rows_R[rule] < rows_R[rule] and not protected_R[rule] and passes < SHRINK_PASSES:
            passes += 1
            excess = rows_R[rule] - max_rows_R[rule]
            if evict_lowest(table, step, rule, min(excess, num_wanted), changes) == 0:
                changes.quota_failed_R[rule] = True
                break
