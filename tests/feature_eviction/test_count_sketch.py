from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import CountSketch


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
    estimates_N = sketch.add(keys_N, counts_N)
    true: dict[int, int] = {}
    for (key, count), estimate in zip(additions, estimates_N.tolist(), strict=True):
        true[key] = true.get(key, 0) + count
        assert min(255, true[key]) <= estimate <= 255


def test_estimate_is_mostly_exact_within_a_window() -> None:
    width = 1 << 12
    sketch = CountSketch(width)
    keys_N = np.random.default_rng(2).integers(0, 1 << 50, width - 1)
    estimates_N = sketch.add(keys_N, np.ones(len(keys_N), np.int64))
    assert (estimates_N == 1).mean() > 0.9


def test_counters_are_halved_once_in_width_additions() -> None:
    sketch = CountSketch(8)
    assert sketch.add([5] * 7, [10] * 7).tolist() == [10, 20, 30, 40, 50, 60, 70]
    assert sketch.add([5], [10]).tolist() == [80]
    assert sketch.counters_RW.max() == 40
    assert sketch.add([5], [1]).tolist() == [41]


def test_endless_stream_of_unseen_ids_does_not_saturate() -> None:
    sketch = CountSketch(256)
    keys_N = np.random.default_rng(4).integers(0, 1 << 50, 50_000)
    estimates_N = sketch.add(keys_N, np.ones(len(keys_N), np.int64))
    assert estimates_N[-5000:].mean() < 1.5


def test_count_saturates_at_255() -> None:
    sketch = CountSketch(16)
    assert sketch.add([1, 1, 1], [200, 200, 2**40]).tolist() == [200, 255, 255]


@pytest.mark.parametrize("width", [3, -1])
def test_width_that_is_no_power_of_two_is_refused(width: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        CountSketch(width)


def test_bytes_used_is_four_a_column() -> None:
    assert CountSketch(1 << 10).bytes_used == 4 << 10
    assert CountSketch(0).bytes_used == 0
