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
from feature_eviction.layout import NUM_CURSORS
from feature_eviction.policy import NUM_SLOTS_MAX

LIVING = (ClassPolicy(class_id=1, ttl_s=3600),)
COUNTED = (ClassPolicy(class_id=1, admission=AdmissionConfig(kind="count", min_count=2)),)


def all_bytes(table: IdTable) -> int:
    arrays = table._table._asdict()
    del arrays["rules"]
    return sum(array.nbytes for array in arrays.values())


@pytest.mark.parametrize("classes", [(), COUNTED, LIVING])
@pytest.mark.parametrize("num_slots", [1, 2, 5, 1000])
def test_table_bytes_are_the_bytes_of_the_arrays(num_slots: int, classes: tuple[ClassPolicy, ...]) -> None:
    policy = TablePolicy(num_slots=num_slots, classes=classes, count_sketch_width=64)
    table = IdTable(policy)
    assert table.bytes_used == table_bytes(num_slots, policy=policy)
    # Beside them: counters and rows of each rule, the cursors, one random number, the clock of the sketch.
    assert all_bytes(table) == table.bytes_used + 88 * (1 + len(classes)) + 8 * NUM_CURSORS + 8 + 24


@settings(deadline=None)
@given(st.integers(0, 2**45), st.integers(1, 4096), st.booleans())
def test_slots_for_a_budget_are_the_most_that_fit(limit: int, bytes_per_row: int, counted: bool) -> None:
    policy = TablePolicy(num_slots=1, classes=COUNTED if counted else ())
    num_slots = num_slots_for_budget(limit, bytes_per_row=bytes_per_row, policy=policy)

    def needed(slots: int) -> int:
        return table_bytes(slots, policy=policy) + slots * bytes_per_row

    assert num_slots == 0 or needed(num_slots) <= limit
    assert num_slots == NUM_SLOTS_MAX or needed(num_slots + 1) > limit


def test_a_slot_costs_35_bytes_and_8_more_where_rows_expire() -> None:
    num_slots = 1_000_000
    assert table_bytes(num_slots) <= 34.2 * num_slots
    living = TablePolicy(num_slots=1, classes=LIVING, evictions_remembered=0)
    assert table_bytes(num_slots, policy=living) - table_bytes(num_slots) <= 8.1 * num_slots


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
