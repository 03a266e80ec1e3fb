"""PEPNet's protocol: who is counted, and which impressions train, choose and judge (arXiv 2302.01115).

Shapes: N impressions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from trainer.errors import DataError

Bools = npt.NDArray[np.bool_]

TRAIN, VALIDATION, TEST, UNUSED = 0, 1, 2, 255
"""Values of a slice column."""
SLICE_NAMES = {"train": TRAIN, "validation": VALIDATION, "test": TEST}

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS


class Protocol(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Days and counts of the split; the last day is the test's."""

    train_days: int = 10
    validation_days: int = 1
    test_days: int = 1
    interactions_min: int = 10
    """Users and items with fewer impressions leave; 1 = nobody does."""
    time_zone_h: int = 0
    """Where a day begins: hours to be added to UTC."""

    def __post_init__(self) -> None:
        for name in ("train_days", "validation_days", "test_days", "interactions_min"):
            if getattr(self, name) < 1:
                raise ValueError(f"protocol: {name} must be at least 1, found {getattr(self, name)}")
        if not -12 <= self.time_zone_h <= 14:
            raise ValueError(f"protocol: time_zone_h must be in -12..14, found {self.time_zone_h}")


def kept(
    users_N: npt.NDArray[np.integer[Any]], items_N: npt.NDArray[np.integer[Any]], *, least: int
) -> Bools:
    """The impressions whose user and whose item have at least `least` impressions among those kept.

    Counted again until nobody falls below, since each item that leaves takes impressions from its users: what
    is promised then holds for the data that the models see. Counted over all days, as in the paper.
    """
    _, user_N = np.unique(users_N, return_inverse=True)
    _, item_N = np.unique(items_N, return_inverse=True)
    kept_N = np.ones(len(user_N), np.bool_)
    while True:
        enough_N = kept_N.copy()
        for index_N in (user_N, item_N):
            counts = np.bincount(index_N[kept_N], minlength=int(index_N.max(initial=0)) + 1)
            enough_N &= counts[index_N] >= least
        if np.array_equal(enough_N, kept_N):
            return kept_N
        kept_N = enough_N


def slices(event_ms_N: npt.NDArray[np.int64], protocol: Protocol, *, where: str) -> npt.NDArray[np.uint8]:
    """TRAIN, VALIDATION, TEST or UNUSED for each impression, by the calendar day of its event.

    The test has the last days, the validation those before, and training up to `train_days` before these;
    what is older stays unused. A recording may have fewer days to train on, but not none.
    Args: where: what the impressions are, for errors.
    Raises: DataError if a slice would be empty.
    """
    day_N = (event_ms_N + protocol.time_zone_h * HOUR_MS) // DAY_MS
    last = int(day_N.max(initial=0))
    back_N = last - day_N
    edges = np.cumsum([protocol.test_days, protocol.validation_days, protocol.train_days])
    slice_N = np.full(len(day_N), UNUSED, np.uint8)
    slice_N[back_N < edges[2]] = TRAIN
    slice_N[back_N < edges[1]] = VALIDATION
    slice_N[back_N < edges[0]] = TEST
    empty = [name for name, value in SLICE_NAMES.items() if not (slice_N == value).any()]
    if empty:
        num_days = len(np.unique(day_N))
        raise DataError(
            f"{where}: no impressions for {', '.join(empty)}: the split needs {protocol.test_days} + "
            f"{protocol.validation_days} last days and at least one before them, found {len(day_N)} "
            f"impressions on {num_days} days"
        )
    return slice_N


def check_labels(
    labels_NT: npt.NDArray[np.floating[Any]], known_NT: Bools, *, tasks: Sequence[str], where: str
) -> None:
    """Raises: DataError naming the task, the value and how many, if a known label is neither 0 nor 1."""
    wrong_NT = known_NT & (labels_NT != 0) & (labels_NT != 1)
    for task, wrong_N, labels_N in zip(tasks, wrong_NT.T, labels_NT.T, strict=True):
        if wrong_N.any():
            raise DataError(
                f"{where}: label '{task}' must be 0 or 1, found {labels_N[wrong_N][0]:g} "
                f"({int(wrong_N.sum())} of {len(wrong_N)} impressions are neither); mend the column"
            )
