"""A row's first value depends on its key and the seed alone."""

from __future__ import annotations

import numpy as np

from trainer.row_init import first_rows

KEYS = np.array([0, 1, -1, 2**62, -(2**63), 7], np.int64)


def test_first_rows_do_not_depend_on_their_company() -> None:
    together = first_rows(KEYS, dim=16, scale=0.01, seed=5)
    alone = np.concatenate(
        [first_rows(KEYS[i : i + 1], dim=16, scale=0.01, seed=5) for i in range(len(KEYS))]
    )
    np.testing.assert_array_equal(together, alone)
    assert together.dtype == np.float32
    assert first_rows(KEYS[:0], dim=16, scale=0.01, seed=5).shape == (0, 16)


def test_first_rows_are_uniform_and_differ_by_key_column_and_seed() -> None:
    rows = first_rows(np.arange(20_000, dtype=np.int64), dim=8, scale=0.5, seed=1)
    assert np.abs(rows).max() <= 0.5
    assert abs(float(rows.mean())) < 0.005
    assert abs(float(rows.std()) - 1 / np.sqrt(12)) < 0.005
    assert len(np.unique(rows)) > 0.98 * rows.size
    assert not np.array_equal(rows, first_rows(np.arange(20_000, dtype=np.int64), dim=8, scale=0.5, seed=2))
