"""Rollback: a new version with an older version's content. Replicas only ever move forward.

Only ids that a version after the old one touched can differ, so a delta with the old rows of these, and a
delete for each of them that the old version does not have, is the whole difference. Where a full version
lies between, or recovery has set one aside and what it touched is not known, the new version is full too. So
it is where rows say when they were last seen: replicas with lifetimes have let rows go by the later versions'
event time, which no version names.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import msgspec
import numpy as np

from feature_eviction import owner_of
from param_server.errors import GapError
from param_server.log_order import chain_to
from param_server.manifest import SHARED_KINDS, BlobRef, Manifest, Version, blob_ref
from param_server.row_blobs import encode_rows
from param_server.version_content import Keys, rows_of_chain, segments_of, touched_by
from param_server.version_log import VersionLog
from proto.row_segment import RowSegment


@dataclass(frozen=True, slots=True)
class RollbackPlan:
    """The new version and, by name, the blobs that must be staged for it."""

    manifest: Manifest
    blobs: list[tuple[BlobRef, bytes]]


def plan_rollback(log: VersionLog, old: Version, *, num_shards: int, now_ms: int) -> RollbackPlan:
    """Describe the version that has the old one's dense weights, rows and deletes, bit for bit.

    Raises: MissingBlobError if the log does not have the old version (any more), GapError if it is the head.
    """
    source = log.read(old)
    head = log.head
    assert head is not None
    if old == head:
        raise GapError(f"version {old} is the head: there is nothing to roll back")
    chain = chain_to(log.entries, old)
    between = [entry.manifest for entry in log.entries if entry.manifest.version > old]
    versions = [old, *(manifest.version for manifest in between)]
    is_whole = [manifest.parent for manifest in between] == versions[:-1]
    full = not is_whole or any(manifest.kind == "full" for manifest in between)
    full = full or (source.watermark_ms < log.read(head).watermark_ms and _may_expire(chain, log))
    touched = None if full else touched_by(between, log.read_blob)
    blobs: list[tuple[BlobRef, bytes]] = []
    for shard in range(num_shards):
        rows = _restored(log, chain, touched, shard=shard, num_shards=num_shards)
        blobs += encode_rows(rows, prefix="rollback", shard=shard)
    shared = [blob for blob in source.blobs if blob.kind in SHARED_KINDS]
    for blob in source.blobs:
        if blob.kind == "dense":
            data = bytes(log.read_blob(source, blob.name))
            blobs.append((blob_ref("dense", blob.name, data), data))
    manifest = msgspec.structs.replace(
        source,
        version=_next_version(log, head),
        parent=head,
        kind="full" if full else "delta",
        blobs=(*(reference for reference, _ in blobs), *shared),
        created_ms=now_ms,
        rollback_of=old,
    )
    return RollbackPlan(manifest, blobs)


def _may_expire(chain: list[Manifest], log: VersionLog) -> bool:
    """Whether replicas can hold these rows for a lifetime: they then come with when they were last seen."""
    for _, _, segment in segments_of(chain, log.read_blob):
        if len(segment):
            return segment.last_seen_s_N is not None
    return False


def _next_version(log: VersionLog, head: Version) -> Version:
    """Of the generation that may write: its trainer is not fenced, it learns of this at its next version."""
    if log.fenced_generation > head.generation:
        return Version(log.fenced_generation, 1)
    return Version(head.generation, head.sequence + 1)


def _restored(
    log: VersionLog,
    chain: list[Manifest],
    touched: dict[str, tuple[Keys, int]] | None,
    *,
    shard: int,
    num_shards: int,
) -> Iterator[RowSegment]:
    """One shard's rows of the old version and, in a delta, the deletes of what it does not have."""
    if touched is None:
        yield from rows_of_chain(chain, log.read_blob, shard=shard)
        return
    found: dict[str, list[Keys]] = {}
    only = {name: keys_N for name, (keys_N, _) in touched.items()}
    for segment in rows_of_chain(chain, log.read_blob, shard=shard, only=only):
        if len(segment):
            found.setdefault(segment.table, []).append(segment.ids_N)
            yield segment
    for name, (keys_N, dim) in sorted(touched.items()):
        own_N = keys_N[owner_of(keys_N, num_owners=num_shards) == shard] if num_shards > 1 else keys_N
        deleted_M = np.setdiff1d(own_N, np.concatenate([*found.get(name, []), _NO_KEYS]), assume_unique=True)
        if len(deleted_M):
            yield RowSegment(name, _NO_KEYS, np.zeros((0, dim), np.float32), deleted_M)


_NO_KEYS = np.zeros(0, np.int64)
