"""The gRPC face of a log's history: replays up to one version, and the promoted version."""

from __future__ import annotations

from collections.abc import Iterator

import grpc

from param_server.blob_parts import from_message, split_blob, to_message
from param_server.errors import RequestError
from param_server.manifest import Manifest, encode_manifest
from param_server.subscriptions import Subscriptions
from param_server.transport import errors_as_status
from param_server.version_log import VersionLog
from proto import param_server_pb2, param_server_pb2_grpc
from proto.tensor_blob import crc32c


class HistoryServicer(param_server_pb2_grpc.HistoryServicer):
    """Every shard answers Replay and Promoted, shard 0 alone Promote. The method names are gRPC's."""

    def __init__(self, log: VersionLog, *, subscriptions: Subscriptions) -> None:
        """Args: subscriptions: the shard's, which bound the replays too."""
        self._log = log
        self._subscriptions = subscriptions

    def Replay(  # noqa: N802
        self, request: param_server_pb2.ReplayRequest, context: grpc.ServicerContext
    ) -> Iterator[param_server_pb2.VersionPart]:
        with errors_as_status(context):
            if not request.HasField("until"):
                raise RequestError("replay: the version to end at is missing")
            replay = self._subscriptions.add_replay(request.replica, cancel=context.cancel)
            try:
                known: set[str] = set()
                for manifest in self._log.chain_to(from_message(request.until)):
                    yield from replay.send(self._parts(manifest, known))
                    known = {blob.name for blob in manifest.blobs}
            finally:
                self._subscriptions.remove(replay)

    def _parts(self, manifest: Manifest, known: set[str]) -> Iterator[param_server_pb2.VersionPart]:
        data = encode_manifest(manifest)
        yield param_server_pb2.VersionPart(
            manifest=param_server_pb2.ManifestPart(data=data, crc32c=crc32c(data))
        )
        for blob in manifest.blobs:
            if blob.kind in ("program", "signature") and blob.name in known:
                continue
            content = bytes(self._log.read_blob(manifest, blob.name))
            for message in split_blob(manifest.version, blob.kind, blob.name, content):
                yield param_server_pb2.VersionPart(blob=message)
        yield param_server_pb2.VersionPart(end=to_message(manifest.version))

    def Promote(  # noqa: N802
        self, request: param_server_pb2.PromoteRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.Promotion:
        with errors_as_status(context):
            if not request.HasField("version"):
                raise RequestError("promote: the version is missing")
            self._log.promote(from_message(request.version))
            return self._promotion()

    def Promoted(  # noqa: N802
        self, request: param_server_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.Promotion:
        with errors_as_status(context):
            return self._promotion()

    def _promotion(self) -> param_server_pb2.Promotion:
        return param_server_pb2.Promotion(version=to_message(self._log.promoted()))
