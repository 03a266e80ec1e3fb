"""The C++ bound does what IdTable does; otherwise its speed would say nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks import native_table
from feature_eviction import ClassPolicy, IdTable, TablePolicy, make_keys

TTL_S = 60
NUM_SLOTS = 300
CLASS_ID = 7
START_S = 1_750_000_000

pytestmark = pytest.mark.skipif(native_table.compiler_missing() is not None, reason="no C++ compiler")


def exact_policy(**settings) -> TablePolicy:
    """The lowest of all rows leaves, so that no sampling can differ."""
    classes = (ClassPolicy(class_id=CLASS_ID, ttl_s=TTL_S),)
    return TablePolicy(num_slots=NUM_SLOTS, victim_window=NUM_SLOTS, classes=classes, **settings)


def calls(num: int, *, seed: int):
    generator = np.random.default_rng(seed)
    for call in range(num):
        keys_N, _ = make_keys(np.minimum(generator.zipf(1.2, 80), 1_999), class_id=CLASS_ID)
        shows_N = generator.integers(1, 4, len(keys_N)).astype(np.int32)
        positives_N = generator.integers(0, 2, len(keys_N)).astype(np.int32)
        yield keys_N, {"shows_N": shows_N, "positives_N": positives_N, "now_s": START_S + 2 * call}


class SortedModel:
    """Rows in a dict; the lowest decayed score leaves, by sorting all of them."""

    def __init__(self, decay_per_day: float, positive_weight: float) -> None:
        self.decay_per_s = -math.log1p(-decay_per_day) / 86_400
        self.positive_weight = positive_weight
        self.rows: dict[int, tuple[float, int]] = {}

    def worth(self, key: int, now_s: int) -> float:
        score, last_seen_s = self.rows[key]
        return score * math.exp(-self.decay_per_s * (now_s - last_seen_s))

    def touch(self, key: int, shows: int, positives: int, now_s: int) -> None:
        old = self.worth(key, now_s) if key in self.rows else 0.0
        self.rows[key] = (old + self.positive_weight * positives + shows - positives, now_s)

    def evicted_is_lowest(self, key: int, now_s: int, used: set[int]) -> bool:
        others = [self.worth(other, now_s) for other in self.rows if other not in used]
        # The table keeps float32.
        return self.worth(key, now_s) <= min(others) * (1 + 1e-5)


def test_every_row_that_leaves_is_expired_or_the_lowest_of_a_sorted_model():
    policy = exact_policy(expiry_scan=0)
    native = native_table.NativeTable(native_table.build(), policy, ttl_s=10**6)
    model = SortedModel(policy.score.decay_per_day, policy.score.positive_weight)
    num_evicted = 0
    for keys_N, sightings in calls(200, seed=5):
        now_s = sightings["now_s"]
        slots_N, _, evicted_keys_K = native.map(keys_N, **sightings)
        used = set(keys_N.tolist())
        columns = zip(keys_N.tolist(), sightings["shows_N"], sightings["positives_N"], strict=True)
        for key, shows, positives in columns:
            model.touch(key, int(shows), int(positives), now_s)
        for key in evicted_keys_K.tolist():
            assert key not in used
            assert model.evicted_is_lowest(key, now_s, used)
            del model.rows[key]
        assert (slots_N >= 0).all()
        assert len(model.rows) <= NUM_SLOTS
        held_N = np.array(list(model.rows))
        held_slots_N = native.lookup(held_N)
        assert (held_slots_N >= 0).all()
        assert len(set(held_slots_N.tolist())) == len(held_N)
        num_evicted += len(evicted_keys_K)
    assert num_evicted > 1_000
    native.close()


def test_native_table_keeps_the_rows_that_id_table_keeps():
    policy = exact_policy()
    ours = IdTable(policy)
    native = native_table.NativeTable(native_table.build(), policy, ttl_s=TTL_S)
    everything_N, _ = make_keys(np.arange(2_000), class_id=CLASS_ID)
    shares = []
    for keys_N, sightings in calls(200, seed=6):
        ours.release(ours.map(keys_N, **sightings).batch)
        native.map(keys_N, **sightings)
        assert np.array_equal(native.lookup(keys_N) >= 0, ours.lookup(keys_N) >= 0)
        theirs_N, ours_N = native.lookup(everything_N) >= 0, ours.lookup(everything_N) >= 0
        shares.append((theirs_N & ours_N).sum() / (theirs_N | ours_N).sum())
    # Ties, and the moment at which an expired row leaves, may differ.
    assert np.mean(shares[20:]) > 0.9
    native.close()


def test_expired_rows_leave_the_native_table():
    native = native_table.NativeTable(native_table.build(), exact_policy(), ttl_s=TTL_S)
    columns = {"shows_N": np.ones(50, np.int32), "positives_N": np.zeros(50, np.int32)}
    native.map(np.arange(50), **columns, now_s=START_S)
    # The hand needs two calls to pass all cells.
    evicted = [
        native.map(np.arange(100, 150), **columns, now_s=START_S + TTL_S + 1 + call)[2].tolist()
        for call in (0, 1)
    ]
    assert sorted(evicted[0] + evicted[1]) == list(range(50))
    assert (native.lookup(np.arange(50)) == -1).all()
    native.close()


def test_native_table_forgets_deleted_ids_and_loads_saved_ones():
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
    assert (freed_N[1::2] == -1).all()
    assert (native.lookup(keys_N[:100]) == -1).all()
    assert np.array_equal(native.lookup(keys_N[100:]), slots_N[100:])
    native.close()
