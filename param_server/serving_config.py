"""Configuration of what a replica holds: row format, memory budget, lifetimes, one shard of rows."""

from __future__ import annotations

from typing import Literal

import msgspec

from feature_eviction.policy import CLASS_ID_MAX

BUDGET_BYTES_MIN = 1 << 16


class ServingConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The defaults hold every row, for ever, as it was sent."""

    row_format: Literal["as_sent", "float32", "float16", "int8"] = "as_sent"
    """How rows lie in memory; as_sent: as the first version that brings a table had them."""
    memory_budget_bytes: int = 0
    """Bytes of rows, their columns and their index; 0 = no limit. Rows beyond it are not held, and
    counted. A full version is loaded beside the one that answers: for so long there are two."""
    over_budget: Literal["lowest_score", "oldest"] = "lowest_score"
    """Which rows give way; where no scores are sent the oldest do."""
    lifetime_s: int = 0
    """A row last seen longer ago than this, by the version's event time, is dropped; 0 = never."""
    lifetime_s_by_class: dict[str, int] = {}
    """Feature class, "0" .. "4095" -> its lifetime_s."""
    rows_shard: int = 0
    num_rows_shards: int = 1
    """Only rows whose id belongs to this one of so many shards are held."""

    def __post_init__(self) -> None:
        if self.memory_budget_bytes and self.memory_budget_bytes < BUDGET_BYTES_MIN:
            raise ValueError(
                f"memory_budget_bytes must be 0 or at least {BUDGET_BYTES_MIN}, "
                f"found {self.memory_budget_bytes}"
            )
        for class_id, lifetime_s in self.lifetime_s_by_class.items():
            if not (class_id.isascii() and class_id.isdigit()) or int(class_id) > CLASS_ID_MAX:
                raise ValueError(
                    f"lifetime_s_by_class: a feature class is 0..{CLASS_ID_MAX}, found '{class_id}'"
                )
            if lifetime_s < 0:
                raise ValueError(f"lifetime_s_by_class: class {class_id}: must not be negative: {lifetime_s}")
        if self.lifetime_s < 0:
            raise ValueError(f"lifetime_s must not be negative, found {self.lifetime_s}")
        if not 0 <= self.rows_shard < self.num_rows_shards < 2**31:
            raise ValueError(
                f"rows_shard must be in 0..num_rows_shards-1, "
                f"found {self.rows_shard} of {self.num_rows_shards}"
            )

    @property
    def expires(self) -> bool:
        return bool(self.lifetime_s or any(self.lifetime_s_by_class.values()))
