"""The join of what was published with what the replicas made visible, against numbers done by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from param_server.client import Version
from trainer.run.freshness import FreshnessJoin, Histogram
from trainer.run.status import VersionTrace


def trace(sequence: int, produced_ms: list[tuple[int, int]], *, generation: int = 1) -> VersionTrace:
    return VersionTrace(
        generation=generation,
        sequence=sequence,
        kind="delta",
        num_rows=1,
        num_deletes=0,
        num_bytes=1,
        taken_ms=0,
        committed_ms=0,
        produced_ms=produced_ms,
    )


def test_freshness_is_what_one_computes_by_hand() -> None:
    join = FreshnessJoin(["a", "b"], steady_from_ms=1_500)
    join.add_traces([trace(1, [(1_000, 3), (1_200, 1)]), trace(2, [(2_000, 4)])])
    join.add_applied("a", [(Version(1, 1), 1_300), (Version(1, 2), 2_700)])
    join.add_applied("b", [(Version(1, 1), 1_400), (Version(1, 2), 2_100)])
    # a: 300 x3, 100 x1, 700 x4; b: 400 x3, 200 x1, 100 x4
    assert join.overall.shares() == [
        (100, 5 / 16),
        (200, 6 / 16),
        (300, 9 / 16),
        (400, 12 / 16),
        (700, 16 / 16),
    ]
    assert (join.overall.quantile(0.5), join.overall.quantile(0.99)) == (300, 700)
    assert join.steady.shares() == [(100, 0.5), (700, 1.0)]


def test_version_skipped_by_a_replica_is_visible_with_the_next_one() -> None:
    join = FreshnessJoin(["a"], steady_from_ms=0)
    join.add_traces([trace(1, [(100, 1)]), trace(2, [(200, 1)]), trace(3, [(300, 1)])])
    join.add_applied("a", [(Version(1, 3), 1_000)])
    assert join.overall.shares() == [(700, 1 / 3), (800, 2 / 3), (900, 1.0)]


def test_impression_is_counted_once_however_often_a_replica_is_asked() -> None:
    join = FreshnessJoin(["a"], steady_from_ms=0)
    applied = [(Version(1, 1), 1_000)]
    join.add_applied("a", applied)  # the replica can be faster than the trace
    join.add_traces([trace(1, [(900, 5)]), trace(2, [(950, 5)])])
    for _ in range(3):
        join.add_applied("a", applied)
    assert join.overall.shares() == [(100, 1.0)]
    assert join.overall.total == 5


def test_later_generation_makes_the_versions_before_it_visible() -> None:
    join = FreshnessJoin(["a"], steady_from_ms=0)
    join.add_traces([trace(9, [(100, 1)]), trace(1, [(200, 1)], generation=2)])
    join.add_applied("a", [(Version(2, 1), 300)])
    assert join.overall.shares() == [(100, 0.5), (200, 1.0)]


def test_what_a_replica_has_forgotten_is_counted_and_not_guessed() -> None:
    join = FreshnessJoin(["a"], steady_from_ms=0)
    join.add_traces([trace(1, [(100, 1)]), trace(5, [(500, 1)])])
    join.add_applied("a", [(Version(1, 4), 10_000), (Version(1, 5), 600)], is_truncated=True)
    assert join.num_unmatched == 1
    assert join.overall.shares() == [(100, 1.0)]


def test_clock_running_ahead_counts_as_zero() -> None:
    join = FreshnessJoin(["a"], steady_from_ms=0)
    join.add_traces([trace(1, [(5_000, 1)])])
    join.add_applied("a", [(Version(1, 1), 4_000)])
    assert join.overall.shares() == [(0, 1.0)]


def test_waiting_traces_are_bounded_and_their_loss_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.run.freshness._PENDING_MAX", 3)
    join = FreshnessJoin(["a"], steady_from_ms=0)
    join.add_traces(trace(sequence, [(0, 1)]) for sequence in range(1, 6))
    join.add_applied("a", [(Version(1, 5), 10)])
    assert (join.num_unmatched, join.overall.total) == (2, 3)


@given(
    st.lists(st.tuples(st.integers(0, 16_383), st.integers(1, 5)), min_size=1, max_size=60),
    st.floats(0.01, 1.0),
)
def test_quantile_equals_the_sorted_expansion(values: list[tuple[int, int]], share: float) -> None:
    histogram = Histogram()
    for value, weight in values:
        histogram.add(value, weight)
    expanded = sorted(value for value, weight in values for _ in range(weight))
    assert histogram.quantile(share) == np.quantile(expanded, share, method="inverted_cdf")


def test_long_times_keep_four_digits_in_bounded_memory() -> None:
    histogram = Histogram()
    for value in range(0, 100_000_000, 997):
        histogram.add(value, 1)
    assert len(histogram.shares()) < 16_384 + 8_192 * 13
    assert histogram.quantile(0.5) == pytest.approx(50_000_000, rel=2e-4)


def test_empty_histogram_has_no_quantile() -> None:
    assert Histogram().quantile(0.5) is None
