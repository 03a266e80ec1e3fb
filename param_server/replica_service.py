"""The replica's gRPC face: the Open Inference Protocol v2, and its own Status."""

from __future__ import annotations

import threading
from collections.abc import Callable

import grpc

from param_server.blob_parts import from_message, to_message
from param_server.errors import RequestError, UnknownModelError
from param_server.infer_codec import read_inputs, write_outputs
from param_server.manifest import Manifest, Version
from param_server.predict import answer
from param_server.replica import Replica
from param_server.signature import ServingSignature, feature_inputs
from param_server.transport import errors_as_status
from proto import open_inference_pb2 as oip
from proto import open_inference_pb2_grpc, param_server_pb2, param_server_pb2_grpc

SERVER_NAME = "freshet"
SERVER_VERSION = "1"
PLATFORM = "onnxruntime_onnx"
SERVER_THREADS = 16


class ReplicaService(
    open_inference_pb2_grpc.GRPCInferenceServiceServicer, param_server_pb2_grpc.ReplicaServicer
):
    """Answers from the replica's live store. The method names are those that gRPC calls."""

    def __init__(
        self,
        replica: Replica,
        *,
        stale_after_ms: int,
        clock_ms: Callable[[], int],
        pin: Callable[[Version | None], None] | None = None,
    ) -> None:
        """Args: stale_after_ms: not ready while the version is older; 0 = however old it is. A stale
        replica goes on answering. pin: pins the replica and wakes whoever follows for it; None = the
        replica's own."""
        self._replica = replica
        self._pin = pin if pin is not None else replica.pin
        self._stale_after_ms = stale_after_ms
        self._clock_ms = clock_ms
        self._counters = threading.Lock()
        self._num_predictions = 0
        self._num_unknown_ids = 0
        self._num_refused_requests = 0

    def ServerLive(  # noqa: N802
        self, request: oip.ServerLiveRequest, context: grpc.ServicerContext
    ) -> oip.ServerLiveResponse:
        return oip.ServerLiveResponse(live=True)

    def ServerReady(  # noqa: N802
        self, request: oip.ServerReadyRequest, context: grpc.ServicerContext
    ) -> oip.ServerReadyResponse:
        return oip.ServerReadyResponse(ready=self._ready())

    def ModelReady(  # noqa: N802
        self, request: oip.ModelReadyRequest, context: grpc.ServicerContext
    ) -> oip.ModelReadyResponse:
        signature = self._signature()
        with errors_as_status(context):
            if signature is not None:
                self._check_model(request.name, signature)
        return oip.ModelReadyResponse(ready=self._ready())

    def ServerMetadata(  # noqa: N802
        self, request: oip.ServerMetadataRequest, context: grpc.ServicerContext
    ) -> oip.ServerMetadataResponse:
        return oip.ServerMetadataResponse(name=SERVER_NAME, version=SERVER_VERSION)

    def ModelMetadata(  # noqa: N802
        self, request: oip.ModelMetadataRequest, context: grpc.ServicerContext
    ) -> oip.ModelMetadataResponse:
        signature = self._signature()
        with errors_as_status(context):
            if signature is None:
                raise UnknownModelError("no version with a model has arrived yet")
            self._check_model(request.name, signature)
        response = oip.ModelMetadataResponse(
            name=signature.model_name, versions=[str(self._replica.store.version)], platform=PLATFORM
        )
        for feature in signature.features:
            for name, datatype, shape in feature_inputs(feature):
                response.inputs.add(name=name, datatype=datatype, shape=shape)
        for task in signature.tasks:
            response.outputs.add(name=task, datatype="FP32", shape=[-1])
        return response

    def ModelInfer(  # noqa: N802
        self, request: oip.ModelInferRequest, context: grpc.ServicerContext
    ) -> oip.ModelInferResponse:
        done = False
        try:
            with errors_as_status(context):
                response = self._infer(request)
            done = True
        finally:
            if not done:
                with self._counters:
                    self._num_refused_requests += 1
        return response

    def _infer(self, request: oip.ModelInferRequest) -> oip.ModelInferResponse:
        signature = self._signature()
        if signature is not None:
            self._check_model(request.model_name, signature)
        result = answer(self._replica.store, read_inputs(request))
        version = str(result.version)
        if request.model_version not in ("", version):
            raise UnknownModelError(f"model version '{request.model_version}' is not live, {version} is")
        wanted = [output.name for output in request.outputs] or list(result.outputs)
        unknown = sorted(set(wanted) - set(result.outputs))
        if unknown:
            raise RequestError(f"output '{unknown[0]}' is not one of the tasks {list(result.outputs)}")
        response = oip.ModelInferResponse(model_name=request.model_name, model_version=version, id=request.id)
        response.parameters["version"].string_param = version
        response.parameters["age_ms"].int64_param = self._age_of(result.model.manifest)
        if self._replica.pinned is not None:
            response.parameters["pinned"].bool_param = True
        write_outputs(response, {name: result.outputs[name] for name in wanted})
        with self._counters:
            self._num_predictions += 1
            self._num_unknown_ids += result.num_unknown
        return response

    def Status(  # noqa: N802
        self, request: param_server_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.ReplicaStatus:
        return self._status()

    def Pin(  # noqa: N802
        self, request: param_server_pb2.PinRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.ReplicaStatus:
        with errors_as_status(context):
            if not request.HasField("version"):
                raise RequestError("pin: the version is missing")
            self._pin(from_message(request.version))
        return self._status()

    def Unpin(  # noqa: N802
        self, request: param_server_pb2.StatusRequest, context: grpc.ServicerContext
    ) -> param_server_pb2.ReplicaStatus:
        self._pin(None)
        return self._status()

    def _status(self) -> param_server_pb2.ReplicaStatus:
        replica = self._replica
        store, not_held = replica.store, replica.not_held
        with self._counters:
            status = param_server_pb2.ReplicaStatus(
                version=to_message(store.version),
                ready=self._ready(),
                age_ms=self._age_ms(),
                num_rows=store.num_rows,
                num_predictions=self._num_predictions,
                num_unknown_ids=self._num_unknown_ids,
                num_refused_requests=self._num_refused_requests,
                num_reloads=replica.num_reloads,
                last_refusal=replica.last_refusal,
                pinned=to_message(replica.pinned),
                channel=replica.channel,
                promoted=to_message(replica.promoted),
                num_row_bytes=store.num_bytes,
                num_rows_over_budget=not_held.over_budget,
                num_rows_expired=not_held.expired,
                num_rows_other_shard=not_held.other_shard,
                num_moves_back=replica.num_moves_back,
                num_rows_refused=replica.num_rows_refused,
            )
        for version, visible_ms in replica.applied.copy():
            status.applied.add(version=to_message(version), visible_ms=visible_ms)
        return status

    def _ready(self) -> bool:
        # A version that an operator holds grows old on purpose: it must not leave the service for that.
        fresh = (
            not self._stale_after_ms
            or self._replica.held_by_operator
            or self._age_ms() <= self._stale_after_ms
        )
        return self._replica.ready and fresh

    def _age_ms(self) -> int:
        model = self._replica.store.model
        return -1 if model is None else self._age_of(model.manifest)

    def _age_of(self, manifest: Manifest) -> int:
        """Milliseconds since the newest impression of a version was produced; -1: it learned none yet."""
        return self._clock_ms() - manifest.produced_ms_newest if manifest.produced_ms_newest else -1

    def _signature(self) -> ServingSignature | None:
        model = self._replica.store.model
        return None if model is None else model.signature

    def _check_model(self, name: str, signature: ServingSignature) -> None:
        """An empty name means the one model there is."""
        if name not in ("", signature.model_name):
            raise UnknownModelError(f"model '{name}' is not served here, '{signature.model_name}' is")
