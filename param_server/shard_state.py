"""What a shard says of itself and of its log, as frozen types that both ends of the wire use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from param_server.manifest import Manifest, Version


@dataclass(frozen=True, slots=True)
class ShardState:
    """A shard's answer to `status`."""

    head: Version | None
    fenced_generation: int
    """Writers below it are over."""
    num_versions: int
    num_full: int
    num_delta: int
    num_rows: int
    bytes_published: int
    num_subscribers: int
    subscribers: tuple[str, ...]
    """The names of the replicas that follow."""
    damage: tuple[str, ...]
    fenced_by: str = ""
    """The name of the writer that opened the fenced generation; empty: none did."""
    shard: int = 0
    num_shards: int = 1
    num_snapshots: int = 0
    memory_bytes: int = 0
    num_left_out: int = 0
    """How often a row left memory, or never entered it, for the memory budget."""
    num_cut_off: int = 0
    """Subscribers that fell too far behind."""
    refused: dict[str, int] = field(default_factory=dict)
    """What writers sent and this shard refused, by the error's name."""
    num_rows_refused: int = 0
    """Rows that were not finite; the version that brought them was refused with them."""


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """One version in the log."""

    version: Version
    parent: Version | None
    kind: Literal["full", "delta"]
    has_snapshot: bool
    num_rows: int
    num_deletes: int
    num_bytes: int
    created_ms: int
    rollback_of: Version | None


def version_info(manifest: Manifest, *, has_snapshot: bool) -> VersionInfo:
    return VersionInfo(
        version=manifest.version,
        parent=manifest.parent,
        kind=manifest.kind,
        has_snapshot=has_snapshot,
        num_rows=sum(blob.num_rows for blob in manifest.rows_blobs),
        num_deletes=sum(blob.num_deletes for blob in manifest.rows_blobs),
        num_bytes=manifest.num_bytes,
        created_ms=manifest.created_ms,
        rollback_of=manifest.rollback_of,
    )
