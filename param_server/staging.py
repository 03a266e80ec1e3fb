"""One shard's part of versions to come: blobs are appended, made durable together, and found by name.

Programs and signatures are objects of their own, named by their content and shared by versions; everything
else is a record in this shard's segments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import msgspec

from param_server.errors import BadBlobError, LogError, MissingBlobError, StoreExistsError
from param_server.log_recovery import CONTENT, read_blob_of
from param_server.manifest import SHARED_KINDS, BlobRef, Manifest, Version
from param_server.segment_log import SegmentLog
from param_server.staged_blobs import StagedBlob, StagedBlobs
from param_server.stores import Store


class Staging:
    """Safe for many threads; those that wait for a sync share one."""

    def __init__(self, store: Store, *, segments: SegmentLog) -> None:
        self._store = store
        self._segments = segments
        self._staged = StagedBlobs()
        self._mutex = threading.Lock()

    def add(self, version: Version, *, kind: str, name: str, data: bytes, data_crc32c: int) -> None:
        """Append one blob; a repeat replaces it. Durable after `sync`. Raises: LimitError, LogError."""
        with self._mutex:
            self._staged.check_room(version)
            self._staged.pop(version, name)
            try:
                if kind in SHARED_KINDS:
                    self._create_content(name, data)
                    place = None
                else:
                    place = self._segments.append(version, name, data, data_crc32c=data_crc32c)
            except LogError:
                self._staged.forget_unsynced()
                raise
            self._staged.add(version, name, len(data), data_crc32c, place=place)

    def sync(self) -> None:
        """All that was added is durable when it returns.

        Raises: LogError; then what was not durable before must be added again.
        """
        covered = self._staged.unsynced()
        try:
            self._segments.sync()
            self._check_not_lost(covered)
        except LogError:
            with self._mutex:
                self._staged.forget_unsynced()
            raise
        with self._mutex:
            self._staged.mark_synced(covered)

    def _check_not_lost(self, covered: list[StagedBlob]) -> None:
        """Another thread's sync, or the end of a segment, may have failed with them in it."""
        lost = {
            blob.place.segment
            for blob in covered
            if blob.place is not None and self._segments.is_lost(blob.place.segment)
        }
        if lost:
            raise LogError(f"object {min(lost)}: it could not be made durable; publish the version again")

    def located(self, manifest: Manifest, *, shard: int | None) -> Manifest:
        """The manifest with the place of every blob that is durable here.

        Args: shard: only the blobs of this shard are looked at; None: of all.
        Raises: MissingBlobError, BadBlobError if a blob is not there as the manifest says.
        """
        with self._mutex:
            blobs = tuple(
                blob if shard is not None and blob.shard != shard else self._locate(manifest.version, blob)
                for blob in manifest.blobs
            )
        return msgspec.structs.replace(manifest, blobs=blobs)

    def names(self) -> set[str]:
        """Of every blob that is staged, of any version."""
        with self._mutex:
            return self._staged.names()

    def forget(self, condition: Callable[[Version], bool]) -> None:
        """Versions that are committed or will never be."""
        with self._mutex:
            self._staged.forget(condition)

    def _locate(self, version: Version, blob: BlobRef) -> BlobRef:
        staged = self._staged.get(version, blob.name)
        if staged is None and (blob.kind in SHARED_KINDS or blob.segment):
            # A program may have come with an older version; a record may be another shard's.
            data, problem = read_blob_of(self._store, version, blob)
            if data is not None:
                return blob
            if blob.kind not in SHARED_KINDS:
                raise BadBlobError(f"version {version}: {problem}; publish it again")
        if staged is None or not staged.durable:
            raise MissingBlobError(
                f"version {version}: blob '{blob.name}' is not staged; publish the version again"
            )
        if (staged.num_bytes, staged.crc32c) != (blob.num_bytes, blob.crc32c):
            raise BadBlobError(
                f"version {version}: blob '{blob.name}': the manifest says {blob.num_bytes} bytes with "
                f"CRC32C {blob.crc32c:08x}, staged are {staged.num_bytes} with {staged.crc32c:08x}; "
                "publish it again"
            )
        if staged.place is None:
            return blob
        return msgspec.structs.replace(
            blob, segment=staged.place.segment, segment_offset=staged.place.segment_offset
        )

    def _create_content(self, name: str, data: bytes) -> None:
        try:
            self._store.create(CONTENT + name, data)
        except StoreExistsError:
            # Its name is its content's. What lies there may be rot, or not durable yet: an earlier try may
            # have failed after it had given the name.
            self._store.replace(CONTENT + name, data)
