from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import CountSketch
from feature_eviction.count_sketch import NUM_ROWS, RUN, sketch_bytes


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(-(2**63), 2**63 - 1) | st.integers(0, 9), st.integers(1, 300)), max_size=63
    )
)
def test_estimate_never_falls_short_before_the_first_halving(additions: list[tuple[int, int]]) -> None:
    sketch = CountSketch(64)
    keys_N = np.array([key for key, _ in additions], np.int64)
    counts_N = np.array([count for _, count in additions], np.int64)
    estimates_N = sketch.add(keys_N, counts_N, now_s=0)
    true: dict[int, int] = {}
    for (key, count), estimate in zip(additions, estimates_N.tolist(), strict=True):
        true[key] = true.get(key, 0) + count
        assert min(255, true[key]) <= estimate <= 255


def test_estimate_is_mostly_exact_within_a_window() -> None:
    width = 1 << 12
    sketch = CountSketch(width)
    keys_N = np.random.default_rng(2).integers(0, 1 << 50, width - 1)
    estimates_N = sketch.add(keys_N, np.ones(len(keys_N), np.int64), now_s=0)
    assert (estimates_N == 1).mean() > 0.9


def test_counters_are_halved_once_in_width_additions() -> None:
    sketch = CountSketch(8)
    assert sketch.add([5] * 7, [10] * 7, now_s=0).tolist() == [10, 20, 30, 40, 50, 60, 70]
    assert sketch.add([5], [10], now_s=0).tolist() == [80]
    assert sketch.add([5], [1], now_s=0).tolist() == [41]


class ObviousCounts:
    """A dict that is halved whole when a window begins, with room for all ids."""

    def __init__(self, window_s: int) -> None:
        self.window_s, self.window = window_s, 0
        self.counts: dict[int, int] = {}

    def add(self, key: int, count: int, now_s: int) -> int:
        while self.window < now_s // self.window_s:
            self.window += 1
            self.counts = {one: held // 2 for one, held in self.counts.items() if held > 1}
        self.counts[key] = min(255, self.counts.get(key, 0) + count)
        return self.counts[key]


@settings(max_examples=100, deadline=None)
@given(
    additions=st.lists(
        st.tuples(st.integers(0, 9), st.integers(1, 100), st.integers(-3, 30)), min_size=1, max_size=60
    ),
    window_s=st.integers(1, 40),
)
def test_counts_forget_by_windows_of_event_time(additions: list[tuple[int, int, int]], window_s: int) -> None:
    # So wide that ten ids have counters of their own: the estimates are exact.
    sketch, obvious = CountSketch(1 << 14, window_s=window_s), ObviousCounts(window_s)
    now_s = 100
    for key, count, seconds in additions:
        now_s = max(0, now_s + seconds)
        assert sketch.add([key], [count], now_s=now_s).tolist() == [obvious.add(key, count, now_s)]


def test_no_addition_halves_more_than_its_own_counters() -> None:
    sketch = CountSketch(1 << 12, window_s=60)
    sketch.add(np.arange(2000), np.full(2000, 9), now_s=0)
    before_RW = sketch.counters_RW.copy()
    sketch.add([5], [1], now_s=61)
    assert 0 < (sketch.counters_RW != before_RW).sum() <= NUM_ROWS * RUN


def test_endless_stream_of_unseen_ids_does_not_saturate() -> None:
    sketch = CountSketch(256)
    keys_N = np.random.default_rng(4).integers(0, 1 << 50, 50_000)
    estimates_N = sketch.add(keys_N, np.ones(len(keys_N), np.int64), now_s=0)
    assert estimates_N[-5000:].mean() < 1.5


def test_count_saturates_at_255() -> None:
    sketch = CountSketch(16)
    assert sketch.add([1, 1, 1], [200, 200, 2**40], now_s=0).tolist() == [200, 255, 255]


@pytest.mark.parametrize("width", [3, -1])
def test_width_that_is_no_power_of_two_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        CountSketch(width)


def test_window_below_a_second_is_refused() -> None:
    with pytest.raises(ValueError, match="window_s"):
        CountSketch(8, window_s=0)


def test_bytes_used_is_four_a_column_and_four_a_run() -> None:
    assert CountSketch(1 << 10).bytes_used == (4 << 10) + 4 * 16 * 4 == sketch_bytes(1 << 10)
    assert CountSketch(0).bytes_used == 0 == sketch_bytes(0)
