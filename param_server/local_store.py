"""A store in a local folder: fsync must mean what it says there."""

from __future__ import annotations

import fcntl
import itertools
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from param_server.durable_files import (
    create_durable,
    fsync_directory,
    make_directories,
    write_durable,
)
from param_server.errors import LogError, StoreExistsError, StoreMissingError
from param_server.stores import check_name

TEMPORARY_PREFIX = "."
ASIDE = "damaged"
_LOCK_PREFIX = "lock-"


class LocalStore:
    """Implements stores.Store. Several owners, one process each, may share a folder."""

    def __init__(self, folder: Path, *, owner: str = "") -> None:
        """Open the folder; an owner makes it, holds its lock and removes what its last life left unfinished.

        Raises: LogError if the folder cannot be used or another process is this owner.
        """
        self.folder = folder
        self._owner = owner
        self._numbers = itertools.count()
        self._lock: int | None = None
        if not owner:
            if not folder.is_dir():
                raise LogError(f"log {folder}: there is no such folder")
            return
        try:
            make_directories(folder)
            self._lock = os.open(folder / f"{_LOCK_PREFIX}{owner}", os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise LogError(f"log {folder}: cannot be used ({error})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise LogError(f"log {folder}: another process has it open as {owner}") from error
        for path in folder.rglob(f"{TEMPORARY_PREFIX}{owner}-*"):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let another process be this owner."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def create(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._errors(name):
            make_directories(path.parent)
            try:
                create_durable(path, data, temporary=self._temporary(path))
            except FileExistsError as error:
                raise StoreExistsError(f"object {name}: it is there already") from error

    def replace(self, name: str, data: bytes) -> None:
        path = self._path(name)
        with self._errors(name):
            make_directories(path.parent)
            write_durable(path, data, temporary=self._temporary(path))
            fsync_directory(path.parent)

    def open_segment(self, name: str) -> LocalSegment:
        path = self._path(name)
        with self._errors(name):
            make_directories(path.parent)
            try:
                descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
            except FileExistsError as error:
                raise StoreExistsError(f"object {name}: it is there already") from error
            try:
                fsync_directory(path.parent)
            except OSError:
                os.close(descriptor)
                path.unlink(missing_ok=True)
                raise
            return LocalSegment(descriptor, name=name)

    def read(self, name: str, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        with self._errors(name), self._path(name).open("rb", buffering=0) as file:
            if start:
                file.seek(start)
            if num_bytes is None:
                return file.readall()
            pieces = []
            while num_bytes > 0:
                piece = file.read(num_bytes)  # at most 2 GiB come at once
                if not piece:
                    break
                pieces.append(piece)
                num_bytes -= len(piece)
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def size(self, name: str) -> int:
        with self._errors(name):
            return self._path(name).stat().st_size

    def list(self, prefix: str) -> list[str]:
        with self._errors(prefix):
            top = self.folder / prefix.rpartition("/")[0]
            names = (
                path.relative_to(self.folder).as_posix()
                for path in top.rglob("*")
                if path.is_file() and not path.name.startswith((TEMPORARY_PREFIX, _LOCK_PREFIX))
            )
            return sorted(n for n in names if n.startswith(prefix) and not n.startswith(f"{ASIDE}/"))

    def delete(self, name: str) -> None:
        with self._errors(name):
            self._path(name).unlink(missing_ok=True)

    def set_aside(self, name: str) -> None:
        path = self._path(name)
        with self._errors(name):
            make_directories(self.folder / ASIDE)
            os.replace(path, self.folder / ASIDE / name.replace("/", "-"))
            fsync_directory(self.folder / ASIDE)
            fsync_directory(path.parent)

    def _path(self, name: str) -> Path:
        check_name(name)
        return self.folder / name

    def _temporary(self, path: Path) -> Path:
        if not self._owner:
            raise LogError(f"log {self.folder}: it is open for reading only")
        return path.with_name(f"{TEMPORARY_PREFIX}{self._owner}-{os.getpid()}-{next(self._numbers)}")

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise StoreMissingError(f"object {name}: it is not in the log's folder {self.folder}") from error
        except OSError as error:
            raise LogError(f"object {name}: {error.strerror or error}") from error


class LocalSegment:
    """Implements stores.SegmentWriter: one fdatasync serves every thread that waits for it."""

    def __init__(self, descriptor: int, *, name: str) -> None:
        self._descriptor = descriptor
        self._name = name
        self._changed = threading.Condition()
        self._num_bytes = 0
        self._durable_bytes = 0
        self._syncing = False
        self._failed = ""

    def append(self, *pieces: bytes) -> int:
        with self._changed:
            self._check()
            start = self._num_bytes
            total = sum(len(piece) for piece in pieces)
            try:
                written = os.pwritev(self._descriptor, pieces, start)
                if written < total:  # a full disk takes a part before it says so
                    rest = memoryview(b"".join(pieces))[written:]
                    while rest:
                        done = os.pwrite(self._descriptor, rest, total + start - len(rest))
                        rest = rest[done:]
            except OSError as error:
                # A full disk must get its room back: without it not even a new generation can be opened.
                with suppress(OSError):
                    os.ftruncate(self._descriptor, start)
                raise LogError(f"object {self._name}: {error.strerror or error}") from error
            self._num_bytes += total
            return start

    def sync(self) -> None:
        with self._changed:
            target = self._num_bytes
            while self._durable_bytes < target:
                self._check()
                if self._syncing:
                    self._changed.wait()
                else:
                    self._sync_for_all()
            self._check()

    def _sync_for_all(self) -> None:
        """One sync for all that was appended so far; the mutex is free meanwhile, so others may append."""
        covered = self._num_bytes
        self._syncing = True
        self._changed.release()
        failed = ""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            # The system may have thrown the pages away and may answer "fine" to the next sync.
            failed = error.strerror or str(error)
        finally:
            self._changed.acquire()
            self._syncing = False
            self._failed = self._failed or failed
            if not failed:
                self._durable_bytes = max(self._durable_bytes, covered)
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            if self._descriptor >= 0:
                while self._syncing:
                    self._changed.wait()
                os.close(self._descriptor)
                self._descriptor = -1
                self._failed = self._failed or "closed"

    def _check(self) -> None:
        if self._failed:
            raise LogError(f"object {self._name}: it takes nothing more ({self._failed})")
