from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import class_of, deduplicate, make_keys, owner_of
from feature_eviction.cells import empty_cells, home_cell

INT64 = st.integers(-(2**63), 2**63 - 1)
EXTREMES = np.array([0, -1, 1, -(2**63), 2**63 - 1, 2**52 - 1, 2**52], np.int64)


@settings(deadline=None)
@given(st.lists(st.integers(0, 2**52 - 1)), st.integers(0, 4095))
def test_key_holds_class_and_id_in_separate_bits(ids: list[int], class_id: int) -> None:
    keys_N, num_folded = make_keys(np.array(ids, np.int64), class_id=class_id)
    assert num_folded == 0
    unsigned = keys_N.view(np.uint64).tolist()
    assert unsigned == [class_id << 52 | one for one in ids]
    assert class_of(keys_N).tolist() == [class_id] * len(ids)


def test_id_wider_than_52_bits_is_folded_and_counted() -> None:
    keys_N, num_folded = make_keys(EXTREMES, class_id=7)
    assert num_folded == 4  # -1, min, max and 2^52
    assert class_of(keys_N).tolist() == [7] * len(EXTREMES)
    assert len(set(keys_N.tolist())) == len(EXTREMES)
    assert make_keys(EXTREMES, class_id=7)[0].tolist() == keys_N.tolist()


def test_folding_rule_is_the_stated_mix() -> None:
    """SplitMix64's finaliser, written in Python's unbounded integers."""
    mask = 2**64 - 1
    mixed = -5 & mask
    mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 & mask
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB & mask
    mixed ^= mixed >> 31
    assert make_keys([-5], class_id=0)[0].tolist() == [mixed >> 12]


@pytest.mark.parametrize("class_id", [-1, 4096])
def test_class_outside_12_bits_is_refused(class_id: int) -> None:
    with pytest.raises(ValueError, match=r"class_id must be in 0\.\.4095"):
        make_keys([1], class_id=class_id)


@pytest.mark.parametrize("ids", [[1.5], [[1]], np.array([2**63], np.uint64), 3])
def test_ids_of_another_type_are_refused(ids: object) -> None:
    with pytest.raises(ValueError, match="ids_N must be int64"):
        make_keys(ids, class_id=0)  # type: ignore[arg-type]


@settings(deadline=None)
@given(st.lists(INT64), st.integers(1, 1000))
def test_owner_depends_on_the_key_alone(keys: list[int], num_owners: int) -> None:
    keys_N = np.array(keys, np.int64)
    owners_N = owner_of(keys_N, num_owners=num_owners)
    assert ((owners_N >= 0) & (owners_N < num_owners)).all()
    assert owner_of(keys_N[::-1], num_owners=num_owners).tolist() == owners_N[::-1].tolist()


def test_owners_get_even_shares_that_fill_all_cells_evenly() -> None:
    keys_N, _ = make_keys(np.arange(40_000), class_id=1)
    owners_N = owner_of(keys_N, num_owners=4)
    assert np.abs(np.bincount(owners_N, minlength=4) - 10_000).max() < 500
    cells_C2 = empty_cells(8)
    homes = [home_cell(cells_C2, key) for key in keys_N[owners_N == 2]]
    shares = np.bincount(homes, minlength=len(cells_C2)) / len(homes) * len(cells_C2)
    assert np.abs(shares - 1.0).max() < 0.15


@settings(deadline=None)
@given(st.lists(st.tuples(INT64 | st.integers(0, 5), st.integers(0, 3)), max_size=60))
def test_deduplicated_batch_says_the_same_as_the_batch(pairs: list[tuple[int, int]]) -> None:
    keys_N = np.array([key for key, _ in pairs], np.int64)
    positives_N = np.array([positives for _, positives in pairs], np.int8)
    unique = deduplicate(keys_N, positives_N)
    order = list(dict.fromkeys(keys_N.tolist()))
    assert unique.keys_U.tolist() == order
    assert unique.keys_U[unique.inverse_N].tolist() == keys_N.tolist()
    assert unique.shows_U.tolist() == [keys_N.tolist().count(key) for key in order]
    assert unique.positives_U.tolist() == [sum(p for k, p in pairs if k == key) for key in order]
    assert (unique.shows_U.dtype, unique.inverse_N.dtype) == (np.int32, np.int32)


def test_deduplicate_refuses_columns_of_different_length() -> None:
    with pytest.raises(ValueError, match=r"positives_N must be \[2\]"):
        deduplicate([1, 2], [0])
