"""Clients of replicas, and of what replicas answer from: predictions, pins and promotions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt

from param_server.blob_parts import from_message, to_message
from param_server.connection import Connection, version_or_none
from param_server.infer_codec import build_infer_request, read_outputs
from param_server.manifest import Version
from param_server.security import NO_SECURITY, ClientSecurity
from proto import open_inference_pb2_grpc, param_server_pb2, param_server_pb2_grpc


@dataclass(frozen=True, slots=True)
class ReplicaState:
    """A replica's answer to `status`; age_ms is -1 before the first version."""

    version: Version | None
    ready: bool
    age_ms: int
    num_rows: int
    num_predictions: int
    num_unknown_ids: int
    num_refused_requests: int
    num_reloads: int
    last_refusal: str
    applied: tuple[tuple[Version, int], ...]
    """(version, unix milliseconds at which it became visible), oldest first."""
    channel: str = "canary"
    pinned: Version | None = None
    promoted: Version | None = None
    num_row_bytes: int = 0
    num_rows_over_budget: int = 0
    num_rows_expired: int = 0
    num_rows_other_shard: int = 0
    num_moves_back: int = 0
    num_rows_refused: int = 0


@dataclass(frozen=True, slots=True)
class Prediction:
    """outputs: task -> float32 [B]; version: the one version that all of them come from."""

    outputs: dict[str, npt.NDArray[Any]]
    version: Version
    age_ms: int


class ReplicaClient(Connection):
    """One connection to a serving replica."""

    def __init__(
        self, address: str, timeout_s: float = 10.0, *, security: ClientSecurity = NO_SECURITY
    ) -> None:
        """Raises: AddressError for an address beyond loopback without TLS, AccessError for TLS files."""
        super().__init__(address, name="replica", timeout_s=timeout_s, security=security)
        self._replica: Any = param_server_pb2_grpc.ReplicaStub(self.channel)  # type: ignore[no-untyped-call]
        self._inference: Any = open_inference_pb2_grpc.GRPCInferenceServiceStub(  # type: ignore[no-untyped-call]
            self.channel
        )

    def status(self) -> ReplicaState:
        return self._state(self.call(self._replica.Status, param_server_pb2.StatusRequest()))

    def pin(self, version: Version) -> ReplicaState:
        """Have the replica stay at a version, or go to it; `status` tells when it is there."""
        request = param_server_pb2.PinRequest(version=to_message(version))
        return self._state(self.call(self._replica.Pin, request))

    def unpin(self) -> ReplicaState:
        """Have the replica follow its channel again."""
        return self._state(self.call(self._replica.Unpin, param_server_pb2.StatusRequest()))

    def _state(self, reply: param_server_pb2.ReplicaStatus) -> ReplicaState:
        return ReplicaState(
            version=version_or_none(reply, "version"),
            ready=reply.ready,
            age_ms=reply.age_ms,
            num_rows=reply.num_rows,
            num_predictions=reply.num_predictions,
            num_unknown_ids=reply.num_unknown_ids,
            num_refused_requests=reply.num_refused_requests,
            num_reloads=reply.num_reloads,
            last_refusal=reply.last_refusal,
            applied=tuple((from_message(one.version), one.visible_ms) for one in reply.applied),
            channel=reply.channel,
            pinned=version_or_none(reply, "pinned"),
            promoted=version_or_none(reply, "promoted"),
            num_row_bytes=reply.num_row_bytes,
            num_rows_over_budget=reply.num_rows_over_budget,
            num_rows_expired=reply.num_rows_expired,
            num_rows_other_shard=reply.num_rows_other_shard,
            num_moves_back=reply.num_moves_back,
            num_rows_refused=reply.num_rows_refused,
        )

    def predict(self, inputs: dict[str, npt.NDArray[Any]]) -> Prediction:
        """Ask for a prediction.

        Args: inputs: int64 [B] for a single feature; int64 [L] and int32 [B] "<name>.lengths" for a
            multi one; float32 [B] for a dense one; str, bytes objects or int64 [B] for "domain".
        Raises: RequestError naming the input, UnavailableError while the replica has no version.
        """
        reply = self.call(self._inference.ModelInfer, build_infer_request(inputs))
        return Prediction(
            outputs=read_outputs(reply),
            version=Version.parse(reply.parameters["version"].string_param),
            age_ms=reply.parameters["age_ms"].int64_param,
        )


class HistoryClient(Connection):
    """One connection to a shard, for what is promoted on the stable channel."""

    def __init__(
        self, address: str, timeout_s: float = 10.0, *, security: ClientSecurity = NO_SECURITY
    ) -> None:
        """Raises: AddressError for an address beyond loopback without TLS, AccessError for TLS files."""
        super().__init__(address, name="shard", timeout_s=timeout_s, security=security)
        self._history: Any = param_server_pb2_grpc.HistoryStub(self.channel)  # type: ignore[no-untyped-call]

    def promote(self, version: Version) -> Version | None:
        """Name the version that the stable channel answers from; durable when this returns.

        Raises: MissingBlobError if the log cannot replay it.
        """
        request = param_server_pb2.PromoteRequest(version=to_message(version))
        return version_or_none(self.call(self._history.Promote, request), "version")

    def promoted(self) -> Version | None:
        reply = self.call(self._history.Promoted, param_server_pb2.StatusRequest())
        return version_or_none(reply, "version")
