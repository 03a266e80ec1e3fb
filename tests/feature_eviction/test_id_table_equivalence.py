"""IdTable against an obvious one: a dict of rows, sorted for every victim, in exact mode."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

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
from feature_eviction.eviction import SHRINK_PASSES
from feature_eviction.layout import wheel_of

START_S = 1_700_000_000
RUN_BACK_S_MAX = 8
"""How far event time may lie behind its newest: more than the shortest lifetime of CLASSES, less than a turn
of the wheel."""
KINDS = ["kraken", "show_click", "lru", "lfu", "distance_lfu", "ttl_only"]
CLASSES = (
    ClassPolicy(class_id=1, ttl_s=20),
    ClassPolicy(class_id=2, protected=True),
    ClassPolicy(class_id=9, max_rows=2),
    ClassPolicy(class_id=2048, ttl_s=9, min_updates=4),
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
    last_seen_s: int
    score: np.float32 = field(default_factory=lambda: np.float32(0.0))
    updates: int = 0
    batch: int = 0
    due_s: int = 0
    """When its lifetime is looked at next: the end of its first one, later that of what was seen."""


def plain_score(
    config: ScoreConfig, row: Row, *, shows: int, positives: int, now_s: int, updates: int
) -> float:
    """What the scores are said to be."""
    age_s = max(0, now_s - row.last_seen_s)
    if config.kind in ("kraken", "show_click"):
        kraken = config.kind == "kraken"
        decay = config.decay_per_day if kraken else 0.02
        positive, other = (config.positive_weight, 1.0) if kraken else (1.0, 0.1)
        aged = float(row.score)
        if age_s > 0 and aged != 0.0:
            aged *= math.exp(math.log1p(-decay) / 86_400 * age_s)
        return aged + positive * positives + other * (shows - positives)
    if config.kind == "lru":
        return -float(age_s)
    if config.kind == "lfu":
        return float(updates)
    if config.kind == "distance_lfu":
        return float(updates / (1.0 + age_s) ** config.distance_power)
    return 0.0


class ReferenceTable:
    """What IdTable promises, without regard to time or memory. Lifetimes end to the second (ticks of one)."""

    def __init__(self, policy: TablePolicy) -> None:
        self.policy = policy
        assert wheel_of(policy)[0] == 1
        self.rows: dict[int, Row] = {}
        self.batch = self.released = 0
        self.row_limit = policy.num_slots
        self.sketch = CountSketch(policy.sketch_width_used, window_s=policy.count_window_s)
        self.random = policy.seed
        self.newest_s = 0
        """The wheel of lifetimes stands here and never turns back."""
        self.counts: dict[tuple[int, str], int] = {}

    def map(
        self, sightings: list[tuple[int, int, int]], now_s: int, new_slots: dict[int, int]
    ) -> dict[str, object]:
        self.batch += 1
        self.new_slots = new_slots
        self.now_s = now_s
        self.new: list[int] = []
        self.evicted: list[tuple[int, int]] = []
        self.expire()
        held = [key in self.rows for key, _, _ in sightings]
        for (key, shows, positives), is_held in zip(sightings, held, strict=True):
            if is_held:
                self.touch(key, shows, positives)
        self.shrink_classes()
        for _ in range(SHRINK_PASSES):
            if len(self.rows) > self.row_limit:
                self.evict_lowest("score", self.leavers())
        for (key, shows, positives), was_held in zip(sightings, held, strict=True):
            if not was_held and (key in self.rows or self.admit(key, shows)):
                self.touch(key, shows, positives)
        return {
            "slots": [self.rows[key].slot if key in self.rows else -1 for key, _, _ in sightings],
            "new_keys": self.new,
            "evicted": sorted(self.evicted),
        }

    def delete(self, keys: list[int]) -> list[int]:
        slots = []
        for key in keys:
            leaves = key in self.rows and self.may_leave(key)
            slots.append(self.rows[key].slot if leaves else -1)
            if leaves:
                self.evicted = []
                self.evict(key, "deleted")
        return slots

    def shrink_classes(self) -> None:
        passes = 0
        for one in self.policy.classes:
            while self.excess(one) > 0 and not one.protected and passes < SHRINK_PASSES:
                passes += 1
                if not self.evict_lowest("quota", self.leavers(one.class_id)):
                    break

    def excess(self, one: ClassPolicy) -> int:
        of_class = sum(self.class_policy(held) == one for held in self.rows)
        return 0 if one.max_rows is None else of_class - one.max_rows

    def go_on_under(self, policy: TablePolicy) -> None:
        """A lifetime that is another one now counts from the last sighting."""
        before = {key: self.class_policy(key).ttl_s for key in self.rows}
        self.policy = policy
        for key, row in self.rows.items():
            ttl_s = self.class_policy(key).ttl_s
            if ttl_s is not None and ttl_s != before[key]:
                row.due_s = max(row.last_seen_s + ttl_s, self.newest_s) + 1

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
        row.score = np.float32(
            plain_score(
                self.policy.score,
                row,
                shows=shows,
                positives=positives,
                now_s=self.now_s,
                updates=row.updates + shows,
            )
        )
        row.last_seen_s = max(row.last_seen_s, self.now_s)
        row.updates += shows
        row.batch = self.batch

    def may_leave(self, key: int) -> bool:
        return self.rows[key].batch <= self.released

    def evict(self, key: int, reason: str) -> None:
        self.count(key, reason)
        self.evicted.append((key, self.rows.pop(key).slot))

    def expire(self) -> None:
        for key, row in list(self.rows.items()):
            one = self.class_policy(key)
            if one.ttl_s is None or self.now_s < row.due_s:
                continue
            expired = self.now_s - row.last_seen_s > one.ttl_s
            if not expired and row.updates >= one.min_updates:
                row.due_s = row.last_seen_s + one.ttl_s + 1
            elif not self.may_leave(key):
                row.due_s = self.now_s + 1
            else:
                self.evict(key, "expired" if expired else "few_updates")
        self.newest_s = max(self.newest_s, self.now_s)

    def leavers(self, class_id: int | None = None) -> list[int]:
        """Keys that may leave for their score, the lowest first."""
        worths = {
            key: plain_score(
                self.policy.score, row, shows=0, positives=0, now_s=self.now_s, updates=row.updates
            )
            for key, row in self.rows.items()
        }
        keys = [
            key
            for key in self.rows
            if self.may_leave(key)
            and not self.class_policy(key).protected
            and (class_id is None or self.class_policy(key).class_id == class_id)
        ]
        return sorted(keys, key=lambda key: (worths[key], self.rows[key].slot))

    def evict_lowest(self, reason: str, leavers: list[int]) -> bool:
        for key in leavers[:1]:
            self.evict(key, reason)
        return bool(leavers)

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
        if (
            admission.kind == "count"
            and self.sketch.add([key], [shows], now_s=self.now_s)[0] < admission.min_count
        ):
            self.count(key, "count")
            return False
        one = self.class_policy(key)
        of_class = [held for held in self.rows if self.class_policy(held).class_id == one.class_id]
        if one.max_rows is not None and len(of_class) >= one.max_rows:
            if one.protected or not self.evict_lowest("quota", self.leavers(one.class_id)):
                self.count(key, "refused_quota")
                return False
        elif len(self.rows) >= self.row_limit and not self.evict_lowest("score", self.leavers()):
            self.count(key, "no_victim")
            return False
        # Which free slot is taken is not promised: it is learned from the table, and must have been free.
        slot = self.new_slots[key]
        assert slot not in {row.slot for row in self.rows.values()}
        # A lifetime that would end in a second that was looked at already is looked at in the next one.
        due_s = max(self.now_s + (one.ttl_s or 0), self.newest_s) + 1
        self.rows[key] = Row(slot=slot, last_seen_s=self.now_s, due_s=due_s)
        self.new.append(key)
        self.count(key, "admitted")
        return True


def as_lists(result: MapResult) -> dict[str, object]:
    return {
        "slots": result.slots_N.tolist(),
        "new_keys": result.new_keys_M.tolist(),
        "evicted": sorted(zip(result.evicted_keys_K.tolist(), result.evicted_slots_K.tolist(), strict=True)),
    }


def flat(class_id: int, counters: ClassCounters) -> dict[tuple[int, str], int]:
    refused = {"refused_quota" if what == "quota" else what: n for what, n in counters.refused.items()}
    counts = {"admitted": counters.admitted, **counters.evicted, **refused}
    return {(class_id, what): count for what, count in counts.items() if count}


def check_same_contents(table: IdTable, reference: ReferenceTable) -> None:
    rows = table.rows()
    columns = (rows.slots_N, rows.last_seen_s_N, rows.updates_N, rows.scores_N)
    found = dict(zip(rows.keys_N.tolist(), zip(*(one.tolist() for one in columns), strict=True), strict=True))
    assert found == {
        key: (row.slot, row.last_seen_s, row.updates, float(row.score)) for key, row in reference.rows.items()
    }
    assert table.num_rows == len(reference.rows) <= reference.policy.num_slots
    assert len({row.slot for row in reference.rows.values()}) == len(reference.rows)
    expected = [reference.rows[key].slot if key in reference.rows else -1 for key in KEYS]
    assert table.lookup(KEYS).tolist() == expected
    assert table.bytes_used == table_bytes(reference.policy.num_slots, policy=reference.policy)
    counters = table.counters()
    by_class: dict[tuple[int, str], int] = {}
    for class_id, class_counters in counters.classes.items():
        by_class |= flat(class_id, class_counters)
    assert by_class == reference.counts
    sums = dict.fromkeys(flat(0, counters), 0)
    for (_, reason), count in reference.counts.items():
        sums[0, reason] += count
    assert flat(0, counters) == sums
    assert counters.rows == sum(one.rows for one in counters.classes.values()) == len(reference.rows)


SIGHTING = st.tuples(st.sampled_from(KEYS), st.integers(1, 4), st.integers(0, 4)).map(
    lambda one: (one[0], one[1], min(one[1], one[2]))
)
CALL = st.tuples(st.lists(SIGHTING, max_size=9), st.integers(-3, 15), st.integers(0, 3))


def changed(policy: TablePolicy, number: int) -> TablePolicy:
    """Other lifetimes and quotas that leave the wheel its size, by number; 0 = those of CLASSES."""
    ttl_s = (5, 2, 12, None)[number % 4]
    max_rows = (2, 1, None)[number % 3]
    settings_of = {4095: {"ttl_s": ttl_s}, 2048: {"ttl_s": 9 + number}, 9: {"max_rows": max_rows}}
    classes = [replace(one, **settings_of.get(one.class_id, {})) for one in policy.classes]
    return replace(policy, classes=tuple(classes))


def exact_policy(num_slots: int, kind: str, seed: int) -> TablePolicy:
    """Global order, and every due row examined in each call."""
    return TablePolicy(
        num_slots=num_slots,
        score=ScoreConfig(kind=kind, decay_per_day=0.999),
        classes=CLASSES,
        victim_window=num_slots,
        low_water_slots=0,
        expiry_scan=1 << 20,
        count_sketch_width=8,
        count_window_s=20,
        evictions_remembered=5,
        seed=seed,
    )


@settings(max_examples=300, deadline=None)
@given(
    calls=st.lists(CALL, min_size=1, max_size=30),
    num_slots=st.integers(1, 9),
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**64 - 1),
)
def test_table_does_what_the_obvious_one_does(
    calls: list[tuple[list[tuple[int, int, int]], int, int]], num_slots: int, kind: str, seed: int
) -> None:
    pair = Pair(exact_policy(num_slots, kind, seed))
    for sightings, seconds, num_in_flight in calls:
        pair.map(sightings, seconds)
        pair.release(num_in_flight)


class Pair:
    """A table and the obvious one, fed and compared together."""

    def __init__(self, policy: TablePolicy) -> None:
        self.table, self.reference = IdTable(policy), ReferenceTable(policy)
        self.now_s = START_S

    def map(self, sightings: list[tuple[int, int, int]], seconds: int) -> int:
        """How many ids were mapped. seconds: since the call before."""
        self.now_s = max(self.now_s + seconds, self.reference.newest_s - RUN_BACK_S_MAX)
        result = self.table.map(
            np.array([key for key, _, _ in sightings], np.int64),
            shows_N=np.array([shows for _, shows, _ in sightings], np.int64),
            positives_N=np.array([positives for _, _, positives in sightings], np.int64),
            now_s=self.now_s,
        )
        new_slots = dict(zip(result.new_keys_M.tolist(), result.new_slots_M.tolist(), strict=True))
        assert as_lists(result) == self.reference.map(sightings, self.now_s, new_slots)
        assert result.batch == self.reference.batch
        self.check()
        return len(sightings)

    def release(self, num_in_flight: int) -> None:
        """All but the newest so many batches."""
        self.table.release(self.reference.batch - num_in_flight)
        self.reference.released = max(self.reference.released, self.reference.batch - num_in_flight)

    def delete(self, keys: list[int]) -> None:
        self.reference.now_s = self.now_s
        assert self.table.delete(keys, now_s=self.now_s).slots_N.tolist() == self.reference.delete(keys)
        self.check()

    def limit_rows(self, num_rows_max: int) -> None:
        self.table.limit_rows(num_rows_max)
        self.reference.row_limit = num_rows_max

    def save_and_load(self) -> None:
        self.table = IdTable.load(self.table.policy, self.table.state())
        self.check()

    def load_under(self, policy: TablePolicy) -> None:
        self.table = IdTable.load(policy, self.table.state())
        self.reference.go_on_under(policy)
        self.check()

    def check(self) -> None:
        check_same_contents(self.table, self.reference)


def test_lifetime_that_ended_in_seconds_already_looked_at_ends_in_the_next_one() -> None:
    pair = Pair(exact_policy(1, "kraken", seed=2))
    (short_lived,) = [key for key in KEYS if class_of([key])[0] == 4095 and key & (2**52 - 1) == 0]
    pair.map([], 0)
    pair.map([(short_lived, 1, 0)], -7)
    pair.release(0)
    pair.map([], 7)
    assert pair.table.num_rows == 1
    pair.map([], 1)
    assert pair.table.num_rows == 0


@pytest.mark.parametrize("kind", KINDS)
def test_long_skewed_stream_agrees_with_the_obvious_table(kind: str) -> None:
    generator = np.random.default_rng(23)
    pair = Pair(exact_policy(40, kind, seed=5))
    for step in range(100):
        classes_N = generator.choice([0, 1, 3, 4, 9, 2048, 4095], 20)
        ids_N = generator.zipf(1.3, 20) % 500
        keys_N = (classes_N.astype(np.uint64) << np.uint64(52) | ids_N.astype(np.uint64)).astype(np.int64)
        positives_N = generator.integers(0, 2, 20)
        sightings = [(int(k), 1 + int(p), int(p)) for k, p in zip(keys_N, positives_N, strict=True)]
        pair.map(sightings, int(generator.integers(-2, 8)))
        pair.release(int(generator.integers(0, 2)))
        if step % 10 == 9:
            pair.delete(keys_N[:3].tolist())
            pair.save_and_load()
        if step % 16 == 15:
            pair.load_under(changed(pair.table.policy, step // 16))
        if step % 25 == 24:
            pair.limit_rows(int(generator.integers(10, 41)))
    assert pair.table.counters().evicted["score"] > 50


OTHERS = ["delete", "limit", "save_and_load", "load_under"]


@st.composite
def operations(draw: st.DrawFn) -> tuple[str, object]:
    """One operation on a Pair."""
    what = draw(st.sampled_from(["map"] * 6 + ["release", "release", *OTHERS]))
    if what == "map":
        return what, draw(st.tuples(st.lists(SIGHTING, max_size=9), st.integers(-3, 15)))
    if what == "delete":
        return what, draw(st.lists(st.sampled_from(KEYS), max_size=3))
    return what, draw(st.integers(0, 9))


def run_operations(pair: Pair, chosen: list[tuple[str, Any]]) -> int:
    """How many rows or calls were operated on."""
    num_operations = 0
    for what, argument in chosen:
        num_operations += 1
        if what == "map":
            num_operations += pair.map(*argument)
        elif what == "delete":
            pair.delete(argument)
            num_operations += len(argument)
        elif what == "limit":
            pair.limit_rows(1 + argument % pair.table.policy.num_slots)
        elif what == "save_and_load":
            pair.save_and_load()
        elif what == "load_under":
            pair.load_under(changed(pair.table.policy, argument))
        else:
            pair.release(argument % 4)
    return num_operations


@settings(max_examples=60, deadline=None)
@given(
    chosen=st.lists(operations(), max_size=40),
    num_slots=st.integers(1, 12),
    kind=st.sampled_from(KINDS),
)
def test_any_operations_in_any_order_agree_with_the_obvious_table(
    chosen: list[tuple[str, Any]], num_slots: int, kind: str
) -> None:
    run_operations(Pair(exact_policy(num_slots, kind, seed=1)), chosen)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_hundred_thousand_operations_agree_with_the_obvious_table() -> None:
    done: list[int] = []

    @settings(max_examples=2000, deadline=None, database=None)
    @given(
        chosen=st.lists(operations(), min_size=40, max_size=80),
        num_slots=st.integers(1, 20),
        kind=st.sampled_from(KINDS),
    )
    def campaign(chosen: list[tuple[str, Any]], num_slots: int, kind: str) -> None:
        done.append(run_operations(Pair(exact_policy(num_slots, kind, seed=2)), chosen))

    campaign()
    assert sum(done) >= 100_000
