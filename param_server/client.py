"""Everything a trainer needs of the parameter server: the one module that `trainer` imports."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import msgspec
import numpy as np
import numpy.typing as npt
import structlog

from param_server.blob_parts import from_message, split_blob, to_message
from param_server.connection import Connection, version_or_none
from param_server.errors import (
    AccessError,
    AddressError,
    BadBlobError,
    ConflictError,
    FencedError,
    GapError,
    LimitError,
    ManifestError,
    MissingBlobError,
    ParamServerError,
    RequestError,
    UnavailableError,
)
from param_server.manifest import (
    BlobKind,
    BlobRef,
    Manifest,
    ManifestPosition,
    Version,
    blob_ref,
    content_name,
    decode_manifest,
    encode_manifest,
)
from param_server.replica_client import HistoryClient, Prediction, ReplicaClient, ReplicaState
from param_server.row_blobs import split_by_shard
from param_server.rules import (
    NEVER_PUSHED_S,
    ChangedColumns,
    Decision,
    Reason,
    decide,
    record_push,
)
from param_server.rules_config import RulesConfig
from param_server.security import NO_SECURITY, ClientSecurity
from param_server.shard_state import ShardState, VersionInfo
from param_server.signature import (
    DOMAIN_INPUT_NAME,
    INPUT_NAME,
    OUTPUT_NAME,
    ServingSignature,
    SignatureFeature,
    decode_signature,
    encode_signature,
)
from proto import param_server_pb2, param_server_pb2_grpc
from proto.row_segment import NotFiniteError, RowFormat, RowSegment, decode, encode, finite_rows, split
from proto.tensor_blob import BlobError, crc32c, decode_tensors, encode_tensors

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class PulledRows:
    """complete: no row has left the shard's memory, so an id that is missing does not exist."""

    version: Version | None
    segment: RowSegment
    complete: bool


class ParamServerClient(Connection):
    """One connection to a shard. Calls wait for the shard up to `timeout_s`, restarts included.

    After UnavailableError or MissingBlobError the caller repeats `publish` and `commit` with the same
    bytes: both are idempotent. FencedError means that this writer is over.
    """

    def __init__(self, address: str, timeout_s: float, *, security: ClientSecurity = NO_SECURITY) -> None:
        """Raises: AddressError for an address beyond loopback without TLS, AccessError for TLS files."""
        super().__init__(address, name="shard", timeout_s=timeout_s, security=security)
        self._stub: Any = param_server_pb2_grpc.ParamServerStub(self.channel)  # type: ignore[no-untyped-call]
        self.writer = uuid.uuid4().hex
        """Who opens generations through this client: ShardState.fenced_by says it again."""

    def open_generation(self, at_least: int) -> tuple[int, Version | None]:
        """Fence every other writer; returns the generation to write with and the newest version."""
        request = param_server_pb2.OpenGenerationRequest(at_least=at_least, writer=self.writer)
        reply = self.call(self._stub.OpenGeneration, request)
        return reply.generation, version_or_none(reply, "head")

    def publish(self, version: Version, blobs: Iterable[tuple[BlobKind, str, bytes]]) -> int:
        """Stage (kind, name, data) blobs of one version; returns the bytes sent.

        Raises: FencedError, BadBlobError, ConflictError, LimitError, UnavailableError.
        """
        reply = self.call(self._stub.Publish, _parts(version, blobs))
        return int(reply.num_bytes)

    def commit(self, manifest: Manifest) -> tuple[Version, bool]:
        """Make the version durable and visible; returns the head and whether it was a repeat.

        Raises: FencedError, GapError (its parent is not the head), MissingBlobError (publish again),
            ConflictError, BadBlobError, ManifestError, UnavailableError.
        """
        reply = self.call(self._stub.Commit, _commit_request(manifest))
        return from_message(reply.head), reply.repeated_commit

    def prepare(self, manifest: Manifest) -> dict[str, tuple[str, int]]:
        """At a shard other than 0: its part of the version, checked: blob name -> (segment, offset).

        Raises: what `commit` raises.
        """
        reply = self.call(self._stub.Prepare, _commit_request(manifest))
        return {one.name: (one.segment, one.segment_offset) for one in reply.blobs}

    def rollback(self, version: Version) -> Version:
        """Commit a new version with an older one's content; returns the new one.

        Raises: MissingBlobError if the log does not have the older one, GapError if it is the head.
        """
        request = param_server_pb2.RollbackRequest(version=to_message(version))
        return from_message(self.call(self._stub.Rollback, request).head)

    def versions(self) -> list[VersionInfo]:
        """Everything that is in the log, oldest first."""
        reply = self.call(self._stub.Versions, param_server_pb2.VersionsRequest())
        return [
            VersionInfo(
                version=from_message(one.version),
                parent=version_or_none(one, "parent"),
                kind=one.kind,
                has_snapshot=one.has_snapshot,
                num_rows=one.num_rows,
                num_deletes=one.num_deletes,
                num_bytes=one.num_bytes,
                created_ms=one.created_ms,
                rollback_of=version_or_none(one, "rollback_of"),
            )
            for one in reply.versions
        ]

    def pull(self, table: str, ids_N: npt.NDArray[np.int64]) -> tuple[Version | None, RowSegment]:
        """The newest rows of the ids that exist, in the order asked, doubled ids once."""
        pulled = self.pull_rows(table, ids_N)
        return pulled.version, pulled.segment

    def pull_rows(self, table: str, ids_N: npt.NDArray[np.int64]) -> PulledRows:
        """As `pull`, with the optimizer state, scores, last-seen and update counts that the versions carried
        (0 for a row whose version did not), and with the word whether memory holds every row.
        """
        request = param_server_pb2.PullRequest(table=table, ids=ids_N.astype("<i8").tobytes())
        reply = self.call(self._stub.Pull, request)
        if crc32c(reply.segment) != reply.crc32c:
            raise BadBlobError(f"{self.where}: pulled rows of table '{table}': wrong checksum")
        segment = decode(reply.segment, where=self.where)
        return PulledRows(version_or_none(reply, "version"), segment, not reply.incomplete)

    def status(self) -> ShardState:
        reply = self.call(self._stub.Status, param_server_pb2.StatusRequest())
        return ShardState(
            head=version_or_none(reply, "head"),
            fenced_generation=reply.fenced_generation,
            fenced_by=reply.fenced_by,
            num_versions=reply.num_versions,
            num_full=reply.num_full,
            num_delta=reply.num_delta,
            num_rows=reply.num_rows,
            bytes_published=reply.bytes_published,
            num_subscribers=reply.num_subscribers,
            subscribers=tuple(reply.subscribers),
            damage=tuple(reply.damage),
            shard=reply.shard,
            num_shards=reply.num_shards,
            num_snapshots=reply.num_snapshots,
            memory_bytes=reply.memory_bytes,
            num_left_out=reply.num_left_out,
            num_cut_off=reply.num_cut_off,
            refused=dict(reply.refused),
            num_rows_refused=reply.num_rows_refused,
        )


class ParamServerClients:
    """A connection to every shard of one log, shard 0 first; with one address it is a ParamServerClient.

    Rows go to the shard that owns their ids (`split_by_shard`); a commit is prepared at all shards and made
    at shard 0. `publish` and `commit` are idempotent as they are for one shard.
    """

    def __init__(
        self, addresses: Sequence[str], timeout_s: float, *, security: ClientSecurity = NO_SECURITY
    ) -> None:
        """Raises: AddressError unless every address is a loopback host:port and there is one."""
        if not addresses:
            raise AddressError("expected the address of every shard, shard 0 first, found none")
        self._clients = [ParamServerClient(address, timeout_s, security=security) for address in addresses]

    @property
    def num_shards(self) -> int:
        return len(self._clients)

    def close(self) -> None:
        for client in self._clients:
            client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def check_not_fenced(self, generation: int) -> None:
        """Whether the writer of `generation`, who is this one, may open another.

        A generation that this writer opened without hearing of it is no reason to end.
        Raises: FencedError if another writer has opened a newer generation.
        """
        state = self._clients[0].status()
        if state.fenced_generation > generation and state.fenced_by != self._clients[0].writer:
            raise FencedError(
                f"generation {generation} is fenced: a newer trainer opened generation "
                f"{state.fenced_generation}; this one ends"
            )

    def open_generation(self, at_least: int) -> tuple[int, Version | None]:
        """Fence every other writer, at shard 0 first, whose word counts.

        Raises: ManifestError if the addresses are not the log's shards, in order.
        """
        for number, state in enumerate(self.status()):
            if (state.shard, state.num_shards) != (number, self.num_shards):
                raise ManifestError(
                    f"address {number + 1} of {self.num_shards} is shard {state.shard} of "
                    f"{state.num_shards}; name every shard once, shard 0 first"
                )
        generation, head = self._clients[0].open_generation(at_least)
        for client in self._clients[1:]:
            client.open_generation(at_least)
        return generation, head

    def publish(self, version: Version, blobs: Iterable[tuple[BlobRef, bytes]]) -> int:
        """Stage blobs of one version, each at its shard; returns the bytes sent."""
        by_shard: dict[int, list[tuple[BlobKind, str, bytes]]] = {}
        for reference, data in blobs:
            by_shard.setdefault(reference.shard, []).append((reference.kind, reference.name, data))
        return sum(self._clients[shard].publish(version, one) for shard, one in sorted(by_shard.items()))

    def commit(self, manifest: Manifest) -> tuple[Version, bool]:
        """Make the version durable and visible, in three steps:

          1. every shard but 0 checks its part and answers where it lies, durable
          2. shard 0 creates the manifest, which names all places: now the version exists
          3. the others take it over; one that does not answer does so by itself

        Raises: what ParamServerClient.commit raises.
        """
        places: dict[str, tuple[str, int]] = {}
        for client in self._clients[1:]:
            places.update(client.prepare(manifest))
        blobs = tuple(
            msgspec.structs.replace(blob, segment=places[blob.name][0], segment_offset=places[blob.name][1])
            if blob.name in places
            else blob
            for blob in manifest.blobs
        )
        head, repeated = self._clients[0].commit(msgspec.structs.replace(manifest, blobs=blobs))
        for shard, client in enumerate(self._clients[1:], start=1):
            try:
                client.commit(manifest)
            except UnavailableError as error:
                log.info("a shard takes over later", shard=shard, version=str(head), reason=str(error))
        return head, repeated

    def rollback(self, version: Version) -> Version:
        """Commit a new version with an older one's content; returns the new one. Shard 0 makes it.

        Raises: what ParamServerClient.rollback raises.
        """
        return self._clients[0].rollback(version)

    def versions(self) -> list[VersionInfo]:
        """Everything that is in the log, oldest first."""
        return self._clients[0].versions()

    def status(self) -> list[ShardState]:
        """Of every shard, in order."""
        return [client.status() for client in self._clients]


def _parts(version: Version, blobs: Iterable[tuple[BlobKind, str, bytes]]) -> Iterator[param_server_pb2.Blob]:
    for kind, name, data in blobs:
        yield from split_blob(version, kind, name, data)


def _commit_request(manifest: Manifest) -> param_server_pb2.CommitRequest:
    data = encode_manifest(manifest)
    return param_server_pb2.CommitRequest(manifest=data, crc32c=crc32c(data))


__all__ = [
    "DOMAIN_INPUT_NAME",
    "INPUT_NAME",
    "NEVER_PUSHED_S",
    "NO_SECURITY",
    "OUTPUT_NAME",
    "AccessError",
    "AddressError",
    "BadBlobError",
    "BlobError",
    "BlobKind",
    "BlobRef",
    "ChangedColumns",
    "ClientSecurity",
    "ConflictError",
    "Decision",
    "FencedError",
    "GapError",
    "HistoryClient",
    "LimitError",
    "Manifest",
    "ManifestError",
    "ManifestPosition",
    "MissingBlobError",
    "NotFiniteError",
    "ParamServerClient",
    "ParamServerClients",
    "ParamServerError",
    "Prediction",
    "PulledRows",
    "Reason",
    "ReplicaClient",
    "ReplicaState",
    "RequestError",
    "RowFormat",
    "RowSegment",
    "RulesConfig",
    "ServingSignature",
    "ShardState",
    "SignatureFeature",
    "UnavailableError",
    "Version",
    "VersionInfo",
    "blob_ref",
    "content_name",
    "crc32c",
    "decide",
    "decode",
    "decode_manifest",
    "decode_signature",
    "decode_tensors",
    "encode",
    "encode_manifest",
    "encode_signature",
    "encode_tensors",
    "finite_rows",
    "record_push",
    "split",
    "split_by_shard",
]
