"""The ledger counts every impression, whatever the order, the batches and the number of ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.ledger import PENDING_MIN, Ledger, merge_counts

IDS = st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 20), max_size=60)


def as_ids(ids: list[int]) -> npt.NDArray[np.uint64]:
    return np.array(ids, np.uint64)


def counts_of(*ledgers: Ledger) -> Counter[int]:
    """Over all ranks."""
    total: Counter[int] = Counter()
    for ledger in ledgers:
        columns = ledger.columns()
        assert (np.diff(columns["ids"].astype(object)) > 0).all(), "ids are ascending and distinct"
        total.update(dict(zip(columns["ids"].tolist(), columns["counts"].tolist(), strict=True)))
    return total


@given(batches=st.lists(IDS, max_size=8))
@settings(max_examples=60, deadline=None)
def test_the_ledger_counts_like_a_counter(batches: list[list[int]]) -> None:
    ledger, expected = Ledger(), Counter[int]()
    for batch in batches:
        ledger.add(as_ids(batch))
        expected.update(batch)
    assert ledger.num_applied == sum(expected.values())
    assert counts_of(ledger) == expected


@given(by_rank=st.lists(IDS, min_size=1, max_size=4), world_size=st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_every_count_survives_another_number_of_ranks_once(by_rank: list[list[int]], world_size: int) -> None:
    saved = []
    for ids in by_rank:
        ledger = Ledger()
        ledger.add(as_ids(ids))
        saved.append(ledger.columns())
    restored = [Ledger() for _ in range(world_size)]
    for rank, ledger in enumerate(restored):
        ledger.add(as_ids([7, 7, 8]))  # forgotten: a restore replaces
        ledger.restore(saved, rank=rank, world_size=world_size)
    assert counts_of(*restored) == sum((Counter(ids) for ids in by_rank), Counter())


def test_a_restored_ledger_counts_on() -> None:
    first = Ledger()
    first.add(as_ids([1, 2, 3]))
    second = Ledger()
    second.restore([first.columns()], rank=0, world_size=1)
    second.add(as_ids([3, 4]))
    assert counts_of(second) == {1: 1, 2: 1, 3: 2, 4: 1}
    assert counts_of(first) == {1: 1, 2: 1, 3: 1}, "the saved columns are not shared"


def test_what_waits_is_bounded_by_half_of_what_is_merged() -> None:
    ledger = Ledger()
    ids_N = np.arange(40 * PENDING_MIN, dtype=np.uint64)
    most = 0
    for start in range(0, len(ids_N), 512):
        ledger.add(ids_N[start : start + 512])
        most = max(most, ledger._num_pending)
    assert most <= max(PENDING_MIN, len(ledger._ids_K) // 2)
    assert ledger.num_applied == len(ids_N)


def test_the_callers_array_may_change_afterwards() -> None:
    ledger = Ledger()
    ids_N = as_ids([1, 2])
    ledger.add(ids_N)
    ids_N[:] = 9
    assert counts_of(ledger) == {1: 1, 2: 1}


def test_nothing_merges_to_nothing() -> None:
    ids_K, counts_K = merge_counts([])
    assert (len(ids_K), len(counts_K)) == (0, 0)
    ledger = Ledger()
    ledger.add(as_ids([]))
    assert ledger.num_applied == 0
    assert counts_of(ledger) == {}


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"ids": np.zeros(2, np.uint64)},
        {"ids": np.zeros(2, np.uint64), "counts": np.zeros(1, np.uint32)},
        {"ids": np.zeros(2, np.int64), "counts": np.zeros(2, np.uint32)},
    ],
)
def test_columns_of_another_shape_are_refused_by_name(columns: dict[str, npt.NDArray[np.generic]]) -> None:
    good = {"ids": np.zeros(0, np.uint64), "counts": np.zeros(0, np.uint32)}
    with pytest.raises(ValueError, match="ledger of rank 1: expected ids"):
        Ledger().restore([good, columns], rank=0, world_size=2)


def test_a_rank_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"0\.\.1, found 2"):
        Ledger().restore([], rank=2, world_size=2)
