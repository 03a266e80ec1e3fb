"""The store that a command line names."""

from __future__ import annotations

from pathlib import Path

from param_server.local_store import LocalStore
from param_server.stores import Store


def open_store(url: str, *, owner: str = "") -> Store:
    """The store that a command line names: a folder, or scheme://... for any fsspec filesystem.

    Args: owner: the one writer of this name, for example "shard-0"; a folder is locked for it. Empty:
        the store is only read.
    Raises: LogError if it cannot be used or another process is this owner.
    """
    if "://" in url:
        # A folder need not wait for the import of fsspec, a tenth of a second.
        from param_server.fsspec_store import open_fsspec_store

        return open_fsspec_store(url)
    return LocalStore(Path(url), owner=owner)
