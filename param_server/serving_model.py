"""The dense model of one version: an ONNX program with that version's weights, ready to answer.

ONNX is data: loading it executes nothing. Weights replace the program's initializers when a session
is made, so a version has a session of its own and a switch is one reference.
Shapes: B impressions, E the width of all embeddings, T tasks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort

from param_server.errors import BadBlobError
from param_server.manifest import Manifest
from param_server.receive import ReceivedVersion
from param_server.signature import (
    DOMAIN_FEATURE,
    DOMAIN_INPUT_NAME,
    INPUT_NAME,
    OUTPUT_NAME,
    ServingSignature,
    decode_signature,
)
from proto.tensor_blob import BlobError, decode_tensors

MODEL_KINDS = ("dense", "program", "signature")

ort.set_default_logger_severity(4)


class Program:
    """A checked ONNX program and what its weights look like."""

    def __init__(self, data: bytes, *, where: str) -> None:
        """Raises: BadBlobError if it is not a program as it must be here."""
        try:
            model = onnx.load_model_from_string(data)
        except Exception as error:  # whatever the protobuf reader makes of hostile bytes
            raise BadBlobError(f"{where}: not an ONNX program ({error})") from error
        for tensor in _all_tensors(model.graph):
            # Such a tensor makes the runtime read a file that its name points to.
            if tensor.data_location == onnx.TensorProto.EXTERNAL or tensor.external_data:
                raise BadBlobError(f"{where}: initializer '{tensor.name}' lies outside of the program")
        self.data = data
        self.weights = {
            tensor.name: (onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type), tuple(tensor.dims))
            for tensor in model.graph.initializer
        }

    def session(self, weights: dict[str, npt.NDArray[Any]], *, where: str) -> _Session:
        """A session in which these weights stand for the program's own.

        Raises: BadBlobError if one of them is not an initializer of the same dtype and shape.
        """
        for name, array in weights.items():
            expected = self.weights.get(name)
            if expected is None or expected != (array.dtype, array.shape):
                raise BadBlobError(
                    f"{where}: weight '{name}': expected {expected}, found {(array.dtype, array.shape)}"
                )
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise BadBlobError(f"{where}: weight '{name}' is not finite")
        return _Session(self.data, weights, where=where)


class _Session:
    def __init__(self, program: bytes, weights: dict[str, npt.NDArray[Any]], *, where: str) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = 1
        options.inter_op_num_threads = 1
        options.log_severity_level = 4
        # The runtime does not own these: they must live as long as the session.
        self._values = {
            name: ort.OrtValue.ortvalue_from_numpy(np.array(array)) for name, array in weights.items()
        }
        for name, value in self._values.items():
            options.add_initializer(name, value)
        try:
            self._session = ort.InferenceSession(program, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime raises classes of its own without a common parent
            raise BadBlobError(f"{where}: the program does not load ({error})") from error
        self.reads_domain = DOMAIN_INPUT_NAME in [one.name for one in self._session.get_inputs()]

    def run(
        self, embeddings_BE: npt.NDArray[np.float32], domain_B: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Probabilities float32 [B, T]. Args: domain_B: for a program that reads the domain."""
        inputs: dict[str, npt.NDArray[Any]] = {INPUT_NAME: embeddings_BE}
        if domain_B is not None:
            inputs[DOMAIN_INPUT_NAME] = domain_B
        (probabilities_BT,) = self._session.run([OUTPUT_NAME], inputs)
        result: npt.NDArray[np.float32] = probabilities_BT
        return result


class ServingModel:
    """What a version brings beside its rows; switched together with them."""

    def __init__(self, received: ReceivedVersion, *, before: ServingModel | None) -> None:
        """Build the session and predict once, so that the first request meets a warm model.

        Args: before: the model of the version before; an unchanged program and signature are reused.
        Raises: BadBlobError if the model does not load or its answer is not [1, T] probabilities.
        """
        self.manifest: Manifest = received.manifest
        self.shared = received.shared
        self.signature: ServingSignature | None = None
        self._program: Program | None = None
        self._session: _Session | None = None
        dense, program, signature = (received.manifest.blob(kind) for kind in MODEL_KINDS)  # type: ignore[arg-type]
        if dense is None or program is None or signature is None:
            return
        where = f"version {received.manifest.version}: blob"
        reusable = before.shared if before is not None else {}
        if before is not None and program.name in reusable:
            self._program = before._program
        if before is not None and signature.name in reusable:
            self.signature = before.signature
        if self._program is None:
            self._program = Program(received.blobs[program.name], where=f"{where} '{program.name}'")
        if self.signature is None:
            self.signature = decode_signature(
                received.blobs[signature.name], where=f"{where} '{signature.name}'"
            )
        where = f"{where} '{dense.name}'"
        try:
            weights, _ = decode_tensors(received.blobs[dense.name], where=where)
        except BlobError as error:
            raise BadBlobError(str(error)) from error
        self._session = self._program.session(weights, where=where)
        where = f"version {received.manifest.version}"
        if self.reads_domain and DOMAIN_FEATURE not in [one.name for one in self.signature.features]:
            raise BadBlobError(
                f"{where}: the program reads '{DOMAIN_INPUT_NAME}', and its signature has no feature "
                f"'{DOMAIN_FEATURE}' that a request would bring"
            )
        self._warm_up(self.signature, where=where)

    @property
    def reads_domain(self) -> bool:
        """Whether the program must be told each impression's domain."""
        return self._session is not None and self._session.reads_domain

    def run(
        self, embeddings_BE: npt.NDArray[np.float32], domain_B: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.float32]:
        """Probabilities float32 [B, T] from the concatenated embeddings of the signature's features.

        Args: domain_B: index into the signature's domains, where the model reads it; None elsewhere.
        """
        assert self._session is not None, "a version without a model has no signature either"
        return self._session.run(embeddings_BE, domain_B)

    def _warm_up(self, signature: ServingSignature, *, where: str) -> None:
        expected = (1, len(signature.tasks))
        try:
            domain_B = np.zeros(1, np.int64) if self.reads_domain else None
            answer = self.run(np.zeros((1, signature.width), np.float32), domain_B)
        except Exception as error:  # see _Session
            raise BadBlobError(f"{where}: the program does not run ({error})") from error
        if answer.dtype != np.float32 or answer.shape != expected or not np.isfinite(answer).all():
            raise BadBlobError(
                f"{where}: expected finite float32 {expected} as '{OUTPUT_NAME}', "
                f"found {answer.dtype} {answer.shape}"
            )


def _all_tensors(graph: onnx.GraphProto) -> list[onnx.TensorProto]:
    """Every tensor of a graph: initializers, constants, and those of graphs inside its nodes."""
    tensors = list(graph.initializer)
    for node in graph.node:
        for attribute in node.attribute:
            tensors.append(attribute.t)
            tensors.extend(attribute.tensors)
            for inner in [attribute.g, *attribute.graphs]:
                tensors.extend(_all_tensors(inner) if inner.node or inner.initializer else [])
    return tensors
