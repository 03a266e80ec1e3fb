"""Files that survive a crash: written beside, fsynced, then given their name in one step."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

TEMPORARY_PREFIX = "."
_number = itertools.count()


def write_durable(path: Path, data: bytes) -> None:
    """Give `path` this content at once; its name is durable after fsync_directory on its parent."""
    temporary = _write_temporary(path, data)
    os.replace(temporary, path)


def create_durable(path: Path, data: bytes) -> None:
    """Create `path` with this content, durably, in one step.

    Raises: FileExistsError if it is there already; then nothing has changed.
    """
    temporary = _write_temporary(path, data)
    try:
        # A rename would replace silently; a link refuses.
        os.link(temporary, path)
    finally:
        os.unlink(temporary)
    fsync_directory(path.parent)


def fsync_directory(directory: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_directory(directory: Path) -> None:
    """Remove a folder of plain files; one that is not there is fine."""
    if not directory.is_dir():
        return
    for path in directory.iterdir():
        path.unlink(missing_ok=True)
    directory.rmdir()


def _write_temporary(path: Path, data: bytes) -> Path:
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{next(_number)}")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return temporary
