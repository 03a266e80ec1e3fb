"""The replica's loop: follow a shard for ever, apply whole versions, never go back.

A version is applied to the live store if it follows what is live. A reload (after a gap or a bad blob)
begins at the newest full version, which may be older than what is live; such a chain is built in a
second store that takes over once it has passed the live version.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import grpc
import structlog

from param_server.blob_parts import to_message
from param_server.errors import (
    BadBlobError,
    GapError,
    LogDamageError,
    ManifestError,
    ParamServerError,
)
from param_server.manifest import Manifest, Version
from param_server.receive import ReceivedVersion, receive_versions
from param_server.row_store import RowStore, read_segment
from param_server.serving_model import ServingModel
from param_server.transport import open_channel, translate
from proto import param_server_pb2, param_server_pb2_grpc

log = structlog.get_logger()

APPLIED_MAX = 4096
BACKOFF_MIN_S = 0.05
BACKOFF_MAX_S = 2.0

RELOAD_ERRORS = (GapError, BadBlobError, ManifestError, LogDamageError)
"""After these the replica asks for the newest full version instead of for what follows."""


class Replica:
    """One thread runs `follow`; any number of others read `store`, `ready` and the counters."""

    def __init__(self, *, shard_address: str, name: str, clock_ms: Callable[[], int]) -> None:
        """Raises: AddressError unless the shard's address is a loopback host:port."""
        self._channel = open_channel(shard_address)
        self._where = f"shard {shard_address}"
        self._name = name
        self._clock_ms = clock_ms
        self._live: RowStore[ServingModel] = RowStore()
        self._beside: RowStore[ServingModel] | None = None
        self._stop = threading.Event()
        self._stream: Any = None
        self.applied: deque[tuple[Version, int]] = deque(maxlen=APPLIED_MAX)
        self.num_reloads = 0
        self.last_refusal = ""

    @property
    def store(self) -> RowStore[ServingModel]:
        """What Predict answers from; take it once a request."""
        return self._live

    @property
    def ready(self) -> bool:
        """A version is live and its model has answered once."""
        model = self._live.companion
        return model is not None and model.signature is not None

    def follow(self) -> None:
        """Until `stop`: subscribe, apply; after a failure wait a little longer each time and go on."""
        backoff_s = BACKOFF_MIN_S
        reload = False
        while not self._stop.is_set():
            before = self._live.version
            try:
                self._subscribe(held=None if reload else before)
                reload = False
            except RELOAD_ERRORS as error:
                self.num_reloads += 1
                self.last_refusal = str(error)
                log.warning("version refused, reloading", replica=self._name, reason=str(error))
                reload = True
            except ParamServerError as error:
                log.info("subscription ended", replica=self._name, reason=str(error))
            if self._live.version != before:
                backoff_s = BACKOFF_MIN_S
            self._stop.wait(backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    def stop(self) -> None:
        """End `follow` soon, from any thread."""
        self._stop.set()
        if self._stream is not None:
            self._stream.cancel()

    def close(self) -> None:
        self._channel.close()

    def _subscribe(self, *, held: Version | None) -> None:
        stub: Any = param_server_pb2_grpc.ParamServerStub(self._channel)  # type: ignore[no-untyped-call]
        request = param_server_pb2.SubscribeRequest(replica=self._name, held=to_message(held))
        model = self._live.companion
        shared = model.shared if model is not None and held is not None else {}
        self._beside = None
        self._stream = stub.Subscribe(request)
        if self._stop.is_set():
            self._stream.cancel()
        try:
            self.apply_all(self._stream, shared=shared)
        except grpc.RpcError as error:
            raise translate(error, where=self._where) from error
        finally:
            self._stream.cancel()

    def apply_all(self, parts: Iterable[param_server_pb2.VersionPart], *, shared: dict[str, bytes]) -> None:
        """Apply the versions of one stream.

        Raises: GapError, BadBlobError, ManifestError; what was live stays live.
        """
        for received in receive_versions(parts, shared=shared):
            self._apply(received)

    def _apply(self, received: ReceivedVersion) -> None:
        manifest = received.manifest
        store = self._store_for(manifest)
        segments = [
            read_segment(manifest.version, blob, received.blobs[blob.name]) for blob in manifest.rows_blobs
        ]
        prepared = store.prepare(manifest, segments)
        model = ServingModel(received, before=store.companion)
        for feature in model.signature.features if model.signature is not None else ():
            dim = prepared.dim(feature.table)
            if dim not in (None, feature.dim):
                raise BadBlobError(
                    f"version {manifest.version}: feature '{feature.name}' wants dim {feature.dim}, "
                    f"table '{feature.table}' has {dim}"
                )
        store.switch(prepared, model)
        if store is not self._live:
            live = self._live.version
            if live is not None and manifest.version <= live:
                if manifest.version == live:
                    self._beside = None  # the same version twice: what follows goes to the live store
                return
            self._live, self._beside = store, None
        self.last_refusal = ""
        self.applied.append((manifest.version, self._clock_ms()))

    def _store_for(self, manifest: Manifest) -> RowStore[ServingModel]:
        live = self._live.version
        newer = live is None or manifest.version > live
        if newer and (manifest.kind == "full" or manifest.parent == live):
            return self._live
        if manifest.kind == "full":
            self._beside = RowStore()
            return self._beside
        if self._beside is not None and manifest.parent == self._beside.version:
            return self._beside
        raise GapError(
            f"version {manifest.version} follows {manifest.parent}, held is {live}; a version is missing. "
            "The replica reloads from the newest full version."
        )
