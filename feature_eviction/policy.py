"""The id table's policy: who may enter, what a row is worth, when it must leave.

One policy describes one table. Feature classes (the upper 12 bits of a key) each bring their own
admission, lifetime and protection; the score and the budget are the table's.
"""

from __future__ import annotations

from typing import Literal

import msgspec

CLASS_ID_MAX = 4095


class ScoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a row is worth; the lowest score leaves first.

    kraken: decayed shows and positives (Kraken, SC 2020); lru: last use; lfu: number of uses.
    """

    kind: Literal["kraken", "lru", "lfu"] = "kraken"
    positive_weight: float = 3.0
    """Worth of a positive sample against one that is not (Kraken's r; 1, 3 and 5 were tried)."""
    decay_per_day: float = 0.1
    """Share of the score lost in a day."""

    def __post_init__(self) -> None:
        if not 0.0 < self.positive_weight < 1e6:
            raise ValueError(f"positive_weight must be in (0, 1e6), found {self.positive_weight}")
        if not 0.0 <= self.decay_per_day < 1.0:
            raise ValueError(f"decay_per_day must be in [0, 1), found {self.decay_per_day}")


class AdmissionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether an unseen id gets a row of its own.

    always: at first sight; probability: each sighting enters with `probability`;
    count: from the `min_count`-th sighting on, counted by a count-min sketch.
    """

    kind: Literal["always", "probability", "count"] = "always"
    probability: float = 1.0
    min_count: int = 1

    def __post_init__(self) -> None:
        if not 0.0 < self.probability <= 1.0:
            raise ValueError(f"probability must be in (0, 1], found {self.probability}")
        if not 1 <= self.min_count <= 255:
            raise ValueError(f"min_count must be in 1..255, found {self.min_count}")


class ClassPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The rules of one feature class."""

    class_id: int
    admission: AdmissionConfig = AdmissionConfig()
    ttl_s: int | None = None
    """A row unseen for longer than this leaves; None = never."""
    protected: bool = False
    """A protected row is never evicted for its score; it can still expire."""

    def __post_init__(self) -> None:
        if not 0 <= self.class_id <= CLASS_ID_MAX:
            raise ValueError(f"class_id must be in 0..{CLASS_ID_MAX}, found {self.class_id}")
        if self.ttl_s is not None and self.ttl_s < 1:
            raise ValueError(f"ttl_s must be at least 1 second, found {self.ttl_s}")


class TablePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an IdTable needs to know; classes that are not listed use ClassPolicy's defaults."""

    num_slots: int
    score: ScoreConfig = ScoreConfig()
    classes: tuple[ClassPolicy, ...] = ()
    victim_window: int = 64
    """Slots examined for one victim: expired first, then the lowest score. At num_slots or more the
    choice is the exact global minimum."""
    expiry_scan: int = 256
    """Slots that each map call examines for expired rows, needed or not."""
    count_sketch_width: int = 1 << 16
    """Counters a row of the count-min sketch (4 rows of uint8); only used by count admission."""
    seed: int = 0

    @property
    def sketch_width_used(self) -> int:
        """count_sketch_width where some class is admitted by count, else 0: the sketch takes no memory."""
        by_count = any(policy.admission.kind == "count" for policy in self.classes)
        return self.count_sketch_width if by_count else 0

    def __post_init__(self) -> None:
        if not 1 <= self.num_slots < 2**31:
            raise ValueError(f"num_slots must be in 1..2^31-1, found {self.num_slots}")
        if self.victim_window < 1 or self.expiry_scan < 0:
            raise ValueError("victim_window must be at least 1 and expiry_scan at least 0")
        if self.count_sketch_width < 1 or self.count_sketch_width & (self.count_sketch_width - 1):
            raise ValueError(f"count_sketch_width must be a power of two, found {self.count_sketch_width}")
        class_ids = [policy.class_id for policy in self.classes]
        if len(set(class_ids)) != len(class_ids):
            raise ValueError(f"class_id must be unique, found {sorted(class_ids)}")
