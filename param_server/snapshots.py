"""Snapshots: the whole content of a version, made by the coordinating shard beside its work.

A snapshot of version V is a manifest of kind "full" with V's number and content. A reader that holds nothing
begins with it, and retention counts it as a full version, so a trainer need not send full ones. It is made
from the log and not from a row store: the log has every row with its columns, also those that are not in
memory, and no commit has to wait.
"""

from __future__ import annotations

import msgspec

from param_server.failpoints import reach
from param_server.manifest import SHARED_KINDS, BlobRef, Manifest, Version
from param_server.row_blobs import encode_rows
from param_server.version_content import rows_of_chain
from param_server.version_log import VersionLog


def num_since_base(log: VersionLog) -> int:
    """How many deltas a reader that holds nothing must load after the newest full version or snapshot."""
    return max(0, len(log.plan_after(None)) - 1)


def make_snapshot(log: VersionLog, version: Version, *, num_shards: int) -> Manifest | None:
    """Write the content of a version as one, in four steps:

      1. its rows, shard by shard, and its dense blob are appended to segments of their own
      2. they are made durable
      3. the snapshot's manifest is created: from here on readers begin with it
      4. (the caller) retention drops what it made superfluous

    Returns: the snapshot; None: retention dropped the version meanwhile.
    Raises: LogError, LogDamageError, MissingBlobError; then nothing names what was appended.
    """
    manifest = log.read(version)
    chain = log.chain_to(version)
    blobs: list[BlobRef] = []
    log.roll_segment()
    for shard in range(num_shards):
        rows = rows_of_chain(chain, log.read_blob, shard=shard)
        for reference, data in encode_rows(rows, prefix="snapshot", shard=shard):
            blobs.append(_appended(log, version, reference, data))
    for blob in manifest.blobs:
        if blob.kind in SHARED_KINDS:
            blobs.append(blob)
        elif blob.kind == "dense":
            blobs.append(_appended(log, version, blob, bytes(log.read_blob(manifest, blob.name))))
    reach("snapshot_appended")
    log.roll_segment()
    log.sync()
    reach("snapshot_synced")
    snapshot = msgspec.structs.replace(manifest, kind="full", blobs=tuple(blobs))
    made = log.add_snapshot(snapshot)
    reach("snapshot_created")
    return snapshot if made else None


def _appended(log: VersionLog, version: Version, reference: BlobRef, data: bytes) -> BlobRef:
    segment, segment_offset = log.append_snapshot(version, name=reference.name, data=data)
    return msgspec.structs.replace(reference, segment=segment, segment_offset=segment_offset)
