from __future__ import annotations

import os
from pathlib import Path
from types import FunctionType

import numba
import pytest

from feature_eviction.jit import _drop_stale_cache, kernel


def test_kernels_older_than_any_source_are_compiled_anew(tmp_path: Path) -> None:
    cache = tmp_path / "__pycache__"
    cache.mkdir()
    (tmp_path / "changed.py").touch()
    for name, age_s in (("old.nbi", -10), ("new.nbi", 10)):
        written = cache / name
        written.touch()
        changed = (tmp_path / "changed.py").stat().st_mtime
        os.utime(written, (changed + age_s, changed + age_s))
    _drop_stale_cache(tmp_path)
    assert sorted(one.name for one in cache.iterdir()) == ["new.nbi"]


def twice(value: int) -> int:
    return 2 * value


def test_kernel_without_a_place_for_its_cache_still_runs() -> None:
    nowhere = FunctionType(twice.__code__.replace(co_filename="<nowhere>"), {})
    with pytest.raises(RuntimeError, match="cannot cache function"):
        numba.njit(cache=True)(nowhere)
    assert kernel(nowhere)(21) == 42
