"""Shared by the tests of the id table: one way to feed ids, one way to find keys that collide."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from feature_eviction import IdTable, MapResult, make_keys
from feature_eviction.cells import empty_cells, home_cell
from feature_eviction.keys import Int64Array


@pytest.fixture(scope="session")
def sight() -> Callable[..., MapResult]:
    """sight(table, ids, now_s=, class_id=, positives=, release=): one call with one show an id."""

    def sight_ids(
        table: IdTable,
        ids: Sequence[int],
        *,
        now_s: int,
        class_id: int = 0,
        positives: int = 0,
        release: bool = True,
    ) -> MapResult:
        keys_N, _ = make_keys(np.array(ids, np.int64), class_id=class_id)
        result = table.map(
            keys_N,
            shows_N=np.full(len(keys_N), max(1, positives), np.int32),
            positives_N=np.full(len(keys_N), positives, np.int32),
            now_s=now_s,
        )
        if release:
            table.release(result.batch)
        return result

    return sight_ids


@pytest.fixture(scope="session")
def colliding_keys() -> Callable[..., Int64Array]:
    """colliding_keys(capacity, number): distinct keys whose probes begin at the same, last cell."""

    def find(capacity: int, number: int) -> Int64Array:
        cells_C2 = empty_cells(capacity)
        last = len(cells_C2) - 1
        found: list[int] = []
        key = 0
        while len(found) < number:
            if home_cell(cells_C2, key) == last:
                found.append(key)
            key += 1
        return np.array(found, np.int64)

    return find
