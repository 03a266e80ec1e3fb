"""A store in any fsspec filesystem: memory, a mounted folder, an S3-like bucket.

What decides a commit is `create`. It asks the filesystem for a conditional write (pipe_file with mode
"create"): atomic in stores that have one (S3 and what speaks its protocol through s3fs, where it becomes
If-None-Match; memory; local files). Where fsspec only looks before it writes, two creators at the same
instant could both succeed: run one coordinating shard a log there, which the log asks for anyway.

An object store cannot append. A segment is kept as chunks, one object a sync, named by their first offset:
`segments/shard-0/00000001@000000000004096`. A chunk is durable when the store has taken it and never changes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import fsspec

from param_server.errors import LogError, ParamServerError, StoreExistsError, StoreMissingError
from param_server.stores import check_name

ASIDE = "damaged"
_OFFSET_DIGITS = 15
_BEGUN = "begun"
"""The empty object that takes a segment's name."""

KNOWN_SEGMENTS_MAX = 1024

Names = list[str]
Chunks = list[tuple[int, str, int]]


def open_fsspec_store(url: str) -> FsspecStore:
    """Raises: LogError if no filesystem is known for the URL's scheme."""
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise LogError(f"log {url}: {error}") from error
    return FsspecStore(filesystem, root)


class FsspecStore:
    """Implements stores.Store."""

    def __init__(self, filesystem: Any, root: str) -> None:
        self._fs = filesystem
        self._root = root.rstrip("/")
        self._creating = threading.Lock()
        self._known: dict[str, Chunks] = {}

    def close(self) -> None:
        """Nothing is held."""

    def create(self, name: str, data: bytes) -> None:
        self.create_at(self._path(name), data, name=name)

    def create_at(self, path: str, data: bytes, *, name: str) -> None:
        """Create one object of the filesystem; `name` is for errors."""
        # Where the filesystem only looks before it writes, threads of this process at least take turns.
        with self._errors(name), self._creating:
            self._make_folder(path)
            try:
                self._fs.pipe_file(path, data, mode="create")
            except FileExistsError as error:
                raise StoreExistsError(f"object {name}: it is there already") from error

    def replace(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._errors(name):
            self._make_folder(path)
            self._fs.pipe_file(path, data)

    def open_segment(self, name: str) -> FsspecSegment:
        check_name(name)
        if self._chunks(name):
            raise StoreExistsError(f"object {name}: it is there already")
        self.create_at(f"{self._path(name)}@{_BEGUN}", b"", name=name)  # of two writers one gets the name
        return FsspecSegment(self, name)

    def read(self, name: str, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        end = None if num_bytes is None else start + num_bytes
        with self._errors(name):
            chunks = self._known_chunks(name, end)
            if not chunks:
                if self._fs.isfile(self._path(name)):
                    return bytes(self._fs.cat_file(self._path(name), start=start, end=end))
                raise StoreMissingError(f"object {name}: it is not in the store")
            pieces = []
            for offset, path, size in chunks:
                low = max(start - offset, 0)
                high = size if end is None else min(end - offset, size)
                if low < high:
                    pieces.append(bytes(self._fs.cat_file(path, start=low, end=high)))
            return b"".join(pieces)

    def size(self, name: str) -> int:
        with self._errors(name):
            chunks = self._chunks(name)
            if chunks:
                offset, _, size = chunks[-1]
                return offset + size
            return int(self._fs.size(self._path(name)))

    def list(self, prefix: str) -> Names:
        names = {name.partition("@")[0] for name in self._names(prefix.rpartition("/")[0])}
        return sorted(n for n in names if n.startswith(prefix) and not n.startswith(f"{ASIDE}/"))

    def delete(self, name: str) -> None:
        with self._errors(name):
            # The first chunk goes last: as long as it is there, nobody else gets the name.
            for path in self._paths(name):
                self._fs.rm_file(path)
            self._known.pop(name, None)

    def set_aside(self, name: str) -> None:
        with self._errors(name):
            paths = self._paths(name)
            self._known.pop(name, None)
            if not paths:
                raise StoreMissingError(f"object {name}: it is not in the store")
            for path in paths:
                target = f"{self._root}/{ASIDE}/{path[len(self._root) + 1 :].replace('/', '-')}"
                self._make_folder(target)
                if self._fs.exists(target):
                    self._fs.rm_file(target)
                self._fs.mv(path, target)

    def _path(self, name: str) -> str:
        check_name(name)
        return f"{self._root}/{name}"

    def chunk_path(self, name: str, start: int) -> str:
        return f"{self._path(name)}@{start:0{_OFFSET_DIGITS}d}"

    def _make_folder(self, path: str) -> None:
        # Buckets have no folders, and making one does nothing there.
        self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def _names(self, folder: str) -> Names:
        top = f"{self._root}/{folder}" if folder else self._root
        self._fs.invalidate_cache(top)
        try:
            found = self._fs.find(top)
        except FileNotFoundError:
            return []
        start = len(self._fs._strip_protocol(self._root)) + 1
        return [self._fs._strip_protocol(path)[start:] for path in found]

    def _paths(self, name: str) -> Names:
        """Of all objects that hold this one, the last chunk first."""
        chunks = self._chunks(name)
        if chunks:
            return [path for _, path, _ in reversed(chunks)]
        path = self._path(name)
        return [path] if self._fs.isfile(path) else []

    def _known_chunks(self, name: str, end: int | None) -> Chunks:
        """A chunk never changes, so the store is asked again only for bytes behind those that are known."""
        known = self._known.get(name, [])
        if not known or end is None or end > known[-1][0] + known[-1][2]:
            known = self._chunks(name)
            if len(self._known) >= KNOWN_SEGMENTS_MAX:
                self._known.clear()
            self._known[name] = known
        return known

    def _chunks(self, name: str) -> Chunks:
        """(offset, path, size in bytes) of a segment's chunks, in order; empty: it is no segment."""
        check_name(name)
        found: Chunks = []
        for one in self._names(name.rpartition("/")[0]):
            whole, at, offset = one.partition("@")
            if at and whole == name and offset == _BEGUN:
                found.append((0, f"{self._root}/{one}", 0))
            elif at and whole == name and offset.isdigit():
                path = f"{self._root}/{one}"
                found.append((int(offset), path, int(self._fs.size(path))))
        return sorted(found, key=lambda chunk: (chunk[0], chunk[2]))

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except ParamServerError:
            raise
        except FileNotFoundError as error:
            raise StoreMissingError(f"object {name}: it is not in the store") from error
        except Exception as error:
            raise LogError(f"object {name}: {type(error).__name__}: {error}") from error


class FsspecSegment:
    """Implements stores.SegmentWriter: what is appended between two syncs becomes one object."""

    def __init__(self, store: FsspecStore, name: str) -> None:
        self._store = store
        self._name = name
        self._mutex = threading.Lock()
        self._syncing = threading.Lock()
        self._pieces: list[bytes] = []
        self._num_bytes = 0
        self._durable_bytes = 0
        self._failed = ""

    def append(self, *pieces: bytes) -> int:
        with self._mutex:
            self._check()
            start = self._num_bytes
            self._pieces.extend(pieces)
            self._num_bytes += sum(len(piece) for piece in pieces)
            return start

    def sync(self) -> None:
        # Whoever waits here finds, mostly, that the one before has written its bytes too.
        with self._syncing:
            with self._mutex:
                self._check()
                chunk, start = b"".join(self._pieces), self._durable_bytes
                self._pieces = []
            if not chunk:
                return
            try:
                self._store.create_at(self._store.chunk_path(self._name, start), chunk, name=self._name)
            except LogError as error:
                self._failed = str(error)
                raise
            self._durable_bytes = start + len(chunk)

    def close(self) -> None:
        self._failed = self._failed or "closed"

    def _check(self) -> None:
        if self._failed:
            raise LogError(f"object {self._name}: it takes nothing more ({self._failed})")
