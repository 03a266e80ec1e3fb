"""What may run beside what: shards on threads of their own, readers beside readers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np

from feature_eviction import ClassPolicy, IdTable, TablePolicy, owner_of
from feature_eviction.keys import Int64Array

NUM_SHARDS = 4
CLASSES = (ClassPolicy(class_id=0, ttl_s=40),)


def calls_of(owner: int) -> list[Int64Array]:
    generator = np.random.default_rng(5)
    calls = []
    for _ in range(60):
        keys_N = np.unique(generator.zipf(1.2, 4000) % 20_000)
        calls.append(keys_N[owner_of(keys_N, num_owners=NUM_SHARDS) == owner])
    return calls


def run_shard(owner: int, start: Barrier | None = None) -> IdTable:
    table = IdTable(TablePolicy(num_slots=1500, classes=CLASSES))
    if start is not None:
        start.wait()
    for now_s, keys_N in enumerate(calls_of(owner), start=1000):
        ones = np.ones(len(keys_N), np.int64)
        table.release(table.map(keys_N, shows_N=ones, positives_N=ones, now_s=now_s).batch)
    return table


def test_shards_on_threads_end_as_shards_one_after_another() -> None:
    expected = [run_shard(owner).state() for owner in range(NUM_SHARDS)]
    assert sum(int(state["counters"][:, 2].sum()) for state in expected) > 1000
    start = Barrier(NUM_SHARDS)
    with ThreadPoolExecutor(NUM_SHARDS) as threads:
        found = list(threads.map(lambda owner: run_shard(owner, start).state(), range(NUM_SHARDS)))
    for before, after in zip(expected, found, strict=True):
        assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_readers_beside_readers_all_see_the_table() -> None:
    table = run_shard(0)
    rows = table.rows()
    start = Barrier(NUM_SHARDS)

    def read(_: int) -> bool:
        start.wait()
        agreed = True
        for _ in range(200):
            agreed = agreed and np.array_equal(table.lookup(rows.keys_N), rows.slots_N)
            agreed = agreed and np.array_equal(table.rows(rows.slots_N[:50]).keys_N, rows.keys_N[:50])
        return agreed

    with ThreadPoolExecutor(NUM_SHARDS) as threads:
        assert all(threads.map(read, range(NUM_SHARDS)))
