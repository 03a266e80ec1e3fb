"""Files that survive a crash: written beside, fsynced, then given their name in one step."""

from __future__ import annotations

import os
from pathlib import Path


def write_durable(path: Path, data: bytes, *, temporary: Path) -> None:
    """Give `path` this content at once; its name is durable after fsync_directory on its parent.

    Args: temporary: a free name in the same folder.
    """
    _write(temporary, data)
    os.replace(temporary, path)


def create_durable(path: Path, data: bytes, *, temporary: Path) -> None:
    """Create `path` with this content, durably, in one step.

    Raises: FileExistsError if it is there already; then nothing has changed.
    """
    _write(temporary, data)
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


def make_directories(directory: Path) -> None:
    """Make a folder and those above it, each name durable; those that are there are fine."""
    if directory.is_dir():
        return
    make_directories(directory.parent)
    try:
        os.mkdir(directory)
    except FileExistsError:
        return
    fsync_directory(directory.parent)


def _write(temporary: Path, data: bytes) -> None:
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        temporary.unlink(missing_ok=True)  # a full disk must get its room back
        raise
