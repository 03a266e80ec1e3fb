"""What IdTable answers: columns of one map call, rows, counters, and all that is known of one key.

Legend: N keys or rows of a call, M new rows, K evicted rows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from feature_eviction.keys import Int64Array

OTHER_CLASSES = -1
"""Stands in TableCounters.classes for all classes without a policy of their own."""


class MapResult(NamedTuple):
    """What one map call answers and what it changed."""

    slots_N: Int64Array
    """-1 = not admitted: the shared default row, which is neither stored nor trained."""
    new_keys_M: Int64Array
    new_slots_M: Int64Array
    """Slots whose row and optimizer state must be reset before their first use, fresh or reused."""
    evicted_keys_K: Int64Array
    evicted_slots_K: Int64Array
    """Left during this call; a slot may already have its next owner."""
    batch: int
    """To be given to release() once the step that uses these slots is done."""


class TableRows(NamedTuple):
    """Rows held: columns [N]."""

    keys_N: Int64Array
    slots_N: Int64Array
    scores_N: npt.NDArray[np.float32]
    """What the score function returned at the row's last sighting."""
    last_seen_s_N: Int64Array
    updates_N: npt.NDArray[np.uint32]
    """Shows since the row was admitted, at most 2^32-1."""


class Deleted(NamedTuple):
    """What delete() did."""

    slots_N: Int64Array
    """The slot that became free; -1 where the key was absent or in flight."""


class Why(msgspec.Struct, frozen=True, kw_only=True):
    """All that is known of one key."""

    key: int
    class_id: int
    state: Literal["held", "absent"]
    slot: int | None = None
    score: float | None = None
    """Kept at the last sighting."""
    last_seen_s: int | None = None
    updates: int | None = None
    in_flight: bool = False
    left_because: str | None = None
    """The reason of the newest eviction that is still remembered."""
    left_at_s: int | None = None
    left_with_score: float | None = None

    def __str__(self) -> str:
        if self.state == "held":
            flying = ", in flight" if self.in_flight else ""
            now = (
                f"held in slot {self.slot}{flying}: score {self.score:g}, {self.updates} updates, "
                f"last seen at {self.last_seen_s}"
            )
        else:
            now = "absent"
        if self.left_because is None:
            return f"key {self.key} (class {self.class_id}): {now}; no eviction of it is remembered"
        left = f"left at {self.left_at_s} for {self.left_because}, score {self.left_with_score:g}"
        return f"key {self.key} (class {self.class_id}): {now}; {left}"


class ClassCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What happened to the ids of some classes, since the table began."""

    admitted: int
    evicted: dict[str, int]
    """By reason: expired, few_updates, score, quota, deleted."""
    refused: dict[str, int]
    """By reason: probability, count, quota, no_victim; one for each place in a call that was refused."""
    rows: int
    """Held now."""


class TableCounters(ClassCounters, frozen=True, kw_only=True):
    """The sums, and the same by class."""

    classes: dict[int, ClassCounters]
    """By class_id, for the classes with a policy of their own; the others under OTHER_CLASSES."""
    bad_scores: int
    """Sightings whose score was not finite as float32: the row kept the one it had."""
