from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from feature_eviction import (
    AdmissionConfig,
    ClassPolicy,
    IdTable,
    MapResult,
    ScoreConfig,
    TablePolicy,
    make_keys,
)
from feature_eviction.errors import InFlightError
from feature_eviction.eviction import SHRINK_PASSES
from feature_eviction.id_table import IN_FLIGHT_MAX
from feature_eviction.keys import Int64Array
from feature_eviction.leaving import Changes

Sight = Callable[..., MapResult]
LRU = ScoreConfig(kind="lru")


def exact(num_slots: int, **settings: Any) -> IdTable:
    return IdTable(TablePolicy(num_slots=num_slots, victim_window=num_slots, **settings))


def keys(*ids: int, class_id: int = 0) -> Int64Array:
    return make_keys(np.array(ids, np.int64), class_id=class_id)[0]


def test_slot_of_an_evicted_row_is_announced_as_new_for_its_next_owner(sight: Sight) -> None:
    table = exact(2, score=LRU)
    sight(table, [1, 2], now_s=10)
    result = sight(table, [3], now_s=11)
    assert result.evicted_keys_K.tolist() == keys(1).tolist()
    assert result.new_slots_M.tolist() == result.evicted_slots_K.tolist() == [0]
    assert table.lookup(keys(1, 2, 3)).tolist() == [-1, 1, 0]


def test_slot_in_flight_is_never_evicted(sight: Sight) -> None:
    table = exact(2, score=LRU)
    first = sight(table, [1, 2], now_s=10, release=False)
    refused = sight(table, [3], now_s=11, release=False)
    assert refused.slots_N.tolist() == [-1]
    assert table.counters().refused["no_victim"] == 1
    table.release(first.batch)
    admitted = sight(table, [3], now_s=12, release=False)
    assert admitted.evicted_keys_K.tolist() == keys(1).tolist()


def test_row_expired_but_in_flight_stays_until_its_batch_is_released(sight: Sight) -> None:
    table = exact(2, classes=(ClassPolicy(class_id=1, ttl_s=5),))
    first = sight(table, [1], now_s=10, class_id=1, release=False)
    assert sight(table, [7], now_s=100, release=False).evicted_keys_K.tolist() == []
    table.release(first.batch)
    assert sight(table, [], now_s=101).evicted_keys_K.tolist() == keys(1, class_id=1).tolist()


def test_ids_of_one_call_never_push_out_each_other(sight: Sight) -> None:
    table = exact(3, score=LRU)
    sight(table, [1, 2, 3], now_s=10)
    result = sight(table, [9, 8, 7, 1], now_s=11)
    # 1 is seen later in the same call, so only 2 and 3 may go.
    assert result.evicted_keys_K.tolist() == keys(2, 3).tolist()
    assert result.slots_N.tolist() == [1, 2, -1, 0]


def test_protected_class_never_leaves_for_its_score_but_expires(sight: Sight) -> None:
    table = exact(2, score=LRU, expiry_scan=0, classes=(ClassPolicy(class_id=1, protected=True, ttl_s=50),))
    sight(table, [1], now_s=10, class_id=1)
    sight(table, [2], now_s=20)
    assert sight(table, [3], now_s=30).evicted_keys_K.tolist() == keys(2).tolist()
    assert sight(table, [4], now_s=61).evicted_keys_K.tolist() == keys(1, class_id=1).tolist()
    evicted = table.counters().evicted
    assert {reason: count for reason, count in evicted.items() if count} == {"expired": 1, "score": 1}


def test_expired_row_leaves_before_a_row_of_lower_score(sight: Sight) -> None:
    table = exact(
        3, score=ScoreConfig(kind="lfu"), expiry_scan=0, classes=(ClassPolicy(class_id=1, ttl_s=5),)
    )
    for now_s in range(5):
        sight(table, [1], now_s=now_s, class_id=1)
    sight(table, [2, 3], now_s=9)
    assert sight(table, [4], now_s=10).evicted_keys_K.tolist() == keys(1, class_id=1).tolist()


def test_expiry_begins_after_the_lifetime_not_at_it(sight: Sight) -> None:
    table = exact(2, classes=(ClassPolicy(class_id=1, ttl_s=5),))
    sight(table, [1], now_s=10, class_id=1)
    assert sight(table, [], now_s=15).evicted_keys_K.tolist() == []
    assert sight(table, [], now_s=16).evicted_keys_K.tolist() == keys(1, class_id=1).tolist()


def test_expiry_hand_reaches_every_slot_in_bounded_steps(sight: Sight) -> None:
    table = exact(10, expiry_scan=3, classes=(ClassPolicy(class_id=1, ttl_s=5),))
    sight(table, list(range(10)), now_s=0, class_id=1)
    left = [len(sight(table, [], now_s=100).evicted_keys_K) for _ in range(5)]
    assert max(left) <= 3
    assert sum(left) == 10
    assert table.num_rows == 0


def test_event_time_that_runs_back_neither_expires_nor_ages_a_row(sight: Sight) -> None:
    table = exact(2, score=LRU, classes=(ClassPolicy(class_id=1, ttl_s=5),))
    sight(table, [1], now_s=100, class_id=1)
    result = sight(table, [1], now_s=90, class_id=1)
    assert result.evicted_keys_K.tolist() == []
    assert table.rows().last_seen_s_N.tolist() == [100]
    sight(table, [], now_s=0)
    assert table.num_rows == 1


def test_ties_leave_by_the_lower_slot(sight: Sight) -> None:
    table = exact(4)
    sight(table, [1, 2, 3, 4], now_s=10)
    result = sight(table, [5, 6], now_s=10)
    assert result.evicted_slots_K.tolist() == [0, 1]


def test_positive_sightings_outweigh_others(sight: Sight) -> None:
    table = exact(2, score=ScoreConfig(positive_weight=3.0))
    sight(table, [1], now_s=1000, positives=1)
    sight(table, [2], now_s=1000)
    sight(table, [2], now_s=1000)
    assert sight(table, [3], now_s=1000).evicted_keys_K.tolist() == keys(2).tolist()


def test_id_enters_at_its_min_count_th_sighting(sight: Sight) -> None:
    admission = AdmissionConfig(kind="count", min_count=3)
    table = exact(4, classes=(ClassPolicy(class_id=1, admission=admission),))
    slots = [sight(table, [7], now_s=now_s, class_id=1).slots_N.tolist() for now_s in range(4)]
    assert slots == [[-1], [-1], [0], [0]]
    assert table.counters().classes[1].refused["count"] == 2
    assert sight(table, [8, 8, 8], now_s=9, class_id=1).slots_N.tolist() == [1, 1, 1]


def test_sightings_of_a_window_that_is_over_count_half(sight: Sight) -> None:
    by_count = ClassPolicy(class_id=3, admission=AdmissionConfig(kind="count", min_count=4))
    policy = TablePolicy(num_slots=10, classes=(by_count,), count_window_s=60)
    table = IdTable(policy)
    for now_s in (0, 30, 59):
        assert sight(table, [7], now_s=now_s, class_id=3).slots_N.tolist() == [-1]
    # 3 // 2 + 1 = 2, where a fourth sighting of the same window would have entered.
    table = IdTable.load(policy, table.state())
    for now_s, slot in ((60, -1), (61, -1), (62, 0)):
        assert sight(table, [7], now_s=now_s, class_id=3).slots_N.tolist() == [slot]
    assert table.counters().refused["count"] == 5


def test_probability_admits_its_share_and_repeats_with_its_seed(sight: Sight) -> None:
    classes = (ClassPolicy(class_id=1, admission=AdmissionConfig(kind="probability", probability=0.3)),)

    def admitted(seed: int) -> list[int]:
        table = IdTable(TablePolicy(num_slots=10_000, classes=classes, seed=seed))
        return sight(table, range(10_000), now_s=1, class_id=1).new_keys_M.tolist()

    # Four standard deviations of a binomial share.
    assert abs(len(admitted(1)) / 10_000 - 0.3) < 4 * (0.3 * 0.7 / 10_000) ** 0.5
    assert admitted(1) == admitted(1)
    assert admitted(1) != admitted(2)


def test_seen_rows_do_not_shift_later_draws(sight: Sight) -> None:
    classes = (ClassPolicy(class_id=1, admission=AdmissionConfig(kind="probability", probability=0.5)),)
    policy = TablePolicy(num_slots=200, classes=classes, seed=9)
    plain, busy = IdTable(policy), IdTable(policy)
    for now_s in range(100):
        sight(busy, [5], now_s=now_s)
        expected = sight(plain, [now_s], now_s=now_s, class_id=1).slots_N >= 0
        assert (sight(busy, [now_s], now_s=now_s, class_id=1).slots_N >= 0).tolist() == expected.tolist()


def test_many_shows_at_once_enter_as_likely_as_one_after_another(sight: Sight) -> None:
    classes = (ClassPolicy(class_id=0, admission=AdmissionConfig(kind="probability", probability=0.1)),)
    table = IdTable(TablePolicy(num_slots=10_000, classes=classes))
    keys_N = np.arange(10_000)
    table.map(keys_N, shows_N=np.full(10_000, 5), positives_N=np.zeros(10_000, np.int8), now_s=1)
    assert abs(table.num_rows / 10_000 - (1 - 0.9**5)) < 0.02


def test_repeated_key_gets_one_slot_at_all_its_places(sight: Sight) -> None:
    admission = AdmissionConfig(kind="count", min_count=2)
    table = exact(4, classes=(ClassPolicy(class_id=1, admission=admission),))
    result = sight(table, [3, 4, 3], now_s=5, class_id=1)
    assert result.slots_N.tolist() == [0, -1, 0]
    assert result.new_slots_M.tolist() == [0]


def test_lookup_changes_nothing(sight: Sight) -> None:
    table = exact(2)
    sight(table, [1], now_s=5)
    before = table.state()
    assert table.lookup(keys(1, 2)).tolist() == [0, -1]
    after = table.state()
    assert all(np.array_equal(before[name], after[name], equal_nan=name == "score") for name in before)


def test_keys_of_one_bucket_and_extreme_keys_live_and_leave_like_others(
    colliding_keys: Callable[..., Int64Array],
) -> None:
    extremes = np.array([0, -1, -(2**63), 2**63 - 1], np.int64)
    keys_N = np.concatenate([colliding_keys(24, 60), extremes])
    table = exact(24, score=LRU)
    held: dict[int, int] = {}
    generator = np.random.default_rng(8)
    for now_s in range(200):
        chosen_N = generator.choice(keys_N, 12, replace=False)
        result = table.map(chosen_N, shows_N=np.ones(12, int), positives_N=np.zeros(12, int), now_s=now_s)
        table.release(result.batch)
        for key in result.evicted_keys_K.tolist():
            del held[key]
        held |= dict(zip(result.new_keys_M.tolist(), result.new_slots_M.tolist(), strict=True))
        assert len(set(held.values())) == len(held)
        assert table.lookup(keys_N).tolist() == [held.get(key, -1) for key in keys_N.tolist()]
    assert table.counters().evicted["score"] > 100


def test_rank_error_of_victims_is_within_the_stated_bound() -> None:
    num_slots, num_victims, num_read = 65_536, 16, 16 * 64
    table = IdTable(TablePolicy(num_slots=num_slots, score=ScoreConfig(kind="lfu")))
    generator = np.random.default_rng(31)
    shows_N = generator.permutation(num_slots) + 1
    first = table.map(np.arange(num_slots), shows_N=shows_N, positives_N=np.zeros(num_slots, int), now_s=0)
    table.release(first.batch)
    ranks: list[float] = []
    worst_of_passes: list[float] = []
    held_N = np.sort(shows_N)
    for new_id in range(0, 3200, num_victims):
        keys_N = np.arange(10**6 + new_id, 10**6 + new_id + num_victims)
        result = table.map(
            keys_N, shows_N=np.full(num_victims, 10**6), positives_N=np.zeros(num_victims, int), now_s=1
        )
        table.release(result.batch)
        assert len(result.evicted_keys_K) == num_victims
        victims_K = shows_N[result.evicted_keys_K]
        ranks_K = np.searchsorted(held_N, victims_K) / num_slots
        ranks += ranks_K.tolist()
        worst_of_passes.append(float(ranks_K.max()))
        held_N = np.sort(np.append(np.setdiff1d(held_N, victims_K), np.full(num_victims, 10**6)))
    # Of k victims out of n rows read, the highest stands at k / (n + 1) on average; half of that for any.
    assert np.mean(ranks) < 1.1 * num_victims / num_read / 2 + 0.001
    assert np.mean(worst_of_passes) < 1.1 * num_victims / num_read
    assert np.quantile(worst_of_passes, 0.99) < 0.032


def test_full_table_frees_down_to_its_low_water_mark() -> None:
    table = IdTable(TablePolicy(num_slots=6400, score=LRU, low_water_slots=9))
    first = table.map(np.arange(6400), shows_N=np.ones(6400, int), positives_N=np.zeros(6400, int), now_s=1)
    table.release(first.batch)
    left = []
    for new_id in range(20):
        result = table.map([10_000 + new_id], shows_N=[1], positives_N=[0], now_s=2)
        left.append(len(result.evicted_keys_K))
    assert left == [10, *[0] * 9] * 2


def test_lowered_row_limit_is_reached_in_bounded_steps_and_never_passed_again(sight: Sight) -> None:
    table = IdTable(TablePolicy(num_slots=1000, score=LRU, low_water_slots=4))
    sight(table, range(1000), now_s=1)
    table.limit_rows(800)
    held = []
    for now_s in range(2, 12):
        before = table.num_rows
        sight(table, [5000 + now_s], now_s=now_s)
        held.append(table.num_rows)
        assert before - table.num_rows <= SHRINK_PASSES * 5 + 5
    assert held[-1] <= 800
    table.limit_rows(1000)
    sight(table, range(7000, 8000), now_s=20)
    assert table.num_rows == 1000
    for limit in (0, 1001):
        with pytest.raises(ValueError, match=r"limit_rows: 1\.\.1000"):
            table.limit_rows(limit)


class Guarded:
    """Has every call write its evictions into arrays that go on, and sees where they were written."""

    UNTOUCHED = -(2**62)
    BEYOND = 20_000

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._room_for_changes = IdTable._room_for_changes
        self._columns: list[tuple[Int64Array, int]] = []
        monkeypatch.setattr(IdTable, "_room_for_changes", lambda *arguments: self._with_more(*arguments))

    def _with_more(self, table: IdTable, num_keys: int) -> Changes:
        changes = self._room_for_changes(table, num_keys)
        room = len(changes.evicted_keys_K)
        self._columns = [(np.full(room + self.BEYOND, self.UNTOUCHED), room) for _ in range(2)]
        keys_K, slots_K = (whole[:room] for whole, room in self._columns)
        return changes._replace(evicted_keys_K=keys_K, evicted_slots_K=slots_K)

    def check(self) -> None:
        for whole, room in self._columns:
            beyond = np.flatnonzero(whole[room:] != self.UNTOUCHED)
            assert not len(beyond), f"{len(beyond)} evictions written beyond the room for {room}"


def test_each_id_admitted_above_a_lowered_limit_costs_one_row(
    sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = IdTable(TablePolicy(num_slots=10_000, score=LRU))
    sight(table, range(10_000), now_s=1)
    table.limit_rows(100)
    guarded = Guarded(monkeypatch)
    result = sight(table, range(20_000, 20_300), now_s=2)
    guarded.check()
    assert len(result.new_keys_M) == 300
    assert len(result.evicted_keys_K) == SHRINK_PASSES * table.policy.victims_at_once + 300
    assert table.counters().evicted["score"] == len(result.evicted_keys_K)


@pytest.mark.parametrize("seed", range(5))
def test_no_call_writes_beyond_its_room_whatever_the_limits(
    seed: int, sight: Sight, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits and quotas go up and down, batches stay in flight, passes of several rows and of none."""
    generator = np.random.default_rng(seed)
    classes = (ClassPolicy(class_id=1, max_rows=900), ClassPolicy(class_id=2, max_rows=900, ttl_s=40))
    policy = TablePolicy(num_slots=1000, score=LRU, classes=classes, expiry_scan=int(generator.integers(5)))
    assert policy.victims_at_once == 15
    guarded = Guarded(monkeypatch)
    table = IdTable(policy)
    for now_s in range(120):
        class_id, num_ids = int(generator.integers(3)), int(generator.choice([1, 10, 400]))
        before = sum(table.counters().evicted.values())
        ids = generator.integers(0, 3000, num_ids).tolist()
        result = sight(table, ids, now_s=now_s, class_id=class_id, release=False)
        guarded.check()
        assert sum(table.counters().evicted.values()) - before == len(result.evicted_keys_K)
        table.release(result.batch - int(generator.integers(3)))
        if now_s % 10 == 0:
            table.limit_rows(int(generator.integers(1, 1001)))
            quotas = [int(quota) for quota in generator.integers(1, 1000, 2)]
            changed = [replace(one, max_rows=quota) for one, quota in zip(classes, quotas, strict=True)]
            table = IdTable.load(replace(policy, classes=tuple(changed)), table.state())


def test_class_at_its_quota_makes_room_among_its_own(sight: Sight) -> None:
    table = exact(10, score=LRU, classes=(ClassPolicy(class_id=1, max_rows=2),))
    sight(table, [1, 2], now_s=20, class_id=1)
    sight(table, [7], now_s=10)
    result = sight(table, [3], now_s=30, class_id=1)
    assert result.evicted_keys_K.tolist() == keys(1, class_id=1).tolist()
    refused = sight(table, [4, 5, 6], now_s=31, class_id=1, release=False)
    assert (refused.slots_N >= 0).tolist() == [True, True, False]
    counters = table.counters()
    assert counters.classes[1].rows == 2
    assert counters.classes[1].refused["quota"] == 1
    assert counters.classes[1].evicted["quota"] == 3
    assert table.lookup(keys(7)).tolist() != [-1]


def test_protected_class_at_its_quota_takes_no_more(sight: Sight) -> None:
    table = exact(10, classes=(ClassPolicy(class_id=1, max_rows=2, protected=True),))
    result = sight(table, [1, 2, 3], now_s=20, class_id=1)
    assert (result.slots_N >= 0).tolist() == [True, True, False]
    assert sight(table, [3], now_s=21, class_id=1).slots_N.tolist() == [-1]
    assert table.counters().refused["quota"] == 2


def test_protected_rows_beyond_their_quota_stay_where_tables_are_joined() -> None:
    """As on fewer ranks, each of which had the quota for itself."""
    classes = (ClassPolicy(class_id=1, max_rows=2, protected=True), ClassPolicy(class_id=2, max_rows=2))
    table = exact(10, classes=classes)
    ids = np.concatenate([keys(*range(8), class_id=1), keys(*range(4), class_id=2)])
    slots_N = table.insert_rows(
        ids,
        scores_N=np.ones(len(ids), np.float32),
        last_seen_s_N=np.ones(len(ids), np.int64),
        updates_N=np.ones(len(ids), np.uint32),
    )
    assert (slots_N >= 0).tolist() == [True] * 8 + [True, True, False, False]
    counters = table.counters().classes
    assert (counters[1].evicted["quota"], counters[2].evicted["quota"]) == (0, 2)


def test_row_without_its_needed_updates_leaves_when_its_first_lifetime_ends(sight: Sight) -> None:
    table = exact(10, classes=(ClassPolicy(class_id=1, ttl_s=10, min_updates=3),))
    sight(table, [1, 2, 2, 2], now_s=100, class_id=1)
    sight(table, [1, 2], now_s=109, class_id=1)
    assert sight(table, [], now_s=110).evicted_keys_K.tolist() == []
    # Seen two seconds ago, but only twice within its lifetime.
    assert sight(table, [2], now_s=111, class_id=1).evicted_keys_K.tolist() == keys(1, class_id=1).tolist()
    assert table.counters().evicted["few_updates"] == 1
    assert sight(table, [], now_s=121).evicted_keys_K.tolist() == []
    assert sight(table, [], now_s=122).evicted_keys_K.tolist() == keys(2, class_id=1).tolist()


@pytest.mark.parametrize(
    ("shortest_s", "longest_s"),
    [(3, 3), (600, 86_400), pytest.param(60, 90 * 86_400, marks=pytest.mark.slow)],
)
def test_every_row_leaves_within_the_stated_resolution_of_its_end(
    shortest_s: int, longest_s: int, sight: Sight
) -> None:
    classes = (ClassPolicy(class_id=1, ttl_s=shortest_s), ClassPolicy(class_id=2, ttl_s=longest_s))
    table = IdTable(TablePolicy(num_slots=500, classes=classes))
    generator = np.random.default_rng(4)
    last_seen_s: dict[int, int] = {}
    lateness: list[int] = []
    now_s = 1_700_000_000
    stop_s = now_s + 2 * longest_s + 10
    while now_s < stop_s or last_seen_s:
        class_id = int(generator.integers(1, 3))
        ids = generator.integers(0, 200, 3).tolist() if now_s < stop_s else []
        result = sight(table, ids, now_s=now_s, class_id=class_id)
        for key in result.evicted_keys_K.tolist():
            lifetime_s = shortest_s if key >> 52 == 1 else longest_s
            lateness.append(now_s - (last_seen_s.pop(key) + lifetime_s + 1))
        last_seen_s |= dict.fromkeys(keys(*ids, class_id=class_id).tolist(), now_s)
        now_s += table.expiry_resolution_s
    assert len(lateness) > 40
    assert min(lateness) >= 0
    # Calls come once a resolution, so a row can wait for one more of them.
    assert max(lateness) < 2 * table.expiry_resolution_s
    assert table.counters().evicted["score"] == 0


def test_expired_rows_leave_before_any_row_leaves_for_its_score() -> None:
    classes = (ClassPolicy(class_id=1, ttl_s=50),)
    table = IdTable(TablePolicy(num_slots=2000, classes=classes, expiry_scan=0))
    ones = np.ones(1000, int)
    dying, living = keys(*range(1000), class_id=1), keys(*range(1000))
    for keys_N in (dying, living):
        table.release(table.map(keys_N, shows_N=ones, positives_N=ones, now_s=10).batch)
    result = table.map(keys(*range(5000, 6000)), shows_N=ones, positives_N=ones, now_s=61)
    table.release(result.batch)
    assert sorted(result.evicted_keys_K.tolist()) == dying.tolist()
    assert table.counters().evicted["score"] == 0


def test_expiry_forgives_a_clock_that_leaps_ahead_and_back(sight: Sight) -> None:
    table = exact(10, classes=(ClassPolicy(class_id=1, ttl_s=60),))
    sight(table, [1], now_s=2**32 - 1, class_id=1)
    sight(table, [2], now_s=1_700_000_000, class_id=1)
    for now_s in range(1_700_000_001, 1_700_000_200):
        sight(table, [], now_s=now_s)
    assert table.lookup(keys(1, 2, class_id=1)).tolist() != [-1, -1]
    assert table.lookup(keys(2, class_id=1)).tolist() == [-1]


def test_deleted_key_is_gone_and_a_row_in_flight_stays(sight: Sight) -> None:
    table = exact(4, classes=(ClassPolicy(class_id=0, ttl_s=9),))
    sight(table, [1, 2], now_s=5)
    flying = sight(table, [2], now_s=6, release=False)
    assert table.delete(keys(1, 2, 3), now_s=7).slots_N.tolist() == [0, -1, -1]
    table.release(flying.batch)
    assert table.delete(keys(2), now_s=7).slots_N.tolist() == [1]
    assert table.num_rows == 0
    assert table.counters().evicted["deleted"] == 2


def test_why_knows_what_is_held_and_why_the_rest_left(sight: Sight) -> None:
    table = exact(2, score=LRU, evictions_remembered=2, classes=(ClassPolicy(class_id=1, ttl_s=5),))
    sight(table, [1], now_s=10, class_id=1)
    sight(table, [2], now_s=12)
    held = table.why(int(keys(2)[0]))
    assert (held.state, held.slot, held.last_seen_s, held.updates, held.in_flight) == (
        "held",
        1,
        12,
        1,
        False,
    )
    assert held.left_because is None
    sight(table, [3], now_s=16, release=False)
    expired = table.why(int(keys(1, class_id=1)[0]))
    assert (expired.state, expired.left_because, expired.left_at_s) == ("absent", "expired", 16)
    assert table.why(int(keys(3)[0])).in_flight
    sight(table, [4], now_s=17)
    assert str(table.why(2)) == "key 2 (class 0): absent; left at 17 for score, score -0"
    sight(table, [2], now_s=18)
    again = table.why(2)
    assert (again.state, again.left_because, again.left_at_s) == ("held", "score", 17)
    # Two evictions are remembered: that of key 1 is the third last.
    assert table.counters().evicted["score"] == 3 - 1
    sight(table, [9], now_s=19)
    assert table.why(int(keys(1, class_id=1)[0])).left_because is None


def test_batches_never_released_are_refused_rather_than_gathered(sight: Sight) -> None:
    table = exact(1)
    for now_s in range(IN_FLIGHT_MAX):
        sight(table, [1], now_s=now_s, release=False)
    with pytest.raises(InFlightError, match="Call release"):
        sight(table, [1], now_s=999, release=False)
    table.release(IN_FLIGHT_MAX)
    assert sight(table, [1], now_s=999).slots_N.tolist() == [0]


def test_full_array_of_slots_given_out_may_be_changed_by_the_caller(sight: Sight) -> None:
    table = exact(2, score=LRU)
    first = sight(table, [1, 2], now_s=1, release=False)
    first.slots_N[:] = 0
    table.release(first.batch)
    assert len(sight(table, [3, 4], now_s=2).evicted_keys_K) == 2


@settings(max_examples=40, deadline=None)
@given(cuts=st.sets(st.integers(1, 399)), kind=st.sampled_from(["kraken", "lru", "lfu"]))
def test_split_of_a_stream_into_calls_changes_nothing_while_there_is_room(cuts: set[int], kind: str) -> None:
    classes = (
        ClassPolicy(class_id=1, ttl_s=30, admission=AdmissionConfig(kind="probability", probability=0.4)),
        ClassPolicy(class_id=2, ttl_s=7, admission=AdmissionConfig(kind="count", min_count=2)),
    )
    policy = TablePolicy(
        num_slots=400, score=ScoreConfig(kind=kind), classes=classes, count_sketch_width=64, expiry_scan=4096
    )
    generator = np.random.default_rng(6)
    ids_N = generator.integers(0, 60, 400)
    class_N = generator.integers(0, 3, 400)
    keys_N = np.array([int(keys(i, class_id=c)[0]) for i, c in zip(ids_N, class_N, strict=True)])
    # Admitted before refused ids, as in any call: keys stand once in each second.
    now_N = np.arange(400) // 20

    def fed(cuts: set[int]) -> IdTable:
        table = IdTable(policy)
        edges = sorted({0, 400, *range(0, 400, 20), *cuts})
        for start, stop in itertools.pairwise(edges):
            piece = keys_N[start:stop]
            table.map(
                piece,
                shows_N=np.ones(len(piece), int),
                positives_N=np.zeros(len(piece), int),
                now_s=1000 + int(now_N[start]),
            )
            if stop % 20 == 0:
                table.release(table._batch)
        return table

    whole, split = fed(set()).state(), fed(cuts).state()
    for name in whole.keys() - {"batches"}:
        assert whole[name].tobytes() == split[name].tobytes(), name


def test_one_row_that_may_leave_is_found_outside_the_window(sight: Sight) -> None:
    classes = (ClassPolicy(class_id=1, protected=True),)
    table = IdTable(TablePolicy(num_slots=100, victim_window=4, classes=classes))
    sight(table, range(90), now_s=1, class_id=1)
    sight(table, [500], now_s=1)
    sight(table, range(200, 209), now_s=1, class_id=1)
    result = sight(table, [300, 301], now_s=2, class_id=1)
    assert result.evicted_keys_K.tolist() == keys(500).tolist()
    assert result.slots_N.tolist() == [90, -1]
    assert table.counters().classes[1].refused["no_victim"] == 1
    assert sight(table, [302], now_s=3, class_id=1).slots_N.tolist() == [-1]
    assert table.counters().classes[1].refused["no_victim"] == 2


def test_empty_call_is_normal(sight: Sight) -> None:
    table = exact(1)
    result = sight(table, [], now_s=0)
    assert [part.tolist() for part in result[:5]] == [[], [], [], [], []]
    assert result.batch == 1


def test_rows_of_chosen_slots_come_in_the_order_asked(sight: Sight) -> None:
    table = exact(3, score=LRU)
    sight(table, [1, 2], now_s=5)
    sight(table, [2], now_s=9)
    rows = table.rows([1, 0])
    assert rows.keys_N.tolist() == keys(2, 1).tolist()
    assert rows.updates_N.tolist() == [2, 1]
    assert rows.last_seen_s_N.tolist() == [9, 5]
    for slot in (2, -1, 3):
        with pytest.raises(ValueError, match="hold a row"):
            table.rows([slot])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"keys_N": [[1]]}, "keys_N must be int64"),
        ({"shows_N": [1]}, r"must be \[2\]"),
        ({"shows_N": [1, 0]}, "position 1: 1 <= shows"),
        ({"positives_N": [2, 0]}, "position 0: 1 <= shows"),
        ({"positives_N": [0, -1]}, "position 1: 1 <= shows"),
        ({"now_s": -1}, "now_s must be unix seconds"),
        ({"now_s": 2**32}, "now_s must be unix seconds"),
    ],
)
def test_wrong_call_is_named_and_changes_nothing(arguments: dict[str, Any], message: str) -> None:
    table = exact(4)
    good: dict[str, Any] = {"keys_N": [1, 2], "shows_N": [1, 1], "positives_N": [0, 0], "now_s": 5}
    with pytest.raises(ValueError, match=message):
        table.map(**(good | arguments))
    assert table.num_rows == 0
    assert table.map(**good).batch == 1


def test_release_of_a_batch_not_yet_mapped_is_refused(sight: Sight) -> None:
    table = exact(1)
    sight(table, [1], now_s=0)
    with pytest.raises(ValueError, match="batch 2 was not mapped yet"):
        table.release(2)
    table.release(0)  # older than what is released: nothing to do
    assert sight(table, [2], now_s=1).slots_N.tolist() == [0]
