"""The gRPC face of a shard: messages in and out, nothing decided here.

Publish, Commit and Rollback come from trainers and operators, Subscribe from replicas, the rest from anyone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import grpc
import numpy as np

from param_server.blob_parts import from_message, join_parts, split_blob, to_message
from param_server.errors import BadBlobError, LimitError
from param_server.manifest import (
    SHARED_KINDS,
    Manifest,
    Version,
    decode_manifest,
    encode_manifest,
)
from param_server.shard import PULL_IDS_MAX, Shard, with_rows_of
from param_server.shard_state import VersionInfo
from param_server.subscriptions import REPLAYS_MAX, SUBSCRIBERS_MAX, Subscription
from param_server.transport import PART_BYTES_MAX, errors_as_status
from proto import param_server_pb2, param_server_pb2_grpc
from proto.row_segment import encode
from proto.tensor_blob import crc32c

PUBLISHERS_MAX = 256
"""Calls of Publish at once. Each rank of a trainer makes one at a time, and a version needs those of all
ranks: with more ranks than places none would ever be published."""
PUBLISH_IDLE_S = 60.0
"""A call of Publish that brings nothing for so long is ended: a trainer gives up earlier itself."""
SERVER_THREADS = SUBSCRIBERS_MAX + REPLAYS_MAX + PUBLISHERS_MAX + 16
"""Each of these streams occupies a thread for as long as it stays; the rest is for short calls."""
WAKE_S = 0.5
"""How often an idle subscription looks whether its client is still there."""


class ShardServicer(param_server_pb2_grpc.ParamServerServicer):
    """Serves one shard."""

    def __init__(self, shard: Shard, *, clock_ms: Callable[[], int]) -> None:
        """Args: clock_ms: unix milliseconds, stamped on the versions that a rollback makes."""
        self._shard = shard
        self._clock_ms = clock_ms
        self._publishers = threading.BoundedSemaphore(PUBLISHERS_MAX)
        self._readers = ThreadPoolExecutor(max_workers=PUBLISHERS_MAX, thread_name_prefix="publish-read")

    def stop(self) -> None:
        """End all subscriptions."""
        self._shard.subscriptions.stop()

    def OpenGeneration(  # noqa: N802 - the name that gRPC calls
        self, request: param_server_pb2.OpenGenerationRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.OpenGenerationReply:
        with errors_as_status(context):
            generation, head = self._shard.open_generation(request.at_least, writer=request.writer)
        return param_server_pb2.OpenGenerationReply(generation=generation, head=to_message(head))

    def Publish(  # noqa: N802
        self, request_iterator: Iterator[param_server_pb2.Blob], context: grpc.ServicerContext
    ) -> param_server_pb2.PublishReply:
        with errors_as_status(context), self._publisher():
            published = self._shard.publish(join_parts(self._arriving(request_iterator)))
        return param_server_pb2.PublishReply(num_blobs=published.num_blobs, num_bytes=published.num_bytes)

    @contextmanager
    def _publisher(self) -> Iterator[None]:
        """One of the places for calls of Publish. Raises: LimitError if all are taken."""
        if not self._publishers.acquire(blocking=False):
            raise LimitError(f"at most {PUBLISHERS_MAX} calls of Publish are served at once: publish again")
        try:
            yield
        finally:
            self._publishers.release()

    def _arriving(self, messages: Iterator[param_server_pb2.Blob]) -> Iterator[param_server_pb2.Blob]:
        """The parts as they come. Raises: LimitError if none comes for too long."""
        while True:
            # gRPC bounds no wait for a message. The one that is given up ends as soon as its call has ended.
            coming = self._readers.submit(_next_part, messages)
            try:
                message = coming.result(timeout=PUBLISH_IDLE_S)
            except TimeoutError as error:
                raise LimitError(
                    f"publish: nothing came for {PUBLISH_IDLE_S:g} s, the call is ended: publish again"
                ) from error
            if message is None:
                return
            yield message

    def Prepare(  # noqa: N802
        self, request: param_server_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.PrepareReply:
        with errors_as_status(context):
            blobs = self._shard.prepare_part(_manifest(request))
        reply = param_server_pb2.PrepareReply()
        for blob in blobs:
            reply.blobs.add(name=blob.name, segment=blob.segment, segment_offset=blob.segment_offset)
        return reply

    def Commit(  # noqa: N802
        self, request: param_server_pb2.CommitRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.CommitReply:
        with errors_as_status(context):
            head, repeated = self._shard.commit(_manifest(request))
        return param_server_pb2.CommitReply(head=to_message(head), repeated_commit=repeated)

    def Rollback(  # noqa: N802
        self, request: param_server_pb2.RollbackRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.RollbackReply:
        with errors_as_status(context):
            head = self._shard.rollback(from_message(request.version), now_ms=self._clock_ms())
        return param_server_pb2.RollbackReply(head=to_message(head))

    def Versions(  # noqa: N802
        self, request: param_server_pb2.VersionsRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.VersionsReply:
        return param_server_pb2.VersionsReply(versions=[_info_message(one) for one in self._shard.versions()])

    def Subscribe(  # noqa: N802
        self, request: param_server_pb2.SubscribeRequest, context: grpc.ServicerContext
    ) -> Iterator[param_server_pb2.VersionPart]:
        with errors_as_status(context):
            held = from_message(request.held) if request.HasField("held") else None
            unknown = [shard for shard in request.shards if shard >= self._shard.num_shards]
            if unknown:
                raise LimitError(f"shard {unknown[0]} is not one of {self._shard.num_shards} shards")
            subscription = self._shard.subscriptions.add(
                request.replica, held, shards=frozenset(request.shards), cancel=context.cancel
            )
            try:
                yield from self._follow(subscription, context)
            finally:
                self._shard.subscriptions.remove(subscription)

    def _follow(
        self, subscription: Subscription, context: grpc.ServicerContext
    ) -> Iterator[param_server_pb2.VersionPart]:
        known = self._shared_names(subscription.cursor)
        while context.is_active() and not self._shard.subscriptions.stopping:
            for manifest in self._shard.subscriptions.take(subscription, timeout_s=WAKE_S):
                parts = self._version_parts(with_rows_of(manifest, subscription.shards), known)
                yield from subscription.send(parts)
                subscription.cursor = manifest.version
                known = _shared_of(manifest)
                if self._shard.subscriptions.stopping:
                    return

    def _shared_names(self, version: Version | None) -> set[str]:
        """The programs and signatures that whoever holds this version has."""
        for manifest in self._shard.log.manifests():
            if manifest.version == version:
                return _shared_of(manifest)
        return set()

    def _version_parts(self, manifest: Manifest, known: set[str]) -> Iterator[param_server_pb2.VersionPart]:
        data = encode_manifest(manifest)
        yield param_server_pb2.VersionPart(
            manifest=param_server_pb2.ManifestPart(data=data, crc32c=crc32c(data))
        )
        for blob in manifest.blobs:
            if blob.name in known:
                continue
            content = bytes(self._shard.log.read_blob(manifest, blob.name))
            for message in split_blob(manifest.version, blob.kind, blob.name, content):
                yield param_server_pb2.VersionPart(blob=message)
        yield param_server_pb2.VersionPart(end=to_message(manifest.version))

    def Pull(  # noqa: N802
        self, request: param_server_pb2.PullRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.PullReply:
        with errors_as_status(context):
            if len(request.ids) % 8:
                raise BadBlobError(
                    f"ids: expected int64 values, at most {PULL_IDS_MAX}, found {len(request.ids)} bytes"
                )
            pulled = self._shard.pull(request.table, np.frombuffer(request.ids, "<i8"))
            data = encode(pulled.segment, row_format="float32")
            if len(data) > PART_BYTES_MAX:
                raise LimitError(
                    f"{len(pulled.segment)} rows of table '{request.table}' pass {PART_BYTES_MAX} bytes; "
                    "pull fewer ids at once"
                )
        return param_server_pb2.PullReply(
            version=to_message(pulled.version),
            segment=data,
            crc32c=crc32c(data),
            incomplete=not pulled.complete,
        )

    def Status(  # noqa: N802
        self, request: param_server_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.ShardStatus:
        state = self._shard.status()
        return param_server_pb2.ShardStatus(
            head=to_message(state.head),
            num_versions=state.num_versions,
            num_full=state.num_full,
            num_delta=state.num_delta,
            num_rows=state.num_rows,
            bytes_published=state.bytes_published,
            num_subscribers=state.num_subscribers,
            subscribers=state.subscribers,
            fenced_generation=state.fenced_generation,
            fenced_by=state.fenced_by,
            damage=state.damage,
            shard=state.shard,
            num_shards=state.num_shards,
            num_snapshots=state.num_snapshots,
            memory_bytes=state.memory_bytes,
            num_left_out=state.num_left_out,
            num_cut_off=state.num_cut_off,
            num_rows_refused=state.num_rows_refused,
            refused=state.refused,
        )


def _next_part(messages: Iterator[param_server_pb2.Blob]) -> param_server_pb2.Blob | None:
    return next(messages, None)


def _manifest(request: param_server_pb2.CommitRequest) -> Manifest:
    if crc32c(request.manifest) != request.crc32c:
        raise BadBlobError("manifest: its CRC32C differs; it was damaged on the way. Commit again.")
    return decode_manifest(request.manifest, where="commit: manifest")


def _shared_of(manifest: Manifest) -> set[str]:
    return {blob.name for blob in manifest.blobs if blob.kind in SHARED_KINDS}


def _info_message(info: VersionInfo) -> param_server_pb2.VersionInfo:
    return param_server_pb2.VersionInfo(
        version=to_message(info.version),
        parent=to_message(info.parent),
        kind=info.kind,
        has_snapshot=info.has_snapshot,
        num_rows=info.num_rows,
        num_deletes=info.num_deletes,
        num_bytes=info.num_bytes,
        created_ms=info.created_ms,
        rollback_of=to_message(info.rollback_of),
    )
