"""What an IdTable lies in: the cells with the rows, a few bytes a slot, the rules by class.

Beside its embedding row an id costs 24 / 0.8 = 30 bytes of cells, 4 of home (the way from slot to cell, and
the list of free slots) and 1/8 for being in flight; where some class has a lifetime, 8 more for the wheel.

Legend: S slots, C cells, R rules (0: classes without a policy of their own), K counters, W wheel buckets,
E remembered evictions, B bytes of bits.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feature_eviction.big_arrays import big_array
from feature_eviction.cells import num_cells_for
from feature_eviction.count_sketch import CountSketch, sketch_bytes
from feature_eviction.keys import Int32Array, Int64Array
from feature_eviction.policy import CLASS_ID_MAX, NUM_SLOTS_MAX, ClassPolicy, TablePolicy
from feature_eviction.row_cells import CELL_BYTES, CellArray, empty_row_cells

HOME_BYTES = 4
LINK_BYTES = 8

(
    ADMITTED,
    EXPIRED,
    BY_SCORE,
    BY_QUOTA,
    FEW_UPDATES,
    DELETED,
    REFUSED_PROBABILITY,
    REFUSED_COUNT,
    REFUSED_QUOTA,
    REFUSED_NO_VICTIM,
) = range(10)
NUM_COUNTERS = 10
EVICTED_REASONS = {
    "expired": EXPIRED,
    "few_updates": FEW_UPDATES,
    "score": BY_SCORE,
    "quota": BY_QUOTA,
    "deleted": DELETED,
}
REFUSED_REASONS = {
    "probability": REFUSED_PROBABILITY,
    "count": REFUSED_COUNT,
    "quota": REFUSED_QUOTA,
    "no_victim": REFUSED_NO_VICTIM,
}

FREE_HEAD, NUM_ROWS_HELD, VICTIM_HAND, EXPIRY_TICK, ROW_LIMIT, NUM_REMEMBERED, BAD_SCORES = range(7)
NUM_CURSORS = 7

ALWAYS, PROBABILITY, COUNT = range(3)
_ADMISSION_KINDS = {"always": ALWAYS, "probability": PROBABILITY, "count": COUNT}

WHEEL_BUCKETS_MAX = 1 << 16
_TICKS_OF_SHORTEST = 256
_SPARE_BUCKETS = 8

EVICTION_DTYPE = np.dtype(
    [("key", np.int64), ("when_s", np.int64), ("score", np.float32), ("reason", np.int32)]
)


class Rules(NamedTuple):
    """The class policies as columns."""

    rule_of_class: npt.NDArray[np.uint16]
    ttl_s_R: Int64Array
    """-1 = never."""
    min_updates_R: Int64Array
    max_rows_R: Int64Array
    """-1 = no quota."""
    protected_R: npt.NDArray[np.bool_]
    admission_R: Int64Array
    probability_R: npt.NDArray[np.float64]
    min_count_R: Int64Array


class Table(NamedTuple):
    """The arrays of one table, as the kernels see them."""

    cells_C: CellArray
    homes_S: Int32Array
    """The home cell of the slot's key; of a free slot, -2 - the next free one (-1 ends the list)."""
    in_flight_B: npt.NDArray[np.uint8]
    """A bit a slot."""
    links_S2: Int32Array
    """The slot's neighbours in its wheel bucket; [0, 2] where no class has a lifetime."""
    buckets_W: Int32Array
    """The first slot of each bucket, -1 = none."""
    recent_E: npt.NDArray[np.void]
    """The newest evictions, written in a circle."""
    rules: Rules
    counters_RK: Int64Array
    rows_R: Int64Array
    """Rows held by rule."""
    cursors: Int64Array
    random_1: npt.NDArray[np.uint64]
    sketch_RW: npt.NDArray[np.uint8]
    sketch_halved_RB: Int32Array
    sketch_clock_3: Int64Array


def rules_of(policy: TablePolicy) -> Rules:
    """Rule 0 is ClassPolicy's defaults, rule i the i-th listed class."""
    rule_of_class = np.zeros(CLASS_ID_MAX + 1, np.uint16)
    listed = (ClassPolicy(class_id=0), *policy.classes)
    for rule, class_policy in enumerate(listed[1:], start=1):
        rule_of_class[class_policy.class_id] = rule
    return Rules(
        rule_of_class=rule_of_class,
        ttl_s_R=np.array([-1 if one.ttl_s is None else one.ttl_s for one in listed], np.int64),
        min_updates_R=np.array([one.min_updates for one in listed], np.int64),
        max_rows_R=np.array([-1 if one.max_rows is None else one.max_rows for one in listed], np.int64),
        protected_R=np.array([one.protected for one in listed], np.bool_),
        admission_R=np.array([_ADMISSION_KINDS[one.admission.kind] for one in listed], np.int64),
        probability_R=np.array([one.admission.probability for one in listed], np.float64),
        min_count_R=np.array([one.admission.min_count for one in listed], np.int64),
    )


def wheel_of(policy: TablePolicy) -> tuple[int, int]:
    """(seconds a tick, buckets) of the timing wheel; (1, 0) where no class has a lifetime."""
    return wheel_for([one.ttl_s for one in policy.classes if one.ttl_s is not None])


def wheel_for(lifetimes: list[int]) -> tuple[int, int]:
    """wheel_of classes with these lifetimes.

    A tick is 1/256 of the shortest one, at least a second, and long enough for the longest one to fit.
    """
    if not lifetimes:
        return 1, 0
    longest_s = max(lifetimes)
    tick_s = max(1, min(lifetimes) // _TICKS_OF_SHORTEST, -(-longest_s // (WHEEL_BUCKETS_MAX - 16)))
    return tick_s, longest_s // tick_s + 2 + _SPARE_BUCKETS


def empty_table(policy: TablePolicy) -> Table:
    """All slots free, the lowest taken first."""
    num_slots = policy.num_slots
    homes_S = big_array(num_slots, np.int32)
    homes_S[:] = np.arange(-3, -3 - num_slots, -1, dtype=np.int32)
    homes_S[-1] = -1
    rules = rules_of(policy)
    sketch = CountSketch(policy.sketch_width_used, window_s=policy.count_window_s)
    _, num_buckets = wheel_of(policy)
    links_S2 = big_array((num_slots if num_buckets else 0, 2), np.int32)
    links_S2[:] = -1
    cursors = np.zeros(NUM_CURSORS, np.int64)
    cursors[ROW_LIMIT] = num_slots
    num_rules = len(rules.ttl_s_R)
    return Table(
        cells_C=empty_row_cells(num_slots),
        homes_S=homes_S,
        in_flight_B=np.zeros(_bytes_of_bits(num_slots), np.uint8),
        links_S2=links_S2,
        buckets_W=np.full(num_buckets, -1, np.int32),
        recent_E=np.zeros(policy.evictions_remembered, EVICTION_DTYPE),
        rules=rules,
        counters_RK=np.zeros((num_rules, NUM_COUNTERS), np.int64),
        rows_R=np.zeros(num_rules, np.int64),
        cursors=cursors,
        random_1=np.array([policy.seed & (2**64 - 1)], np.uint64),
        sketch_RW=sketch.counters_RW,
        sketch_halved_RB=sketch.halved_RB,
        sketch_clock_3=sketch.clock_3,
    )


def _bytes_of_bits(num_slots: int) -> int:
    return (num_slots + 7) // 8


def bytes_of(table: Table) -> int:
    """Bytes of everything whose size the policy chooses by number.

    The rules and counters, some kilobytes that depend on the classes alone, are not in it.
    """
    sized = (
        table.cells_C,
        table.homes_S,
        table.in_flight_B,
        table.links_S2,
        table.buckets_W,
        table.recent_E,
        table.sketch_RW,
        table.sketch_halved_RB,
    )
    return sum(array.nbytes for array in sized)


def table_bytes(num_slots: int, *, policy: TablePolicy | None = None) -> int:
    """The exact IdTable.bytes_used of a table of so many slots (embedding rows not included).

    Args: policy: whose classes say whether there are a count sketch and a timing wheel, and which says
    how many evictions are remembered; None = none of them.
    """
    size = num_cells_for(num_slots) * CELL_BYTES + num_slots * HOME_BYTES + _bytes_of_bits(num_slots)
    if policy is None:
        return size
    _, num_buckets = wheel_of(policy)
    if num_buckets:
        size += num_slots * LINK_BYTES + num_buckets * 4
    size += policy.evictions_remembered * EVICTION_DTYPE.itemsize
    return size + sketch_bytes(policy.sketch_width_used)


def num_slots_for_budget(bytes_limit: int, *, bytes_per_row: int, policy: TablePolicy | None = None) -> int:
    """The largest number of slots whose id table and rows together stay within the limit; 0 if none does.

    Args: bytes_per_row: embedding row and optimizer state of one slot; policy: as for table_bytes, its
    num_slots is not looked at.
    """
    fits, too_many = 0, NUM_SLOTS_MAX + 1
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if table_bytes(middle, policy=policy) + middle * bytes_per_row <= bytes_limit:
            fits = middle
        else:
            too_many = middle
    return fits
