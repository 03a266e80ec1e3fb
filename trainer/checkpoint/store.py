"""Where checkpoints lie: a local directory or any fsspec address, behind the few calls that a commit needs.

What differs between the two:

  |             | local directory                       | fsspec store (s3, gcs, memory, ...)        |
  |-------------|---------------------------------------|--------------------------------------------|
  | a file      | temporary name, fsync, rename, fsync  | one object, put with one request           |
  | appears     | of its folder: whole or not at all    |                                            |
  | create, if  | link(2): exact                        | mode="create": exact in s3fs, gcsfs and    |
  | not there   |                                       | memory; a look before the write elsewhere  |
  | lock        | flock: free once its holder is dead   | none: a lease with a time                  |
  | damaged     | renamed `damaged-...`                 | listed: a file DAMAGED in it               |
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem

from trainer.errors import CheckpointError, StoreError
from trainer.failpoints import reach

DAMAGED = "DAMAGED"
"""The file that lists a checkpoint as damaged where a folder cannot be renamed."""
DAMAGED_PREFIX = "damaged-"


class Store(Protocol):
    """Files by name, at most one folder deep. All raise StoreError where the store fails."""

    root: str
    """For messages and for people."""
    has_locks: bool

    def write(self, name: str, data: bytes, *, inside: str = "") -> None:
        """Put a file there, durable when this returns, an older one replaced.

        Args: inside: a failpoint to reach when some bytes are written.
        """

    def create(self, name: str, data: bytes, *, inside: str = "") -> None:
        """Like write. Raises: FileExistsError if the file is there already."""

    def read(self, name: str) -> bytes:
        """Raises: FileNotFoundError."""

    def names(self, folder: str = "") -> list[str]:
        """What lies in a folder, sorted, without hidden files; nothing for a folder that is not there."""

    def remove(self, name: str) -> None:
        """Remove a file, or a folder with all in it; one that is not there is removed already."""

    def set_aside(self, folder: str, *, reason: str) -> None:
        """Take a damaged checkpoint out of the way without losing it."""

    def lock(self) -> IO[bytes] | None:
        """Held until the returned file is closed or this process dies; None where the store has no locks.

        Raises: BlockingIOError if another process holds it.
        """


def open_store(root: str) -> Store:
    """The store of a local path or of an fsspec address; creates nothing.

    Raises: CheckpointError if no installed package knows the address.
    """
    try:
        filesystem, path = fsspec.core.url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise CheckpointError(
            f"checkpoint directory '{root}': {error}. Use a local path, or an address whose fsspec package "
            "is installed"
        ) from error
    if isinstance(filesystem, LocalFileSystem):
        return LocalStore(Path(path))
    return FsspecStore(filesystem, path, root=root)


class LocalStore:
    """A directory of a file system that knows rename, link, fsync and flock."""

    has_locks = True

    def __init__(self, root: Path) -> None:
        self._root = root
        self.root = str(root)

    def write(self, name: str, data: bytes, *, inside: str = "") -> None:
        with _local_errors(self._root / name):
            temporary, final = self._write_temporary(name, data, inside=inside)
            os.replace(temporary, final)
            _fsync_directory(final.parent)

    def create(self, name: str, data: bytes, *, inside: str = "") -> None:
        with _local_errors(self._root / name):
            temporary, final = self._write_temporary(name, data, inside=inside)
        with _local_errors(final, passing=FileExistsError):
            try:
                os.link(temporary, final)  # unlike a rename it fails where the name is taken
            finally:
                temporary.unlink()
            _fsync_directory(final.parent)

    def _write_temporary(self, name: str, data: bytes, *, inside: str) -> tuple[Path, Path]:
        final = self._root / name
        self._make_folder(final.parent)
        temporary = final.with_name(f".{final.name}.tmp")
        view, half = memoryview(data), len(data) // 2
        with temporary.open("wb") as file:
            file.write(view[:half])
            if inside:
                file.flush()
                reach(inside)
            file.write(view[half:])
            file.flush()
            os.fsync(file.fileno())
        return temporary, final

    def _make_folder(self, folder: Path) -> None:
        """With its name durable: a file in a folder whose own name is lost would be lost with it."""
        if folder.is_dir():
            return
        folder.mkdir(parents=True, exist_ok=True)
        _fsync_directory(folder.parent)

    def read(self, name: str) -> bytes:
        path = self._root / name
        with _local_errors(path, passing=FileNotFoundError):
            try:
                return path.read_bytes()
            except (IsADirectoryError, NotADirectoryError) as error:
                raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from error
            except OSError as error:
                if error.errno == errno.EIO:  # sectors that cannot be read: what was there is lost
                    raise FileNotFoundError(errno.ENOENT, error.strerror, str(path)) from error
                raise

    def names(self, folder: str = "") -> list[str]:
        path = self._root / folder
        with _local_errors(path):
            try:
                return sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
            except FileNotFoundError:
                return []

    def remove(self, name: str) -> None:
        path = self._root / name
        with _local_errors(path), suppress(FileNotFoundError):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()

    def set_aside(self, folder: str, *, reason: str) -> None:
        path = self._root / folder
        with _local_errors(path):
            path.rename(self._root / f"{DAMAGED_PREFIX}{folder}")
            _fsync_directory(self._root)

    def lock(self) -> IO[bytes] | None:
        with _local_errors(self._root):
            self._make_folder(self._root)
            file = (self._root / ".lock").open("wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise
        return file


class FsspecStore:
    """A folder of any fsspec file system; each file is one object, put with one request."""

    has_locks = False

    def __init__(self, filesystem: Any, path: str, *, root: str) -> None:
        self._filesystem = filesystem
        self._path = path.rstrip("/")
        self.root = root.rstrip("/")

    def write(self, name: str, data: bytes, *, inside: str = "") -> None:
        reach(inside)  # an object is there whole or not at all
        with self._errors(name):
            self._filesystem.pipe_file(self._at(name), data)

    def create(self, name: str, data: bytes, *, inside: str = "") -> None:
        reach(inside)
        with self._errors(name, passing=FileExistsError):
            self._filesystem.pipe_file(self._at(name), data, mode="create")

    def read(self, name: str) -> bytes:
        with self._errors(name, passing=FileNotFoundError):
            return bytes(self._filesystem.cat_file(self._at(name)))

    def names(self, folder: str = "") -> list[str]:
        with self._errors(folder):
            self._filesystem.invalidate_cache()  # another machine may have written since
            try:
                paths = self._filesystem.ls(self._at(folder), detail=False)
            except FileNotFoundError:
                return []
        names = {path.rstrip("/").rsplit("/", 1)[-1] for path in paths}
        return sorted(name for name in names if not name.startswith("."))

    def remove(self, name: str) -> None:
        with self._errors(name), suppress(FileNotFoundError):
            self._filesystem.rm(self._at(name), recursive=True)

    def set_aside(self, folder: str, *, reason: str) -> None:
        # A rename would be a copy and a delete for each object, and could stop half way.
        self.write(f"{folder}/{DAMAGED}", reason.encode())

    def lock(self) -> IO[bytes] | None:
        return None

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}" if name else self._path

    @contextmanager
    def _errors(self, name: str, *, passing: type[OSError] | None = None) -> Iterator[None]:
        """Every package behind fsspec has exceptions of its own; here they all mean the same."""
        try:
            yield
        except Exception as error:
            if passing is not None and isinstance(error, passing):
                raise
            raise StoreError(f"{self.root}/{name}: {type(error).__name__}: {error}") from error


@contextmanager
def _local_errors(path: Path, *, passing: type[OSError] | None = None) -> Iterator[None]:
    """In our words, but for the one kind that the caller's caller asks for."""
    try:
        yield
    except OSError as error:
        if passing is not None and isinstance(error, passing):
            raise
        raise StoreError(f"{path}: {error.strerror or error}") from error


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
