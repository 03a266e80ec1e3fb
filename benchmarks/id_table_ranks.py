"""How low do the victims really stand? Their true rank among all rows that might have left.

Legend: N rows held, K evicted rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.report import rounded
from benchmarks.zipf import zipf_ranks
from feature_eviction import IdTable, TablePolicy
from feature_eviction.shipped_scores import decay_per_s

NUM_SLOTS = 1 << 18
CALL_S = 60
WARM_CALLS = 200
IDS_PER_CALL = 8_192


def victim_ranks(*, passes: int, seed: int = 0) -> dict[str, Any]:
    """Ranks as shares of the evictable rows (0 = the lowest), over so many passes of a table in use.

    Keys: mean, p99 and worst over all victims; of the highest victim of each pass its mean and p99,
    and the mean that a random sample would give.
    """
    policy = TablePolicy(num_slots=NUM_SLOTS)
    table, generator = IdTable(policy), np.random.default_rng(seed)
    now_s = 1_750_000_000
    for _ in range(WARM_CALLS):
        now_s += CALL_S
        keys_N = zipf_ranks(generator, IDS_PER_CALL, num_ranks=20 * NUM_SLOTS)
        _map(table, keys_N, now_s)
    next_new = 1 << 40
    while table.num_rows < NUM_SLOTS:
        num_new = min(NUM_SLOTS - table.num_rows, IDS_PER_CALL)
        _map(table, np.arange(next_new, next_new + num_new), now_s)
        next_new += num_new
    ranks, worst = [], []
    for _ in range(passes):
        now_s += CALL_S
        keys_N, order_N = _lowest_first(table, now_s)
        new_keys_M = np.arange(next_new, next_new + policy.victims_at_once)
        next_new += len(new_keys_M)
        evicted_keys_K = _map(table, new_keys_M, now_s)
        if len(evicted_keys_K) != policy.victims_at_once:
            raise AssertionError(f"one pass expected, found {len(evicted_keys_K)} victims")
        ranks_K = np.flatnonzero(np.isin(keys_N[order_N], evicted_keys_K)) / len(keys_N)
        ranks.append(ranks_K)
        worst.append(ranks_K[-1])
    all_ranks = np.concatenate(ranks)
    read = policy.victims_at_once * policy.victim_window
    return {
        "passes": passes,
        "mean": rounded(all_ranks.mean()),
        "p99": rounded(np.percentile(all_ranks, 99)),
        "worst": rounded(all_ranks.max()),
        "worst_of_pass_mean": rounded(np.mean(worst)),
        "worst_of_pass_p99": rounded(np.percentile(worst, 99)),
        "promised_worst_of_pass_mean": rounded(policy.victims_at_once / (read + 1)),
    }


def _map(table: IdTable, keys_N: npt.NDArray[np.int64], now_s: int) -> npt.NDArray[np.int64]:
    result = table.map(
        keys_N,
        shows_N=np.ones(len(keys_N), np.int64),
        positives_N=(keys_N % 5 == 0).astype(np.int64),
        now_s=now_s,
    )
    table.release(result.batch)
    return result.evicted_keys_K


def _lowest_first(table: IdTable, now_s: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Keys of all rows, and their order by (worth now, slot), as eviction compares them."""
    rows = table.rows()
    age_s_N = now_s - rows.last_seen_s_N
    worths_N = rows.scores_N * np.exp(-decay_per_s(table.policy.score.decay_per_day) * age_s_N)
    return rows.keys_N, np.lexsort((rows.slots_N, worths_N))
