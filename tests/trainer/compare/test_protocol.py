"""Who is counted and which impressions train, choose and judge."""

from __future__ import annotations

import numpy as np
import pytest

from trainer.compare.protocol import (
    DAY_MS,
    HOUR_MS,
    TEST,
    TRAIN,
    UNUSED,
    VALIDATION,
    Protocol,
    check_labels,
    kept,
    slices,
)
from trainer.errors import DataError


def _kept_by_hand(users: list[int], items: list[int], least: int) -> list[bool]:
    alive = [True] * len(users)
    while True:
        num_user = {u: sum(a and v == u for a, v in zip(alive, users, strict=True)) for u in users}
        num_item = {i: sum(a and v == i for a, v in zip(alive, items, strict=True)) for i in items}
        now = [
            a and num_user[u] >= least and num_item[i] >= least
            for a, u, i in zip(alive, users, items, strict=True)
        ]
        if now == alive:
            return alive
        alive = now


@pytest.mark.parametrize("seed", range(5))
def test_filter_goes_on_until_everybody_left_has_enough(seed):
    rng = np.random.default_rng(seed)
    users, items = rng.zipf(1.4, 300) % 40, rng.zipf(1.3, 300) % 60
    found = kept(users, items, least=4)
    assert found.tolist() == _kept_by_hand(users.tolist(), items.tolist(), 4)
    assert 0 < found.sum() < 300
    for ids in (users[found], items[found]):
        assert np.unique(ids, return_counts=True)[1].min() >= 4


def test_one_pass_of_the_filter_would_not_do():
    """User 1 has two impressions, one of them with an item that leaves: then it has one."""
    users = np.array([1, 1, 2, 2, 3, 3])
    items = np.array([7, 8, 8, 9, 9, 9])
    assert kept(users, items, least=2).tolist() == [False, False, False, False, True, True]


def test_filter_of_nothing_is_nothing():
    assert kept(np.zeros(0, np.int64), np.zeros(0, np.int64), least=10).tolist() == []


def test_twelve_days_split_into_ten_one_and_one():
    event_ms = np.arange(12 * 24) * HOUR_MS + 19_000 * DAY_MS
    found = slices(event_ms, Protocol(), where="stream")
    assert found.tolist() == [TRAIN] * 240 + [VALIDATION] * 24 + [TEST] * 24


def test_days_before_the_training_days_stay_unused():
    event_ms = np.arange(14) * DAY_MS
    found = slices(event_ms, Protocol(), where="stream")
    assert found.tolist() == [UNUSED] * 2 + [TRAIN] * 10 + [VALIDATION, TEST]


def test_days_begin_where_the_time_zone_says():
    event_ms = np.array([0, 1, 2, 2]) * DAY_MS + np.array([1, 1, 15, 17]) * HOUR_MS
    assert slices(event_ms, Protocol(), where="log").tolist() == [TRAIN, VALIDATION, TEST, TEST]
    shifted = slices(event_ms, Protocol(time_zone_h=8), where="log")
    assert shifted.tolist() == [TRAIN, TRAIN, VALIDATION, TEST]


def test_a_slice_without_impressions_is_refused_by_name():
    with pytest.raises(DataError, match=r"log: no impressions for train: the split needs 1 \+ 1 last days"):
        slices(np.array([0, 1]) * DAY_MS, Protocol(), where="log")
    with pytest.raises(DataError, match="no impressions for train, validation, test"):
        slices(np.zeros(0, np.int64), Protocol(), where="log")


def test_labels_outside_0_and_1_are_refused_with_task_and_value():
    labels = np.array([[0.0, 1.0], [1.0, 0.5], [1.0, 2.0]], np.float32)
    known = np.ones((3, 2), np.bool_)
    with pytest.raises(DataError, match=r"log: label 'like' must be 0 or 1, found 0\.5 \(2 of 3 impressions"):
        check_labels(labels, known, tasks=["click", "like"], where="log")
    known[1:, 1] = False
    check_labels(labels, known, tasks=["click", "like"], where="log")


def test_nan_is_no_label():
    with pytest.raises(DataError, match="label 'click' must be 0 or 1, found nan"):
        check_labels(np.array([[np.nan]]), np.ones((1, 1), np.bool_), tasks=["click"], where="log")


@pytest.mark.parametrize("name", ["train_days", "validation_days", "test_days", "interactions_min"])
def test_counts_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, found 0"):
        Protocol(**{name: 0})
