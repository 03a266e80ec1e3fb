"""The manifest of a checkpoint: what it is of and each file with its size and CRC32C; it proves itself.

Plain JSON whose first key is the CRC32C of all that follows, so that one file, created last, is the commit.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from param_server.client import crc32c
from trainer.errors import CheckpointError, DamagedError
from trainer.stream.columns import Position

MANIFEST = "manifest.json"
FORMAT = "freshet.checkpoint.2"

FileKind = Literal["rows", "ids", "state", "dense"]

_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,200}", re.ASCII)
_HEAD = re.compile(rb'\{"crc32c":"([0-9a-f]{8})",')
_HEAD_BYTES = len('{"crc32c":"00000000",')


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a checkpoint."""

    name: str
    kind: FileKind
    table: str = ""
    """For rows and ids."""
    rank: int = 0
    """Who wrote it."""
    num_bytes: int
    crc32c: int

    def __post_init__(self) -> None:
        if not _FILE_NAME.fullmatch(self.name):
            raise ValueError(f"'{self.name[:80]}' is not a file name of a checkpoint")


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint is of and what it consists of."""

    format: str = FORMAT
    step: int
    created_ms: int
    generation: int
    published: str
    """The newest version that was acknowledged when the state was copied; empty = none."""
    topic_id: str
    """The id that the broker gave the topic of the positions; empty where it gives none."""
    world_size: int
    """0 = imported: no rank's state beside the rows."""
    schema_hash: str
    config_hash: str
    positions: list[Position]
    """The next impression to train of every partition."""
    slots_per_rank: dict[str, int]
    counters: dict[str, int]
    dead_letters: dict[str, int]
    files: list[FileEntry]

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.files)

    def entries(self, kind: FileKind, *, table: str = "", rank: int | None = None) -> list[FileEntry]:
        """The files of a kind, of one table and rank if asked, in the order of their names."""
        found = [
            entry
            for entry in self.files
            if entry.kind == kind and entry.table == table and rank in (None, entry.rank)
        ]
        return sorted(found, key=lambda entry: (entry.rank, entry.name))


def entry_of(name: str, data: bytes, *, kind: FileKind, table: str = "", rank: int = 0) -> FileEntry:
    return FileEntry(name=name, kind=kind, table=table, rank=rank, num_bytes=len(data), crc32c=crc32c(data))


def encode_manifest(manifest: CheckpointManifest) -> bytes:
    body = msgspec.json.encode(manifest)
    return b'{"crc32c":"%08x",' % crc32c(body) + body[1:]


def decode_manifest(data: bytes, *, where: str) -> CheckpointManifest:
    """Raises: DamagedError if its CRC does not match, CheckpointError if it is of another format."""
    head = _HEAD.match(data)
    body = b"{" + data[_HEAD_BYTES:]
    if head is None or int(head.group(1), 16) != crc32c(body):
        found = "none" if head is None else head.group(1).decode()
        raise DamagedError(
            f"{where}: {len(data)} bytes, expected CRC32C {found} as it says, found {crc32c(body):08x}; "
            "it is torn or damaged"
        )
    try:
        manifest = msgspec.json.decode(body, type=CheckpointManifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{where}: {error}; this build reads '{FORMAT}'") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{where}: format '{manifest.format}', this build reads '{FORMAT}'")
    return manifest
