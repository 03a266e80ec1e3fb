"""Large arrays on huge pages: random access to gigabytes costs few TLB misses then.

The memory is anonymous and comes from the system zeroed, page by page as it is first touched; the array keeps
it alive. Where the system knows no huge pages the array is an ordinary one.
"""

from __future__ import annotations

import mmap
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt

HUGE_PAGE_BYTES = 2 << 20


def big_array(shape: int | tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Zeros; small arrays (below four huge pages) are numpy's own."""
    dtype = np.dtype(dtype)
    num_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if num_bytes < 4 * HUGE_PAGE_BYTES:
        return np.zeros(shape, dtype)
    # Up to a page more, so that the array can begin where a huge page does.
    memory = mmap.mmap(-1, num_bytes + HUGE_PAGE_BYTES)
    with suppress(AttributeError, OSError):  # not Linux, or a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(memory, np.uint8)
    start = -whole.ctypes.data % HUGE_PAGE_BYTES
    return whole[start : start + num_bytes].view(dtype).reshape(shape)
