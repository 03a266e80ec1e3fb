"""The C++ bound does what IdTable does; otherwise its speed would say nothing."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import native_table
from feature_eviction import ClassPolicy, IdTable, TablePolicy, make_keys

TTL_S = 60
NUM_SLOTS = 300
CLASS_ID = 7


@pytest.mark.skipif(native_table.compiler_missing() is not None, reason="no C++ compiler")
def test_native_table_holds_the_same_ids_as_id_table_call_after_call() -> None:
    policy = TablePolicy(
        num_slots=NUM_SLOTS,
        classes=(ClassPolicy(class_id=CLASS_ID, ttl_s=TTL_S),),
        # Both take the lowest of all rows, so that no sampling can differ.
        victim_window=NUM_SLOTS,
    )
    ours = IdTable(policy)
    native = native_table.NativeTable(native_table.build(), policy, ttl_s=TTL_S)
    generator = np.random.default_rng(5)
    everything_N, _ = make_keys(np.arange(2_000), class_id=CLASS_ID)
    num_evicted = 0
    for call in range(200):
        ids_N = np.minimum(generator.zipf(1.2, 80), 1_999)
        keys_N, _ = make_keys(ids_N, class_id=CLASS_ID)
        shows_N = generator.integers(1, 4, len(keys_N)).astype(np.int32)
        positives_N = generator.integers(0, 2, len(keys_N)).astype(np.int32)
        sightings = {"shows_N": shows_N, "positives_N": positives_N, "now_s": 1_750_000_000 + 2 * call}
        expected = ours.map(keys_N, **sightings)
        ours.release(expected.batch)
        slots_N, new_keys_M, evicted_keys_K = native.map(keys_N, **sightings)
        num_evicted += len(evicted_keys_K)
        assert sorted(new_keys_M) == sorted(expected.new_keys_M)
        assert sorted(evicted_keys_K) == sorted(expected.evicted_keys_K)
        assert np.array_equal(slots_N, native.lookup(keys_N))
        held_N = ours.lookup(everything_N) >= 0
        assert np.array_equal(native.lookup(everything_N) >= 0, held_N)
    assert num_evicted > 1_000
    native.close()


@pytest.mark.skipif(native_table.compiler_missing() is not None, reason="no C++ compiler")
def test_native_table_forgets_deleted_ids_and_loads_saved_ones() -> None:
    native = native_table.NativeTable(native_table.build(), TablePolicy(num_slots=500), ttl_s=TTL_S)
    keys_N = np.random.default_rng(1).permutation(10_000)[:500]
    num_loaded = native.load(
        keys_N,
        scores_N=np.zeros(500, np.float32),
        last_seen_s_N=np.zeros(500, np.uint32),
        updates_N=np.ones(500, np.uint32),
    )
    assert num_loaded == 500
    slots_N = native.lookup(keys_N)
    assert sorted(slots_N) == list(range(500))
    freed_N = native.delete(np.repeat(keys_N[:100], 2))
    assert np.array_equal(freed_N[::2], slots_N[:100])
    assert (native.lookup(keys_N[:100]) == -1).all()
    assert np.array_equal(native.lookup(keys_N[100:]), slots_N[100:])
    native.close()
