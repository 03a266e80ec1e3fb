"""Where a replica gets whole versions from: a shard over gRPC, or a log that it can read itself."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import grpc

from param_server.blob_parts import from_message, to_message
from param_server.history import VersionReader
from param_server.manifest import Manifest, Version
from param_server.receive import ReceivedVersion, receive_versions
from param_server.security import NO_SECURITY, ClientSecurity
from param_server.transport import open_channel, translate
from proto import param_server_pb2, param_server_pb2_grpc

CALL_TIMEOUT_S = 5.0


class VersionSource(Protocol):
    """Iterators of whole versions, all checked against their manifests."""

    def follow(self, held: Version | None, *, shared: dict[str, bytes]) -> Iterator[ReceivedVersion]:
        """What follows `held`, or the newest full version and all after it; it may end or go on for ever.

        Args: shared: programs and signatures, by name, that the caller has.
        Raises: ParamServerError.
        """

    def replay(self, until: Version) -> Iterator[ReceivedVersion]:
        """The chain that ends at `until`. Raises: MissingBlobError if it is not there (any more)."""

    def promoted(self) -> Version | None:
        """The version of the stable channel; None: none was promoted."""

    def cancel(self) -> None:
        """End the iterator in use, from any thread."""

    def close(self) -> None: ...


class ShardSource:
    """A shard's Subscribe and History; one iterator at a time."""

    def __init__(self, address: str, *, name: str, security: ClientSecurity = NO_SECURITY) -> None:
        """Raises: AddressError for an address beyond loopback without TLS, AccessError for TLS files."""
        self._where = f"shard {address}"
        self._name = name
        self._channel = open_channel(address, security)
        self._versions: Any = param_server_pb2_grpc.ParamServerStub(self._channel)  # type: ignore[no-untyped-call]
        self._history: Any = param_server_pb2_grpc.HistoryStub(self._channel)  # type: ignore[no-untyped-call]
        self._stream: Any = None

    def follow(self, held: Version | None, *, shared: dict[str, bytes]) -> Iterator[ReceivedVersion]:
        request = param_server_pb2.SubscribeRequest(replica=self._name, held=to_message(held))
        self._stream = self._versions.Subscribe(request)
        return self._receive(self._stream, shared=shared)

    def replay(self, until: Version) -> Iterator[ReceivedVersion]:
        request = param_server_pb2.ReplayRequest(replica=self._name, until=to_message(until))
        self._stream = self._history.Replay(request)
        return self._receive(self._stream, shared={})

    def promoted(self) -> Version | None:
        try:
            reply = self._history.Promoted(param_server_pb2.StatusRequest(), timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            raise translate(error, where=self._where, timeout_s=CALL_TIMEOUT_S) from error
        return from_message(reply.version) if reply.HasField("version") else None

    def cancel(self) -> None:
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        self._channel.close()

    def _receive(self, stream: Any, *, shared: dict[str, bytes]) -> Iterator[ReceivedVersion]:
        try:
            yield from receive_versions(stream, shared=shared)
        except grpc.RpcError as error:
            raise translate(error, where=self._where) from error
        finally:
            stream.cancel()


class StoreSource:
    """A log, or the store that holds it, read without a shard: any number of replicas start from it.

    `follow` ends when it has caught up; whoever follows asks again after a while.
    """

    def __init__(self, reader: VersionReader) -> None:
        self._reader = reader
        self._cancelled = False

    def follow(self, held: Version | None, *, shared: dict[str, bytes]) -> Iterator[ReceivedVersion]:
        return self._read(self._reader.plan_after(held), shared=shared)

    def replay(self, until: Version) -> Iterator[ReceivedVersion]:
        return self._read(self._reader.chain_to(until), shared={})

    def promoted(self) -> Version | None:
        return self._reader.promoted()

    def cancel(self) -> None:
        self._cancelled = True

    def close(self) -> None:
        """There is nothing to close: the reader is its maker's."""

    def _read(self, manifests: list[Manifest], *, shared: dict[str, bytes]) -> Iterator[ReceivedVersion]:
        self._cancelled = False
        for manifest in manifests:
            if self._cancelled:
                return
            blobs: dict[str, bytes] = {}
            for blob in manifest.blobs:
                # A program is named by its content, so the one that is there is the one that is meant.
                known = shared.get(blob.name)
                blobs[blob.name] = (
                    bytes(self._reader.read_blob(manifest, blob.name)) if known is None else known
                )
            received = ReceivedVersion(manifest=manifest, blobs=blobs)
            shared = received.shared
            yield received
