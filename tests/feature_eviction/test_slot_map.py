from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import SlotMap, TableFullError
from feature_eviction.keys import Int64Array

EXTREMES = [0, -1, 1, -(2**63), 2**63 - 1]
KEY = st.sampled_from(EXTREMES) | st.integers(0, 12)
KEYS = st.lists(KEY, max_size=12)
OPERATIONS = st.lists(
    st.tuples(st.sampled_from(["upsert", "delete", "assign"]), KEYS) | st.tuples(st.just("grow"), KEYS),
    max_size=25,
)


def check_same(slot_map: SlotMap, reference: dict[int, int]) -> None:
    keys_N, slots_N = slot_map.items()
    assert dict(zip(keys_N.tolist(), slots_N.tolist(), strict=True)) == reference
    assert len(slot_map) == len(reference)
    assert len(set(reference.values())) == len(reference)
    free = slot_map.free_slots(slot_map.capacity - len(slot_map)).tolist()
    assert sorted(free + list(reference.values())) == list(range(slot_map.capacity))
    probes = np.array([*EXTREMES, *range(13)], np.int64)
    assert slot_map.lookup(probes).tolist() == [reference.get(key, -1) for key in probes.tolist()]


def upsert_both(slot_map: SlotMap, reference: dict[int, int], keys: list[int]) -> None:
    num_new = len(set(keys) - reference.keys())
    if num_new > slot_map.capacity - len(slot_map):
        with pytest.raises(TableFullError):
            slot_map.upsert(keys)
        return
    slots_N, is_new_N = slot_map.upsert(keys)
    for key, slot, is_new in zip(keys, slots_N.tolist(), is_new_N.tolist(), strict=True):
        assert is_new == (key not in reference)
        assert reference.setdefault(key, slot) == slot


def delete_both(slot_map: SlotMap, reference: dict[int, int], keys: list[int]) -> None:
    assert slot_map.delete(keys).tolist() == [reference.pop(key, -1) for key in keys]


def assign_both(slot_map: SlotMap, reference: dict[int, int], keys: list[int]) -> None:
    num_free = slot_map.capacity - len(slot_map)
    keys = keys[:num_free]
    slots = slot_map.free_slots(len(keys)).tolist()
    expected = [_swap(reference, key, slot) for key, slot in zip(keys, slots, strict=True)]
    assert slot_map.assign(keys, slots).tolist() == expected


def _swap(reference: dict[int, int], key: int, slot: int) -> int:
    previous = reference.get(key, -1)
    reference[key] = slot
    return previous


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 12), OPERATIONS)
def test_slot_map_agrees_with_a_dict_under_any_operations(
    capacity: int, operations: list[tuple[str, list[int]]]
) -> None:
    slot_map, reference = SlotMap(capacity), dict[int, int]()
    for name, keys in operations:
        if name == "upsert":
            upsert_both(slot_map, reference, keys)
        elif name == "delete":
            delete_both(slot_map, reference, keys)
        elif name == "assign":
            assign_both(slot_map, reference, keys)
        else:
            slot_map.grow(slot_map.capacity + len(keys))
        check_same(slot_map, reference)


def test_keys_of_one_bucket_stay_apart_while_some_are_deleted(
    colliding_keys: Callable[..., Int64Array],
) -> None:
    keys_N = colliding_keys(64, 64)
    slot_map = SlotMap(64)
    slots_N, _ = slot_map.upsert(keys_N)
    for place in np.random.default_rng(5).permutation(64):
        slot_map.delete(keys_N[place : place + 1])
        slots_N[place] = -1
        assert slot_map.lookup(keys_N).tolist() == slots_N.tolist()
    assert len(slot_map) == 0


def test_large_map_agrees_with_a_dict() -> None:
    generator = np.random.default_rng(11)
    keys_N = generator.integers(-(2**63), 2**63 - 1, 50_000)
    slot_map = SlotMap(len(keys_N))
    slots_N, is_new_N = slot_map.upsert(keys_N)
    assert is_new_N.all()
    assert len(np.unique(slots_N)) == len(keys_N)
    gone_N = generator.random(len(keys_N)) < 0.5
    assert slot_map.delete(keys_N[gone_N]).tolist() == slots_N[gone_N].tolist()
    assert slot_map.lookup(keys_N).tolist() == np.where(gone_N, -1, slots_N).tolist()


def test_full_map_refuses_the_whole_call_and_stays_as_it_was() -> None:
    slot_map = SlotMap(3)
    slot_map.upsert([1, 2])
    with pytest.raises(TableFullError, match=r"2 of 3 slots are taken"):
        slot_map.upsert([2, 3, 4])
    assert slot_map.lookup([1, 2, 3, 4]).tolist() == [0, 1, -1, -1]
    slot_map.upsert([5])
    assert len(slot_map) == 3


def test_freed_slot_is_the_last_to_be_reused() -> None:
    slot_map = SlotMap(4)
    slot_map.upsert([10, 11])
    slot_map.delete([10])
    assert slot_map.free_slots(3).tolist() == [2, 3, 0]


def test_repointed_key_answers_with_its_new_slot_and_frees_the_old() -> None:
    slot_map = SlotMap(4)
    slot_map.upsert([10, 11])
    assert slot_map.assign([10, 12], [3, 2]).tolist() == [0, -1]
    assert slot_map.lookup([10, 11, 12]).tolist() == [3, 1, 2]
    assert slot_map.free_slots(1).tolist() == [0]


@pytest.mark.parametrize("slots", [[0, 2], [2, 2], [2, 4], [2, -1]])
def test_assign_to_a_slot_that_is_not_free_changes_nothing(slots: list[int]) -> None:
    slot_map = SlotMap(4)
    slot_map.upsert([10, 11])
    with pytest.raises(ValueError, match="not a free slot"):
        slot_map.assign([20, 21], slots)
    assert slot_map.lookup([10, 11, 20, 21]).tolist() == [0, 1, -1, -1]
    assert slot_map.free_slots(2).tolist() == [2, 3]


def test_asking_for_more_free_slots_than_there_are_is_refused() -> None:
    slot_map = SlotMap(4)
    slot_map.upsert([10])
    with pytest.raises(TableFullError, match="3 of 4 are free"):
        slot_map.free_slots(4)


def test_empty_calls_are_normal() -> None:
    slot_map = SlotMap(2)
    assert slot_map.lookup([]).tolist() == []
    assert [part.tolist() for part in slot_map.upsert([])] == [[], []]
    assert slot_map.delete([]).tolist() == []
    assert slot_map.assign([], []).tolist() == []
    assert slot_map.free_slots(0).tolist() == []


def test_grow_keeps_slots_and_takes_new_ones_last() -> None:
    slot_map = SlotMap(2)
    slot_map.upsert([7])
    slot_map.grow(4)
    assert slot_map.lookup([7]).tolist() == [0]
    assert slot_map.free_slots(3).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda: SlotMap(0), "capacity must be in"),
        (lambda: SlotMap(2).grow(1), "below the present 2"),
        (lambda: SlotMap(2).assign([1, 2], [0]), "one slot a key"),
    ],
)
def test_wrong_arguments_are_named(act: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        act()


def test_bytes_used_is_the_size_of_all_arrays() -> None:
    slot_map = SlotMap(1000)
    arrays = [value for value in vars(slot_map).values() if isinstance(value, np.ndarray)]
    assert slot_map.bytes_used == sum(array.nbytes for array in arrays)
    assert slot_map.bytes_used <= 1000 * (16 / 0.8 + 8) + 64
