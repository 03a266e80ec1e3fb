"""IdTable against an obvious one: a dict of rows, sorted for every victim, in exact mode."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import (
    OTHER_CLASSES,
    AdmissionConfig,
    ClassCounters,
    ClassPolicy,
    CountSketch,
    IdTable,
    MapResult,
    ScoreConfig,
    TablePolicy,
    class_of,
    table_bytes,
)
from feature_eviction.score import KRAKEN, SCORE_EPOCH_S, SCORE_KINDS, decay_per_s, gain, kraken_score, worth

START_S = SCORE_EPOCH_S + 1_000
CLASSES = (
    ClassPolicy(class_id=1, ttl_s=20),
    ClassPolicy(class_id=2, protected=True),
    ClassPolicy(class_id=3, admission=AdmissionConfig(kind="count", min_count=3)),
    ClassPolicy(class_id=4, admission=AdmissionConfig(kind="probability", probability=0.4)),
    ClassPolicy(class_id=4095, ttl_s=5, protected=True),
)
KEYS = [
    int(np.uint64(class_id << 52 | raw_id).astype(np.int64))
    for class_id in (0, 1, 2, 3, 4, 9, 2048, 4095)
    for raw_id in (0, 1, 2, 2**52 - 1)
]


@dataclass
class Row:
    slot: int
    score: np.float32 = field(default_factory=lambda: np.float32(-math.inf))
    last_seen_s: int = 0
    updates: int = 0
    batch: int = 0


class ReferenceTable:
    """What IdTable promises, without regard to time or memory."""

    def __init__(self, policy: TablePolicy) -> None:
        self.policy = policy
        self.kind = SCORE_KINDS[policy.score.kind]
        self.rows: dict[int, Row] = {}
        self.free = list(reversed(range(policy.num_slots)))
        self.batch = self.released = self.expiry_hand = 0
        self.sketch = CountSketch(policy.sketch_width_used)
        self.random = policy.seed
        self.counts: dict[tuple[int, str], int] = {}

    def map(self, sightings: list[tuple[int, int, int]], now_s: int) -> dict[str, list[int]]:
        self.batch += 1
        self.now_s = now_s
        self.new: list[int] = []
        self.evicted: list[tuple[int, int]] = []
        held = [key in self.rows for key, _, _ in sightings]
        for (key, shows, positives), is_held in zip(sightings, held, strict=True):
            if is_held:
                self.touch(key, shows, positives)
        self.expire()
        for (key, shows, positives), was_held in zip(sightings, held, strict=True):
            if not was_held and (key in self.rows or self.admit(key, shows)):
                self.touch(key, shows, positives)
        return {
            "slots": [self.rows[key].slot if key in self.rows else -1 for key, _, _ in sightings],
            "new_keys": self.new,
            "new_slots": [self.rows[key].slot for key in self.new],
            "evicted_keys": [key for key, _ in self.evicted],
            "evicted_slots": [slot for _, slot in self.evicted],
        }

    def class_policy(self, key: int) -> ClassPolicy:
        class_id = int(class_of([key])[0])
        listed = {one.class_id: one for one in self.policy.classes}
        return listed.get(class_id, ClassPolicy(class_id=class_id))

    def count(self, key: int, what: str) -> None:
        class_policy = self.class_policy(key)
        class_id = class_policy.class_id if class_policy in self.policy.classes else OTHER_CLASSES
        self.counts[class_id, what] = self.counts.get((class_id, what), 0) + 1

    def touch(self, key: int, shows: int, positives: int) -> None:
        row = self.rows[key]
        row.last_seen_s = max(row.last_seen_s, self.now_s)
        row.updates += shows
        row.batch = self.batch
        aging = decay_per_s(self.policy.score) * (self.now_s - SCORE_EPOCH_S)
        log_gain = gain(shows, positives, self.policy.score.positive_weight)
        row.score = np.float32(kraken_score(row.score, log_gain, aging))

    def may_leave(self, key: int) -> bool:
        return self.rows[key].batch <= self.released

    def expired(self, key: int) -> bool:
        ttl_s = self.class_policy(key).ttl_s
        return ttl_s is not None and self.now_s - self.rows[key].last_seen_s > ttl_s

    def evict(self, key: int, reason: str) -> None:
        self.count(key, reason)
        slot = self.rows.pop(key).slot
        self.evicted.append((key, slot))
        self.free.append(slot)

    def expire(self) -> None:
        if all(one.ttl_s is None for one in self.policy.classes):
            return
        for _ in range(min(self.policy.expiry_scan, self.policy.num_slots)):
            for key in [key for key, row in self.rows.items() if row.slot == self.expiry_hand]:
                if self.may_leave(key) and self.expired(key):
                    self.evict(key, "expired")
            self.expiry_hand = (self.expiry_hand + 1) % self.policy.num_slots

    def draw(self) -> float:
        mask = 2**64 - 1
        self.random = self.random + 0x9E3779B97F4A7C15 & mask
        mixed = self.random
        mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
        mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
        return ((mixed ^ mixed >> 31) >> 11) / 2**53

    def admit(self, key: int, shows: int) -> bool:
        admission = self.class_policy(key).admission
        if admission.kind == "probability" and self.draw() < (1 - admission.probability) ** shows:
            self.count(key, "probability")
            return False
        if admission.kind == "count" and self.sketch.add([key], [shows])[0] < admission.min_count:
            self.count(key, "count")
            return False
        if not self.free:
            order = sorted(
                (
                    not self.expired(one),
                    worth(self.kind, row.score, row.last_seen_s, row.updates),
                    row.slot,
                    one,
                )
                for one, row in self.rows.items()
                if self.may_leave(one) and (self.expired(one) or not self.class_policy(one).protected)
            )
            if not order:
                self.count(key, "no_victim")
                return False
            self.evict(order[0][3], "score" if order[0][0] else "expired")
        self.rows[key] = Row(slot=self.free.pop())
        self.new.append(key)
        self.count(key, "admitted")
        return True


def as_lists(result: MapResult) -> dict[str, list[int]]:
    return {
        "slots": result.slots_N.tolist(),
        "new_keys": result.new_keys_M.tolist(),
        "new_slots": result.new_slots_M.tolist(),
        "evicted_keys": result.evicted_keys_K.tolist(),
        "evicted_slots": result.evicted_slots_K.tolist(),
    }


def flat(class_id: int, counters: ClassCounters) -> dict[tuple[int, str], int]:
    counts = {"admitted": counters.admitted, **counters.evicted, **counters.refused}
    return {(class_id, what): count for what, count in counts.items() if count}


def check_same_contents(table: IdTable, reference: ReferenceTable) -> None:
    rows = table.rows()
    found = dict(
        zip(
            rows.keys_N.tolist(),
            zip(rows.slots_N.tolist(), rows.last_seen_s_N.tolist(), rows.updates_N.tolist(), strict=True),
            strict=True,
        )
    )
    assert found == {k: (row.slot, row.last_seen_s, row.updates) for k, row in reference.rows.items()}
    assert table.num_rows == len(reference.rows) <= reference.policy.num_slots
    assert len({row.slot for row in reference.rows.values()}) == len(reference.rows)
    if reference.kind == KRAKEN:
        scores = dict(zip(rows.keys_N.tolist(), rows.scores_N.tolist(), strict=True))
        assert scores == {key: float(row.score) for key, row in reference.rows.items()}
    expected = [reference.rows[key].slot if key in reference.rows else -1 for key in KEYS]
    assert table.lookup(KEYS).tolist() == expected
    assert table.bytes_used == table_bytes(reference.policy.num_slots, policy=reference.policy)
    counters = table.counters()
    by_class: dict[tuple[int, str], int] = {}
    for class_id, class_counters in counters.classes.items():
        by_class |= flat(class_id, class_counters)
    assert by_class == reference.counts
    sums = {**counters.evicted, **counters.refused, "admitted": counters.admitted}
    for what, total in sums.items():
        assert total == sum(count for (_, reason), count in reference.counts.items() if reason == what)


SIGHTING = st.tuples(st.sampled_from(KEYS), st.integers(1, 4), st.integers(0, 4)).map(
    lambda one: (one[0], one[1], min(one[1], one[2]))
)
CALL = st.tuples(st.lists(SIGHTING, max_size=9), st.integers(-3, 15), st.integers(0, 3))


@settings(max_examples=300, deadline=None)
@given(
    calls=st.lists(CALL, min_size=1, max_size=30),
    num_slots=st.integers(1, 9),
    expiry_scan=st.integers(0, 10),
    kind=st.sampled_from(["kraken", "lru", "lfu"]),
    seed=st.integers(0, 2**64 - 1),
)
def test_table_does_what_the_obvious_one_does(
    calls: list[tuple[list[tuple[int, int, int]], int, int]],
    num_slots: int,
    expiry_scan: int,
    kind: str,
    seed: int,
) -> None:
    policy = TablePolicy(
        num_slots=num_slots,
        score=ScoreConfig(kind=kind, decay_per_day=0.999),  # type: ignore[arg-type]
        classes=CLASSES,
        victim_window=num_slots,
        expiry_scan=expiry_scan,
        count_sketch_width=8,
        seed=seed,
    )
    check_stream(policy, calls)


def check_stream(policy: TablePolicy, calls: list[tuple[list[tuple[int, int, int]], int, int]]) -> None:
    """Each call: sightings, seconds since the call before, batches left in flight."""
    table, reference = IdTable(policy), ReferenceTable(policy)
    now_s = START_S
    for sightings, seconds, num_in_flight in calls:
        now_s += seconds
        result = table.map(
            np.array([key for key, _, _ in sightings], np.int64),
            shows_N=np.array([shows for _, shows, _ in sightings], np.int64),
            positives_N=np.array([positives for _, _, positives in sightings], np.int64),
            now_s=now_s,
        )
        assert as_lists(result) == reference.map(sightings, now_s)
        assert result.batch == reference.batch
        check_same_contents(table, reference)
        table.release(result.batch - num_in_flight)
        reference.released = max(reference.released, reference.batch - num_in_flight)


@pytest.mark.parametrize("kind", ["kraken", "lru", "lfu"])
def test_long_skewed_stream_agrees_with_the_obvious_table(kind: str) -> None:
    generator = np.random.default_rng(23)
    policy = TablePolicy(
        num_slots=40,
        score=ScoreConfig(kind=kind, decay_per_day=0.999),  # type: ignore[arg-type]
        classes=CLASSES,
        victim_window=1000,
        expiry_scan=4,
        count_sketch_width=64,
        seed=5,
    )
    calls = []
    for _ in range(150):
        classes_N = generator.choice([0, 1, 3, 4, 4095], 20)
        ids_N = generator.zipf(1.3, 20) % 500
        keys_N = (classes_N.astype(np.uint64) << np.uint64(52) | ids_N.astype(np.uint64)).astype(np.int64)
        positives_N = generator.integers(0, 2, 20)
        sightings = [(int(k), 1 + int(p), int(p)) for k, p in zip(keys_N, positives_N, strict=True)]
        calls.append((sightings, int(generator.integers(-2, 8)), int(generator.integers(0, 2))))
    check_stream(policy, calls)
