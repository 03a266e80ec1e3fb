"""Impressions in columns: what the stream hands to the trainer.

Shapes: N impressions; T tasks; L = ids of one jagged column.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class Position(NamedTuple):
    """The next impression to read: row `row` of the record at `kafka_offset`."""

    topic: str
    partition: int
    kafka_offset: int
    row: int


@dataclass(frozen=True, slots=True)
class Jagged:
    """Impression i owns lengths_N[i] consecutive values of ids_L."""

    ids_L: npt.NDArray[np.int64]
    lengths_N: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Impressions:
    """N impressions; features are keyed by name, labels follow the order of the schema's tasks."""

    request_ids_N: npt.NDArray[np.uint64]
    user_ids_N: npt.NDArray[np.int64]
    event_time_ms_N: npt.NDArray[np.int64]
    produced_ms_N: npt.NDArray[np.int64]
    """Kafka's record timestamp: when the impression entered the stream (wall clock)."""
    domain_N: npt.NDArray[np.uint8]
    """Index into the schema's domains."""
    sparse: dict[str, Jagged]
    dense: dict[str, npt.NDArray[np.float32]]
    labels_NT: npt.NDArray[np.float32]
    known_NT: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.request_ids_N)
