"""The shard: the gRPC face of one version log and the row store that follows it.

Publish and Commit come from trainers, Subscribe from replicas, Pull and Status from anyone. A
subscriber is a cursor into the log and nothing more, so a slow one costs only its own thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import numpy as np

from param_server.blob_parts import from_message, join_parts, split_blob, to_message
from param_server.errors import BadBlobError, LimitError, ManifestError
from param_server.manifest import (
    SHARED_KINDS,
    Manifest,
    Version,
    decode_manifest,
    encode_manifest,
)
from param_server.row_store import RowStore, read_segment
from param_server.signature import decode_signature
from param_server.transport import PART_BYTES_MAX, errors_as_status
from param_server.version_log import VersionLog
from proto import param_server_pb2, param_server_pb2_grpc
from proto.row_segment import RowSegment, encode
from proto.tensor_blob import crc32c, decode_tensors

SUBSCRIBERS_MAX = 96
SERVER_THREADS = SUBSCRIBERS_MAX + 16
"""A subscriber occupies a thread for as long as it stays; the rest is for short calls."""
WAKE_S = 0.5
"""How often an idle subscription looks whether its client is still there."""
PULL_IDS_MAX = 1 << 17
NAME_CHARS_MAX = 100


class ShardServicer(param_server_pb2_grpc.ParamServerServicer):
    """Serves one log. The store is rebuilt from the log when the servicer is made."""

    def __init__(self, log: VersionLog) -> None:
        """Raises: LogDamageError if a blob changed on disk since the log was opened."""
        self._log = log
        self._store: RowStore[None] = RowStore()
        self._commit_mutex = threading.Lock()
        self._news = threading.Condition()
        self._stopping = False
        self._subscribers: list[str] = []
        self._bytes_published = 0
        for version in log.versions_after(None):
            manifest = log.read(version)
            segments = [
                read_segment(version, blob, log.read_blob(version, blob.name)) for blob in manifest.rows_blobs
            ]
            self._store.switch(self._store.prepare(manifest, segments))

    def stop(self) -> None:
        """End all subscriptions."""
        with self._news:
            self._stopping = True
            self._news.notify_all()

    def OpenGeneration(  # noqa: N802 - the name that gRPC calls
        self, request: param_server_pb2.OpenGenerationRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.OpenGenerationReply:
        with errors_as_status(context):
            if request.at_least >= 2**62:
                raise LimitError(f"at_least must be below 2^62, found {request.at_least}")
            generation, head = self._log.open_generation(request.at_least)
        return param_server_pb2.OpenGenerationReply(generation=generation, head=to_message(head))

    def Publish(  # noqa: N802
        self, request_iterator: Iterator[param_server_pb2.Blob], context: grpc.ServicerContext
    ) -> param_server_pb2.PublishReply:
        num_blobs = num_bytes = 0
        with errors_as_status(context):
            for version, kind, name, data in join_parts(request_iterator):
                self._log.stage(version, kind=kind, name=name, data=data)
                num_blobs += 1
                num_bytes += len(data)
        self._bytes_published += num_bytes
        return param_server_pb2.PublishReply(num_blobs=num_blobs, num_bytes=num_bytes)

    def Commit(  # noqa: N802
        self, request: param_server_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.CommitReply:
        with errors_as_status(context):
            if crc32c(request.manifest) != request.crc32c:
                raise BadBlobError("manifest: its CRC32C differs; it was damaged on the way. Commit again.")
            manifest = decode_manifest(request.manifest, where="commit: manifest")
            repeated = self._commit(manifest)
        head = self._log.head
        return param_server_pb2.CommitReply(head=to_message(head), repeated_commit=repeated)

    def _commit(self, manifest: Manifest) -> bool:
        """Everything that can be refused is refused before the log's commit; after it nothing can fail."""
        with self._commit_mutex:
            if self._log.check(manifest):
                return True
            prepared = self._store.prepare(manifest, self._staged_segments(manifest))
            self._check_model(manifest)
            self._log.commit(manifest)
            self._store.switch(prepared)
        with self._news:
            self._news.notify_all()
        return False

    def _staged_segments(self, manifest: Manifest) -> Iterator[RowSegment]:
        for blob in manifest.rows_blobs:
            yield read_segment(manifest.version, blob, self._log.read_staged(manifest.version, blob))

    def _check_model(self, manifest: Manifest) -> None:
        """A version that no replica could load must not become the head."""
        dense, signature = manifest.blob("dense"), manifest.blob("signature")
        if dense is None or signature is None:
            return
        where = f"version {manifest.version}: blob"
        decode_tensors(self._log.read_staged(manifest.version, dense), where=f"{where} '{dense.name}'")
        serving = decode_signature(
            self._log.read_staged(manifest.version, signature), where=f"{where} '{signature.name}'"
        )
        if serving.schema_hash != manifest.schema_hash:
            raise ManifestError(
                f"version {manifest.version}: schema hash '{manifest.schema_hash}', "
                f"but its signature's is '{serving.schema_hash}'"
            )

    def Subscribe(  # noqa: N802
        self, request: param_server_pb2.SubscribeRequest, context: grpc.ServicerContext
    ) -> Iterator[param_server_pb2.VersionPart]:
        with errors_as_status(context):
            cursor = from_message(request.held) if request.HasField("held") else None
            name = request.replica[:NAME_CHARS_MAX]
            with self._news:
                if len(self._subscribers) >= SUBSCRIBERS_MAX:
                    raise LimitError(f"at most {SUBSCRIBERS_MAX} replicas can subscribe to one shard")
                self._subscribers.append(name)
            try:
                yield from self._follow(cursor, context)
            finally:
                with self._news:
                    self._subscribers.remove(name)

    def _follow(
        self, cursor: Version | None, context: grpc.ServicerContext
    ) -> Iterator[param_server_pb2.VersionPart]:
        known = self._shared_names(cursor)
        while context.is_active() and not self._stopping:
            for version in self._log.versions_after(cursor):
                manifest = self._log.read(version)
                yield from self._version_parts(manifest, known)
                cursor, known = version, self._shared_names(version)
            with self._news:
                if not self._stopping and not self._log.versions_after(cursor):
                    self._news.wait(timeout=WAKE_S)

    def _shared_names(self, version: Version | None) -> set[str]:
        """The programs and signatures that whoever holds this version has."""
        for manifest in self._log.manifests():
            if manifest.version == version:
                return {blob.name for blob in manifest.blobs if blob.kind in SHARED_KINDS}
        return set()

    def _version_parts(self, manifest: Manifest, known: set[str]) -> Iterator[param_server_pb2.VersionPart]:
        data = encode_manifest(manifest)
        yield param_server_pb2.VersionPart(
            manifest=param_server_pb2.ManifestPart(data=data, crc32c=crc32c(data))
        )
        for blob in manifest.blobs:
            if blob.name in known:
                continue
            content = self._log.read_blob(manifest.version, blob.name)
            for message in split_blob(manifest.version, blob.kind, blob.name, content):
                yield param_server_pb2.VersionPart(blob=message)
        yield param_server_pb2.VersionPart(end=to_message(manifest.version))

    def Pull(  # noqa: N802
        self, request: param_server_pb2.PullRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.PullReply:
        with errors_as_status(context):
            if len(request.ids) % 8 or len(request.ids) > 8 * PULL_IDS_MAX:
                raise BadBlobError(
                    f"ids: expected int64 values, at most {PULL_IDS_MAX}, found {len(request.ids)} bytes"
                )
            asked_N = np.frombuffer(request.ids, "<i8")
            _, first_U = np.unique(asked_N, return_index=True)
            keys_N = asked_N[np.sort(first_U)]
            gathered = self._store.gather({request.table: keys_N})
            present_N = gathered.present_N[request.table]
            rows_ND = gathered.rows_ND[request.table][present_N]
            if not rows_ND.shape[1]:
                raise ManifestError(f"table '{request.table}' does not exist at version {gathered.version}")
            if rows_ND.nbytes + keys_N.nbytes > PART_BYTES_MAX:
                raise LimitError(
                    f"{len(rows_ND)} rows of table '{request.table}' pass {PART_BYTES_MAX} bytes"
                )
            segment = RowSegment(
                table=request.table,
                ids_N=keys_N[present_N],
                rows_ND=rows_ND,
                deleted_ids_M=np.zeros(0, np.int64),
            )
            data = encode(segment, row_format="float32")
        return param_server_pb2.PullReply(
            version=to_message(gathered.version), segment=data, crc32c=crc32c(data)
        )

    def Status(  # noqa: N802
        self, request: param_server_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.ShardStatus:
        manifests = self._log.manifests()
        num_full = sum(manifest.kind == "full" for manifest in manifests)
        with self._news:
            subscribers = sorted(self._subscribers)
        return param_server_pb2.ShardStatus(
            head=to_message(self._log.head),
            num_versions=len(manifests),
            num_full=num_full,
            num_delta=len(manifests) - num_full,
            num_rows=self._store.num_rows,
            bytes_published=self._bytes_published,
            num_subscribers=len(subscribers),
            subscribers=subscribers,
            fenced_generation=self._log.fenced_generation,
            damage=self._log.damage,
        )
