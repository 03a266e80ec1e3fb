"""Compiles the id table's kernels before the first impression, not under it.

Numba compiles a kernel at its first call and keeps it on disk: the first start on a machine takes tens of
seconds here, later ones a fraction of one. What is compiled depends on the policies, not on sizes.
"""

from __future__ import annotations

import numpy as np

from feature_eviction import IdTable, deduplicate, make_keys, owner_of
from trainer.config import Config
from trainer.recommender import policy_of

NUM_SLOTS = 64
EVENT_TIME_S = 1_700_000_000


def compile_kernels(config: Config) -> None:
    """Take a small table of each policy through everything that training asks of one."""
    for table in config.tables:
        ids = IdTable(policy_of(table, num_slots=NUM_SLOTS, config=config))
        for step in range(4):
            raw_ids_N = np.arange(step * NUM_SLOTS, (step + 1) * NUM_SLOTS, dtype=np.int64)
            keys_N, _ = make_keys(raw_ids_N, class_id=config.schema.features[-1].class_id)
            owner_of(keys_N, num_owners=2)
            unique = deduplicate(keys_N, np.zeros(len(keys_N), np.int32))
            mapped = ids.map(
                unique.keys_U,
                shows_N=unique.shows_U,
                positives_N=unique.positives_U,
                # Weeks between the steps: rows expire as well as being evicted for their score.
                now_s=EVENT_TIME_S + step * 14 * 86_400,
            )
            ids.release(mapped.batch)
            ids.rows(ids.rows().slots_N)
            ids.lookup(keys_N)
