"""The id table's policy: who may enter, what a row is worth, when it must leave.

One policy describes one table. Feature classes (the upper 12 bits of a key) each bring their own
admission, lifetime, quota and protection; the score and the budget are the table's.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

CLASS_ID_MAX = 4095
NUM_SLOTS_MAX = 1_700_000_000
"""So that a cell's number fits an int32 at the table's load."""

SHIPPED_SCORES = ("kraken", "show_click", "lru", "lfu", "distance_lfu", "ttl_only")

_IMPORTABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


class ScoreConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a row is worth; the lowest score leaves first.

    kraken: decayed shows and positives (Kraken, SC 2020); show_click: the same with Paddle's constants
    (click 1, other shows 0.1, 2 % decay a day); lru: last use; lfu: number of uses; distance_lfu: uses over
    the seconds since the last one; ttl_only: no preference, rows leave as the victim hand meets them.

    "module:function" names a function with the decorator @score. It is imported and runs in this
    process: who writes the configuration chooses code, as with any plug-in.
    """

    kind: str = "kraken"
    """One of the names above, or `module:function`."""
    positive_weight: float = 3.0
    """kraken: worth of a positive sample against one that is not (r; 1, 3 and 5 were tried)."""
    decay_per_day: float = 0.1
    """kraken: share of the score lost in a day."""
    distance_power: float = 1.0
    """distance_lfu: uses are divided by (1 + seconds since the last one) to this power."""

    def __post_init__(self) -> None:
        if self.kind not in SHIPPED_SCORES and not _IMPORTABLE.fullmatch(self.kind):
            raise ValueError(
                f"kind must be one of {', '.join(SHIPPED_SCORES)} or module:function, found '{self.kind}'"
            )
        if not 0.0 < self.positive_weight < 1e6:
            raise ValueError(f"positive_weight must be in (0, 1e6), found {self.positive_weight}")
        if not 0.0 <= self.decay_per_day < 1.0:
            raise ValueError(f"decay_per_day must be in [0, 1), found {self.decay_per_day}")
        if not 0.0 < self.distance_power <= 10.0:
            raise ValueError(f"distance_power must be in (0, 10], found {self.distance_power}")


class AdmissionConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether an unseen id gets a row of its own.

    always: at first sight; probability: each sighting enters with `probability`;
    count: from the `min_count`-th sighting on, counted by a count-min sketch over the table's
    `count_window_s`; what the windows before saw counts half, a quarter and so on.
    """

    kind: Literal["always", "probability", "count"] = "always"
    """How an unseen id is admitted, as above."""
    probability: float = 1.0
    """Of each sighting, for kind `probability`."""
    min_count: int = 1
    """The sighting that gets a row, for kind `count`; at most 255."""

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
    min_updates: int = 0
    """A row that has gathered fewer shows when ttl_s has passed since its admission leaves as well."""
    max_rows: int | None = None
    """The most rows the class may hold: at it, a new id takes the place of the lowest of its own class. Rows
    loaded beyond it leave over the following map calls, each of which evicts a bounded number of them."""
    protected: bool = False
    """A protected row is never evicted for its score or its class's quota; it can still expire."""

    def __post_init__(self) -> None:
        if not 0 <= self.class_id <= CLASS_ID_MAX:
            raise ValueError(f"class_id must be in 0..{CLASS_ID_MAX}, found {self.class_id}")
        if self.ttl_s is not None and self.ttl_s < 1:
            raise ValueError(f"ttl_s must be at least 1 second, found {self.ttl_s}")
        if not 0 <= self.min_updates < 2**31:
            raise ValueError(f"min_updates must be in 0..2^31-1, found {self.min_updates}")
        if self.min_updates and self.ttl_s is None:
            raise ValueError("min_updates are to be gathered within ttl_s, which is missing")
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows must be at least 1, found {self.max_rows}")


class TablePolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything an IdTable needs to know; classes that are not listed use ClassPolicy's defaults."""

    num_slots: int
    score: ScoreConfig = ScoreConfig()
    classes: tuple[ClassPolicy, ...] = ()
    victim_window: int = 64
    """Slots examined for one victim. At num_slots or more the choice is the exact global minimum."""
    low_water_slots: int = 15
    """Slots freed beyond the one needed when a full table evicts for score, at most 1/64 of all: one pass
    over (1 + these) windows chooses as many victims."""
    expiry_scan: int = 256
    """Due rows that each map call examines for expiry; a full table examines up to victim_window more for
    each id that needs a slot, before a row leaves for its score."""
    count_sketch_width: int = 1 << 16
    """Counters a row of the count-min sketch (4 rows of uint8); only used by count admission."""
    count_window_s: int = 86_400
    """Count admission counts by windows of event time: when the next one begins, all counts are halved."""
    evictions_remembered: int = 4096
    """The newest evictions that why() can explain; 24 bytes each."""
    seed: int = 0

    @property
    def sketch_width_used(self) -> int:
        """count_sketch_width where some class is admitted by count, else 0: the sketch takes no memory."""
        by_count = any(policy.admission.kind == "count" for policy in self.classes)
        return self.count_sketch_width if by_count else 0

    @property
    def victims_at_once(self) -> int:
        """How many rows one pass for room evicts."""
        return max(1, min(1 + self.low_water_slots, self.num_slots // 64))

    def __post_init__(self) -> None:
        if not 1 <= self.num_slots <= NUM_SLOTS_MAX:
            raise ValueError(f"num_slots must be in 1..{NUM_SLOTS_MAX}, found {self.num_slots}")
        if self.victim_window < 1 or self.expiry_scan < 0:
            raise ValueError("victim_window must be at least 1 and expiry_scan at least 0")
        if not 0 <= self.low_water_slots < 4096 or not 0 <= self.evictions_remembered < 2**31:
            raise ValueError("low_water_slots must be in 0..4095 and evictions_remembered in 0..2^31-1")
        if self.count_sketch_width < 1 or self.count_sketch_width & (self.count_sketch_width - 1):
            raise ValueError(f"count_sketch_width must be a power of two, found {self.count_sketch_width}")
        if self.count_window_s < 1:
            raise ValueError(f"count_window_s must be at least 1 second, found {self.count_window_s}")
        class_ids = [policy.class_id for policy in self.classes]
        if len(set(class_ids)) != len(class_ids):
            raise ValueError(f"class_id must be unique, found {sorted(class_ids)}")
