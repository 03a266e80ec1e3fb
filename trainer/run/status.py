"""What the processes of a run tell each other through small JSON files.

One writer a file, replaced atomically, so a reader never sees half of one.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

Quality = dict[str, dict[str, float | None]]
"""domain -> task -> value; None = not defined there (no positives or no negatives)."""


RunState = Literal["starting", "training", "draining", "stopped"]


class TableStatus(msgspec.Struct, kw_only=True):
    """One table, summed over ranks."""

    name: str
    rows: int
    capacity: int
    bytes: int
    bytes_limit: int
    admitted: int
    evicted: dict[str, int]
    refused: dict[str, int]


class TrainerStatus(msgspec.Struct, kw_only=True):
    """`trainer.json`, written by rank 0."""

    state: RunState
    generation: int = 0
    step: int = 0
    impressions_trained: int = 0
    """Of the whole run, those before a restart included."""
    dead_letters: dict[str, int] = {}
    """Impressions that were not trained, by reason."""
    ids_folded: int = 0
    """Raw ids wider than 52 bits, mixed down to fit their key; since this process started."""
    lag_impressions: int = 0
    """Kafka records not yet trained times the impressions of a record; an estimate."""
    samples_per_s: float = 0.0
    """Over the last few seconds while training."""
    auc: Quality = {}
    gauc: Quality = {}
    tables: list[TableStatus] = []
    version: str = ""
    """Head as "generation.sequence"."""
    versions_full: int = 0
    versions_delta: int = 0
    rows_changed: int = 0
    rows_pushed: int = 0
    rows_held_back: dict[str, int] = {}
    """Rows that a rule kept back, by reason, counted once for each publish that kept them back."""
    bytes_pushed: int = 0
    rows_pending: int = 0
    """Changed rows and deletes that serving has not got, held back ones included."""
    pending_age_ms: int = 0
    """Since when there are changes that no version has been taken for and acknowledged: what a slow or dead
    shard, or the gate, keeps from serving. What a rule holds back does not count."""
    last_ack_age_s: float = -1.0
    """Since a version last became durable; -1 = none has yet."""
    versions_failed: int = 0
    versions_held: int = 0
    """Versions that were due and that the quality gate held."""
    held_because: str = ""
    """The gate's word while it holds, else empty."""
    event_time_ms: int = 0
    impressions_since_start: int = 0
    """Trained by this process."""
    training_s: float = 0.0
    """Seconds spent inside the training loop, without start-up."""


class ProducerStatus(msgspec.Struct, kw_only=True):
    """`producer.json`."""

    state: Literal["starting", "producing", "done"]
    impressions_produced: int = 0
    records_produced: int = 0
    bytes_produced: int = 0
    told_to_stop: bool = False
    """A signal ended it, not its source and not its number."""
    best_possible_auc: Quality = {}
    """AUC of the true probabilities over the newest impressions; empty where they are not known."""
    best_possible_gauc: Quality = {}


class VersionTrace(msgspec.Struct, kw_only=True):
    """One line of `versions.jsonl`: what a version carried and when its impressions were produced."""

    generation: int
    sequence: int
    kind: Literal["full", "delta"]
    num_rows: int
    num_deletes: int
    num_bytes: int
    taken_ms: int
    committed_ms: int
    produced_ms: list[tuple[int, int]]
    """(wall-clock ms at which they entered the stream, number of impressions); those trained since
    the version before."""


TRACE_BYTES_MAX = 64 << 20
"""Then `versions.jsonl` begins anew, and what it held stays beside it until the next time."""


def append_trace(path: Path, trace: VersionTrace) -> None:
    """Add a version's line. Raises: OSError."""
    with path.open("ab") as file:
        file.write(msgspec.json.encode(trace) + b"\n")
        num_bytes = file.tell()
    if num_bytes >= TRACE_BYTES_MAX:
        os.replace(path, traces_before(path))


def traces_before(path: Path) -> Path:
    """Where the lines before those of `versions.jsonl` lie."""
    return path.with_suffix(".1.jsonl")


Status = TypeVar("Status", TrainerStatus, ProducerStatus)


def write_status(path: Path, status: TrainerStatus | ProducerStatus) -> None:
    """Replace the file at once; a reader sees the old or the new one."""
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.encode(status))
    os.replace(temporary, path)


def read_status(path: Path, kind: type[Status]) -> Status | None:
    """None where the process has not written one yet."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except FileNotFoundError:
        return None
