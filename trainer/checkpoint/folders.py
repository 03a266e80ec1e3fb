"""The folders of a checkpoint directory: their names, which of them are whole, and which may go.

```
checkpoints/
  step-000000001200.000002.000007/   step, lease generation of the writer, number of its save
    dim16.rank0.00000.rowseg         ... all files first
    manifest.json                    created last: now the checkpoint exists
  damaged-step-.../                  set aside at a start
  lease/000002.json                  who writes here (trainer/checkpoint/lease.py)
  LATEST                             names the newest, for people and scripts; never read here
```

No two saves share a folder, not even two of one step: what a dead or a fenced writer left behind cannot mix
with another's files. Newer means: of a later lease, then of a later save.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from param_server.client import crc32c
from trainer.checkpoint.manifest import (
    MANIFEST,
    CheckpointManifest,
    FileEntry,
    decode_manifest,
)
from trainer.checkpoint.store import DAMAGED, DAMAGED_PREFIX, Store
from trainer.errors import CheckpointError, DamagedError

LATEST = "LATEST"
DAMAGED_KEPT = 3
"""Checkpoints that were set aside are kept for a look, but not for ever."""

_NAME = re.compile(r"step-([0-9]{12,18})\.([0-9]{6,9})\.([0-9]{6,9})", re.ASCII)


class Folder(NamedTuple):
    """The name of a checkpoint; sorts from old to new."""

    lease: int
    save: int
    step: int

    def __str__(self) -> str:
        return f"step-{self.step:012d}.{self.lease:06d}.{self.save:06d}"


def parse_folder(name: str) -> Folder | None:
    found = _NAME.fullmatch(name)
    if found is None:
        return None
    step, lease, save = (int(number) for number in found.groups())
    return Folder(lease=lease, save=save, step=step)


class Listing(NamedTuple):
    """All folders of a directory, each list from old to new."""

    committed: list[Folder]
    unfinished: list[Folder]
    """Without a manifest: a save on its way, or what is left of one."""
    set_aside: list[str]


def list_folders(store: Store) -> Listing:
    """Raises: CheckpointError for a folder that another build must have made: it is not to be overlooked."""
    listing = Listing([], [], [])
    for name in store.names():
        folder = parse_folder(name)
        if name.startswith(DAMAGED_PREFIX):
            listing.set_aside.append(name)
        if folder is None:
            if name.startswith("step-"):
                raise CheckpointError(
                    f"{store.root}/{name}: is not a name that this build gives; another one made it. Move it "
                    "away, or use another checkpoint directory"
                )
            continue
        files = store.names(name)
        if DAMAGED in files:
            listing.set_aside.append(name)
        elif MANIFEST in files:
            listing.committed.append(folder)
        else:
            listing.unfinished.append(folder)
    return Listing(sorted(listing.committed), sorted(listing.unfinished), sorted(listing.set_aside))


def read_manifest(store: Store, folder: Folder) -> CheckpointManifest:
    """Raises: DamagedError naming the file; CheckpointError for another format."""
    where = f"{store.root}/{folder}/{MANIFEST}"
    try:
        data = store.read(f"{folder}/{MANIFEST}")
    except FileNotFoundError as error:
        raise DamagedError(f"{where}: is missing or cannot be read") from error
    return decode_manifest(data, where=where)


def read_file(store: Store, folder: Folder, entry: FileEntry) -> bytes:
    """Raises: DamagedError if the file is missing, of another size or of another CRC."""
    where = f"{store.root}/{folder}/{entry.name}"
    expected = f"expected {entry.num_bytes} bytes with CRC32C {entry.crc32c:08x}"
    try:
        data = store.read(f"{folder}/{entry.name}")
    except FileNotFoundError as error:
        raise DamagedError(f"{where}: {expected}, the file is missing or cannot be read") from error
    found = crc32c(data)
    if (len(data), found) != (entry.num_bytes, entry.crc32c):
        raise DamagedError(
            f"{where}: {expected}, found {len(data)} bytes with CRC32C {found:08x}; the file is damaged"
        )
    return data


def check_files(store: Store, folder: Folder, entries: Iterable[FileEntry]) -> None:
    """Read files one by one. Raises: DamagedError naming the first that is damaged."""
    for entry in entries:
        read_file(store, folder, entry)


def verify(store: Store, folder: Folder) -> CheckpointManifest:
    """Check every file's size and CRC. Raises: DamagedError naming the file, expected and found."""
    manifest = read_manifest(store, folder)
    check_files(store, folder, manifest.files)
    return manifest


def remove_checkpoint(store: Store, name: str) -> None:
    """The manifest goes first: what a crash leaves of the rest is unfinished, not damaged."""
    store.remove(f"{name}/{MANIFEST}")
    store.remove(name)


def retain(
    store: Store, newest: Folder, *, keep: int, keep_s: int, keep_max: int, now_ms: int
) -> list[Folder]:
    """Delete what is neither among the newest `keep` nor younger than `keep_s`; at most `keep_max` stay.

    What unfinished saves left behind goes too: all but `newest`'s lease is dead, and each lease has one
    save on its way.
    Returns: the checkpoints deleted.
    """
    listing = list_folders(store)
    deleted = []
    for index, folder in enumerate(reversed(listing.committed)):
        if index < keep or folder >= newest:
            continue
        if index >= keep_max or not _is_young(store, folder, keep_s=keep_s, now_ms=now_ms):
            remove_checkpoint(store, str(folder))
            deleted.append(folder)
    for folder in listing.unfinished:
        if folder < newest:
            store.remove(str(folder))
    for name in listing.set_aside[:-DAMAGED_KEPT]:
        remove_checkpoint(store, name)
    return deleted


def _is_young(store: Store, folder: Folder, *, keep_s: int, now_ms: int) -> bool:
    if keep_s == 0:
        return False
    try:
        return now_ms - read_manifest(store, folder).created_ms < keep_s * 1000
    except CheckpointError:
        return False  # damaged or of an older format: nothing that could be gone back to
