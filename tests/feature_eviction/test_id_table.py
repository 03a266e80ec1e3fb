from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from feature_eviction import (
    AdmissionConfig,
    ClassPolicy,
    IdTable,
    MapResult,
    ScoreConfig,
    TablePolicy,
    make_keys,
)
from feature_eviction.keys import Int64Array

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
    assert table.counters().evicted == {"expired": 1, "score": 1}


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


def test_windowed_victims_are_among_the_lowest() -> None:
    num_slots = 4096
    table = IdTable(TablePolicy(num_slots=num_slots, victim_window=64, score=ScoreConfig(kind="lfu")))
    generator = np.random.default_rng(31)
    shows_N = generator.permutation(num_slots) + 1
    first = table.map(np.arange(num_slots), shows_N=shows_N, positives_N=np.zeros(num_slots, int), now_s=0)
    table.release(first.batch)
    quantiles = []
    for new_id in range(500):
        updates_N = table.rows().updates_N
        result = table.map([10_000 + new_id], shows_N=[5000], positives_N=[0], now_s=1)
        table.release(result.batch)
        quantiles.append(float((updates_N < updates_N[result.evicted_slots_K[0]]).mean()))
    assert np.median(quantiles) < 0.05
    assert max(quantiles) < 0.25


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
