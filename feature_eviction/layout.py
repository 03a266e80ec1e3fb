"""What an IdTable lies in: one 16-byte record and one key a slot, the cells, the rules by class.

Legend: S slots, C cells, R rules (0: classes without a policy of their own), K counters.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from feature_eviction.cells import CELL_BYTES, empty_cells, num_cells_for
from feature_eviction.count_sketch import NUM_ROWS, CountSketch
from feature_eviction.keys import Int64Array
from feature_eviction.policy import CLASS_ID_MAX, ClassPolicy, TablePolicy

RECORD_DTYPE = np.dtype(
    [("score", np.float32), ("last_seen_s", np.uint32), ("updates", np.uint32), ("last_batch", np.uint32)]
)
"""One cache line holds all that a sighting changes. A score of NaN marks a free slot."""

SLOT_BYTES = RECORD_DTYPE.itemsize + 8
NUM_SLOTS_MAX = 2**31 - 1

ADMITTED, EXPIRED, BY_SCORE, REFUSED_PROBABILITY, REFUSED_COUNT, REFUSED_NO_VICTIM = range(6)
NUM_COUNTERS = 6

FREE_HEAD, NUM_ROWS_HELD, VICTIM_HAND, EXPIRY_HAND = range(4)
NUM_CURSORS = 4

ALWAYS, PROBABILITY, COUNT = range(3)
_ADMISSION_KINDS = {"always": ALWAYS, "probability": PROBABILITY, "count": COUNT}


class Rules(NamedTuple):
    """The class policies as columns."""

    rule_of_class: npt.NDArray[np.uint16]
    ttl_s_R: Int64Array
    """-1 = never."""
    protected_R: npt.NDArray[np.bool_]
    admission_R: Int64Array
    probability_R: npt.NDArray[np.float64]
    min_count_R: Int64Array


class Table(NamedTuple):
    """The arrays of one table, as the kernels see them."""

    cells_C2: Int64Array
    keys_S: Int64Array
    """The key of a row; of a free slot, the next free one (-1 ends the list)."""
    records_S: npt.NDArray[np.void]
    rules: Rules
    counters_RK: Int64Array
    cursors: Int64Array
    random_1: npt.NDArray[np.uint64]
    sketch_RW: npt.NDArray[np.uint8]
    sketch_additions_1: Int64Array


def rules_of(policy: TablePolicy) -> Rules:
    """Rule 0 is ClassPolicy's defaults, rule i the i-th listed class."""
    rule_of_class = np.zeros(CLASS_ID_MAX + 1, np.uint16)
    listed = (ClassPolicy(class_id=0), *policy.classes)
    for rule, class_policy in enumerate(listed[1:], start=1):
        rule_of_class[class_policy.class_id] = rule
    return Rules(
        rule_of_class=rule_of_class,
        ttl_s_R=np.array([-1 if one.ttl_s is None else one.ttl_s for one in listed], np.int64),
        protected_R=np.array([one.protected for one in listed], np.bool_),
        admission_R=np.array([_ADMISSION_KINDS[one.admission.kind] for one in listed], np.int64),
        probability_R=np.array([one.admission.probability for one in listed], np.float64),
        min_count_R=np.array([one.admission.min_count for one in listed], np.int64),
    )


def empty_table(policy: TablePolicy) -> Table:
    """All slots free, the lowest taken first."""
    num_slots = policy.num_slots
    keys_S = np.arange(1, num_slots + 1, dtype=np.int64)
    keys_S[-1] = -1
    records_S = np.zeros(num_slots, RECORD_DTYPE)
    records_S["score"] = np.nan
    rules = rules_of(policy)
    sketch = CountSketch(policy.sketch_width_used)
    return Table(
        cells_C2=empty_cells(num_slots),
        keys_S=keys_S,
        records_S=records_S,
        rules=rules,
        counters_RK=np.zeros((len(rules.ttl_s_R), NUM_COUNTERS), np.int64),
        cursors=np.zeros(NUM_CURSORS, np.int64),
        random_1=np.array([policy.seed & (2**64 - 1)], np.uint64),
        sketch_RW=sketch.counters_RW,
        sketch_additions_1=sketch.additions_1,
    )


def bytes_of(table: Table) -> int:
    """Bytes of everything whose size the policy chooses by number: cells, keys, records, sketch.

    The rules and counters, some kilobytes that depend on the classes alone, are not in it.
    """
    return table.cells_C2.nbytes + table.keys_S.nbytes + table.records_S.nbytes + table.sketch_RW.nbytes


def table_bytes(num_slots: int, *, policy: TablePolicy | None = None) -> int:
    """The exact IdTable.bytes_used of a table of so many slots (embedding rows not included).

    Args: policy: whose classes say whether there is a count sketch; None = there is none.
    """
    sketch_width = 0 if policy is None else policy.sketch_width_used
    return num_cells_for(num_slots) * CELL_BYTES + num_slots * SLOT_BYTES + NUM_ROWS * sketch_width


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
