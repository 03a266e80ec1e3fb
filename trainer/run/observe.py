"""Looks at a run about once a second and remembers what it saw, in bounded memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import msgspec

from param_server.client import ReplicaState, UnavailableError
from trainer.run.freshness import FreshnessJoin
from trainer.run.run_directory import RunDirectory
from trainer.run.status import ProducerStatus, TrainerStatus, VersionTrace, read_status, traces_before

_READ_BYTES_MAX = 8 << 20
_APPLIED_MAX = 4096
"""So many of the versions that it applied last does a replica remember (proto/param_server.proto)."""
Item = TypeVar("Item")


class StatusLink(Protocol):
    """A replica's client, or anything that answers as one."""

    def status(self) -> ReplicaState: ...


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One look at everything; a part is None until its process has said something."""

    t_s: float
    """Since the run began."""
    trainer: TrainerStatus | None = None
    producer: ProducerStatus | None = None
    replicas: Mapping[str, ReplicaState] = field(default_factory=dict)
    """By name; without those that did not answer, and without their lists of applied versions."""
    freshness_p50_ms: int | None = None
    """Of the versions that have become visible lately; the same for p99."""
    freshness_p99_ms: int | None = None


class Thinned(Generic[Item]):
    """An even selection of everything appended: when full, every second item goes.

    Items are spread over the whole run, however long it gets; the newest one is always there.
    """

    def __init__(self, max_items: int) -> None:
        self._max_items = max_items
        self._stride = 1
        self._appended = 0
        self._kept: list[Item] = []
        self._newest: list[Item] = []

    def append(self, item: Item) -> None:
        if self._appended % self._stride == 0:
            self._kept.append(item)
            if len(self._kept) >= self._max_items:
                self._kept = self._kept[::2]
                self._stride *= 2
        self._newest = [item] if self._appended % self._stride else []
        self._appended += 1

    def items(self) -> list[Item]:
        """Oldest first, at most max_items of them."""
        return self._kept + self._newest


class LineTail:
    """The complete lines that have been added to a growing file since the last look."""

    def __init__(self, path: Path) -> None:
        """What is in the file already belongs to an earlier run."""
        self._path = path
        self._position = path.stat().st_size if path.exists() else 0

    def read(self) -> list[bytes]:
        """At most 8 MiB of lines; a line that is still being written waits for the next look."""
        rest: list[bytes] = []
        try:
            if self._path.stat().st_size < self._position:
                # It has begun anew; what was added to it before that lies beside it.
                rest = _lines_from(traces_before(self._path), self._position)
                self._position = 0
            lines = _lines_from(self._path, self._position)
        except FileNotFoundError:
            return rest
        self._position += sum(len(line) + 1 for line in lines)
        return rest + lines


def _lines_from(path: Path, position: int) -> list[bytes]:
    """Whole lines. Raises: FileNotFoundError."""
    with path.open("rb") as file:
        file.seek(position)
        data = file.read(_READ_BYTES_MAX)
    return data[: data.rfind(b"\n") + 1].splitlines()


def state_of(link: StatusLink) -> ReplicaState | None:
    """None where the replica does not answer just now."""
    try:
        return link.status()
    except UnavailableError:
        return None


class Observer:
    """Samples the status files, the version traces and the replicas of one run."""

    def __init__(self, directory: RunDirectory, freshness: FreshnessJoin) -> None:
        self.freshness = freshness
        self.history: Thinned[Observation] = Thinned(1200)
        self.full_versions: Thinned[VersionTrace] = Thinned(500)
        self.delta_versions: Thinned[VersionTrace] = Thinned(2000)
        self.latest = Observation(t_s=0.0)
        self.table_bytes_peak: dict[str, int] = {}
        """By table, over all looks."""
        self._directory = directory
        self._tail = LineTail(directory.versions)

    def look(self, t_s: float, links: Mapping[str, StatusLink]) -> Observation:
        """Take one observation and remember it."""
        self._read_traces()
        states = {name: state for name, link in links.items() if (state := state_of(link)) is not None}
        for name, state in states.items():
            is_truncated = len(state.applied) >= _APPLIED_MAX
            self.freshness.add_applied(name, state.applied, is_truncated=is_truncated)
        recent = self.freshness.recent()
        self.latest = Observation(
            t_s=t_s,
            trainer=read_status(self._directory.trainer_status, TrainerStatus),
            producer=read_status(self._directory.producer_status, ProducerStatus),
            # A history of whole lists would grow with the square of the run.
            replicas={name: replace(state, applied=()) for name, state in states.items()},
            freshness_p50_ms=recent.quantile(0.5),
            freshness_p99_ms=recent.quantile(0.99),
        )
        for table in self.latest.trainer.tables if self.latest.trainer else ():
            peak = self.table_bytes_peak.get(table.name, 0)
            self.table_bytes_peak[table.name] = max(peak, table.bytes)
        self.history.append(self.latest)
        return self.latest

    def _read_traces(self) -> None:
        lines = self._tail.read()
        traces = [msgspec.json.decode(line, type=VersionTrace) for line in lines]
        self.freshness.add_traces(traces)
        for trace in traces:
            (self.full_versions if trace.kind == "full" else self.delta_versions).append(trace)
