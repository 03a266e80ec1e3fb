from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction import (
    AdmissionConfig,
    ClassPolicy,
    IdTable,
    TablePolicy,
    num_slots_for_budget,
    table_bytes,
)

COUNTED = (ClassPolicy(class_id=1, admission=AdmissionConfig(kind="count", min_count=2)),)


def all_bytes(table: IdTable) -> int:
    arrays = table._table._replace(rules=None)
    return sum(array.nbytes for array in arrays if array is not None)


@pytest.mark.parametrize("classes", [(), COUNTED])
@pytest.mark.parametrize("num_slots", [1, 2, 5, 1000])
def test_table_bytes_are_the_bytes_of_the_arrays(num_slots: int, classes: tuple[ClassPolicy, ...]) -> None:
    policy = TablePolicy(num_slots=num_slots, classes=classes, count_sketch_width=64)
    table = IdTable(policy)
    assert table.bytes_used == table_bytes(num_slots, policy=policy)
    # Beside them: 48 bytes of counters a rule, the cursors, one random number, one sketch counter.
    assert all_bytes(table) == table.bytes_used + 48 * (1 + len(classes)) + 4 * 8 + 8 + 8


@settings(deadline=None)
@given(st.integers(0, 2**45), st.integers(1, 4096), st.booleans())
def test_slots_for_a_budget_are_the_most_that_fit(limit: int, bytes_per_row: int, counted: bool) -> None:
    policy = TablePolicy(num_slots=1, classes=COUNTED if counted else ())
    num_slots = num_slots_for_budget(limit, bytes_per_row=bytes_per_row, policy=policy)

    def needed(slots: int) -> int:
        return table_bytes(slots, policy=policy) + slots * bytes_per_row

    assert num_slots == 0 or needed(num_slots) <= limit
    assert num_slots == 2**31 - 1 or needed(num_slots + 1) > limit


def test_a_slot_costs_at_most_44_bytes_and_a_cell() -> None:
    assert table_bytes(1_000_000) <= 44 * 1_000_000 + 16


def test_arrays_keep_their_size_whatever_comes() -> None:
    policy = TablePolicy(num_slots=50, classes=COUNTED, count_sketch_width=16)
    table = IdTable(policy)
    generator = np.random.default_rng(1)
    before = all_bytes(table)
    for now_s in range(40):
        keys_N = generator.integers(-(2**63), 2**63 - 1, 30)
        result = table.map(
            keys_N, shows_N=np.ones(30, np.int32), positives_N=np.zeros(30, np.int32), now_s=now_s
        )
        table.release(result.batch - 1)
        assert table.num_rows <= 50
        assert all_bytes(table) == before
        assert table.bytes_used == table_bytes(50, policy=policy)
