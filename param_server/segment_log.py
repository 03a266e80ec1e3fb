"""One shard's segments: records appended, many made durable by one sync, whole segments dropped.

A life of the process only appends to segments that it began itself. What an earlier life left is never
touched, so its torn tail needs no repair: no manifest names it, and it goes with its segment.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

from param_server.errors import LogError
from param_server.log_records import record_header, scan_headers
from param_server.manifest import Version
from param_server.stores import SegmentWriter, Store

SEGMENT_BYTES_MAX = 64 << 20


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record begins."""

    segment: str
    segment_offset: int


class SegmentLog:
    """Safe for many threads; `append` and `sync` of several share a sync."""

    def __init__(self, store: Store, *, shard: int, segment_bytes_max: int = SEGMENT_BYTES_MAX) -> None:
        self._store = store
        self._folder = f"segments/shard-{shard}"
        self._segment_bytes_max = segment_bytes_max
        self._mutex = threading.Lock()
        self._writer: SegmentWriter | None = None
        self._name = ""
        self._num_bytes = 0
        self._number = max((int(name.rpartition("/")[2]) for name in self.names()), default=0)
        self._newest: dict[str, Version] = {}
        self._lost: set[str] = set()

    def names(self) -> list[str]:
        """All segments there are, oldest first."""
        return [name for name in self._store.list(f"{self._folder}/") if name.rpartition("/")[2].isdigit()]

    def append(self, version: Version, name: str, data: bytes, *, data_crc32c: int) -> Place:
        """Not durable before `sync`. Raises: LogError; then nothing of it counts."""
        header = record_header(version, name, data, data_crc32c=data_crc32c)
        with self._mutex:
            if self._writer is None or self._num_bytes >= self._segment_bytes_max:
                self._begin()
            assert self._writer is not None
            start = self._writer.append(header, data)
            self._num_bytes = start + len(header) + len(data)
            self._newest[self._name] = max(version, self._newest.get(self._name, version))
            return Place(self._name, start)

    def sync(self) -> None:
        """Everything appended so far is durable when it returns.

        Raises: LogError if that is not known: what was appended to the newest segment must come again.
        """
        with self._mutex:
            writer, name = self._writer, self._name
        if writer is None:
            return
        try:
            writer.sync()
        except LogError:
            with self._mutex:
                self._lost.add(name)
                if self._writer is writer:
                    self._writer = None
            writer.close()
            raise

    def is_lost(self, segment: str) -> bool:
        """A sync of it failed, whoever asked for it: what was not durable before may not be there."""
        with self._mutex:
            return segment in self._lost

    def roll(self) -> None:
        """The next record begins a segment, so that what follows can be dropped by itself."""
        with self._mutex:
            self._end()

    def drop(self, *, named: set[str], head: Version | None, fenced_generation: int) -> list[str]:
        """Remove the segments that no manifest names and no commit to come can name; returns their names.

        A record above the head may be waiting for its commit, so its segment stays, unless its writer is
        fenced.
        """
        dropped = []
        for name in self.names():
            if name == self._name or name in named:
                continue
            if name not in self._newest:
                versions = [record.version for _, record in scan_headers(self._store, name)]
                self._newest[name] = max(versions, default=Version(0, 0))
            newest = self._newest[name]
            if newest.generation >= fenced_generation and (head is None or newest > head):
                continue
            self._store.delete(name)
            self._newest.pop(name)
            with self._mutex:
                self._lost.discard(name)
            dropped.append(name)
        return dropped

    def close(self) -> None:
        with self._mutex:
            if self._writer is not None:
                self._writer.close()
                self._writer = None

    def _begin(self) -> None:
        self._end()
        self._number += 1
        name = f"{self._folder}/{self._number:08d}"
        self._writer = self._store.open_segment(name)
        self._name, self._num_bytes = name, 0

    def _end(self) -> None:
        name, writer = self._name, self._writer
        self._writer, self._name = None, ""
        if writer is not None:
            # Nothing of a segment may be left for a later sync, which only knows the newest one.
            try:
                writer.sync()
            except LogError:
                self._lost.add(name)
                raise
            finally:
                writer.close()
