"""Is a restored timing wheel whole? Each held row with a lifetime once, nothing else, no circles."""

from __future__ import annotations

from typing import Any

import numpy as np

from feature_eviction.jit import kernel
from feature_eviction.leaving import rule_of_key

NOT_LINKED = -1


@kernel
def first_misplaced_slot(table: Any) -> Any:
    """A slot that is missing, has no business there, or disagrees with its neighbour; -1 if all is well.

    Links and buckets are in range already.
    """
    num_slots = len(table.homes_S)
    due_S = np.zeros(num_slots, np.bool_)
    for cell in range(len(table.cells_C)):
        row = table.cells_C[cell]
        if row.slot >= 0 and table.rules.ttl_s_R[rule_of_key(table.rules, row.key)] >= 0:
            due_S[row.slot] = True
    for bucket in range(len(table.buckets_W)):
        before = -2 - bucket
        slot = table.buckets_W[bucket]
        while slot >= 0:
            # A slot met twice is no longer due: a circle ends here.
            if not due_S[slot] or table.links_S2[slot, 0] != before:
                return slot
            due_S[slot] = False
            before = slot
            slot = table.links_S2[slot, 1]
    for slot in range(num_slots):
        if due_S[slot]:
            return slot
    return -1
