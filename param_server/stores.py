"""The seam under the version log: a store of named objects, on a disk, in a bucket or in a test.

A name is 1..8 parts joined by "/", each of a-z A-Z 0-9 _ . - and without a dot in front. What a store
promises is held by one suite of tests, tests/param_server/store_contract.py, that every store passes.
"""

from __future__ import annotations

import re
from typing import Protocol, runtime_checkable

from param_server.errors import LogError

NAME_PARTS_MAX = 8
_NAME = re.compile(rf"[\w-][\w.-]*(/[\w-][\w.-]*){{0,{NAME_PARTS_MAX - 1}}}", re.ASCII)


@runtime_checkable
class SegmentWriter(Protocol):
    """An object that grows at its end; safe for many threads, which share a sync where they can."""

    def append(self, *pieces: bytes) -> int:
        """Add the pieces, one after the other, and answer the offset of the first in bytes.

        They are not durable, and may not be readable, before `sync` has returned. After an error nothing
        of them counts: the next append begins at the same offset.
        """

    def sync(self) -> None:
        """Everything appended before this call is durable when it returns.

        Raises: LogError if that is not known; then the segment takes nothing more: begin another.
        """

    def close(self) -> None:
        """Appended bytes that were never synced may be lost."""


@runtime_checkable
class Store(Protocol):
    """Objects by name. Every call raises LogError, naming the object, for what the system refuses."""

    def create(self, name: str, data: bytes) -> None:
        """Whole and durable when it returns, or not there at all; of several creators one succeeds.

        Raises: StoreExistsError if it is there already; then nothing has changed.
        """

    def replace(self, name: str, data: bytes) -> None:
        """Give the object this content; after a crash it has the old one or the new one, whole."""

    def open_segment(self, name: str) -> SegmentWriter:
        """Begin an object that is appended to. Raises: StoreExistsError."""

    def read(self, name: str, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Up to num_bytes bytes from `start` (None: all that follow); fewer where the object ends.

        Raises: StoreMissingError.
        """

    def size(self, name: str) -> int:
        """In bytes. Raises: StoreMissingError."""

    def list(self, prefix: str) -> list[str]:
        """All names that begin with the prefix, sorted; objects set aside are not among them."""

    def delete(self, name: str) -> None:
        """Gone for readers when it returns, durably or not; an object that is not there is fine."""

    def close(self) -> None:
        """Let go of locks; nothing is read or written after it."""

    def set_aside(self, name: str) -> None:
        """Move a damaged object out of the way, for a human to look at; replaces one of the same name.

        Raises: StoreMissingError.
        """


def check_name(name: str) -> None:
    """Raises: LogError for what is no name; so no name leads out of the store."""
    if len(name) > 512 or not _NAME.fullmatch(name):
        raise LogError(f"store: expected a name of plain parts joined by '/', found '{name[:80]}'")
