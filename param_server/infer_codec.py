"""Open Inference Protocol tensors to numpy columns and back; protobuf stops here.

Source: https://github.com/kserve/open-inference-protocol, "Tensor Data": raw contents are row-major and
little-endian, and each BYTES element is its uint32 length and its bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from param_server.errors import RequestError
from proto import open_inference_pb2

Array = npt.NDArray[Any]

RAW_DTYPES: dict[str, np.dtype[Any]] = {
    "INT64": np.dtype("<i8"),
    "INT32": np.dtype("<i4"),
    "FP32": np.dtype("<f4"),
}
TYPED_FIELDS = {
    "INT64": "int64_contents",
    "INT32": "int_contents",
    "FP32": "fp32_contents",
    "BYTES": "bytes_contents",
}
INPUTS_MAX = 4096


def read_inputs(request: open_inference_pb2.ModelInferRequest) -> dict[str, Array]:
    """The request's columns by name: int64, int32 or float32 [n], or bytes objects [n] for BYTES.

    A column of shape [n] or [n, 1] is accepted.
    Raises: RequestError naming the input.
    """
    raw = request.raw_input_contents
    if len(request.inputs) > INPUTS_MAX:
        raise RequestError(f"at most {INPUTS_MAX} inputs are allowed, found {len(request.inputs)}")
    if raw and len(raw) != len(request.inputs):
        raise RequestError(
            f"raw_input_contents has {len(raw)} entries for {len(request.inputs)} inputs; expected as many"
        )
    columns: dict[str, Array] = {}
    for index, tensor in enumerate(request.inputs):
        if tensor.name in columns:
            raise RequestError(f"input '{tensor.name}' occurs twice")
        columns[tensor.name] = _column(tensor, raw[index] if raw else None)
    return columns


def _column(tensor: Any, raw: bytes | None) -> Array:
    where = f"input '{tensor.name}'"
    shape = list(tensor.shape)
    if not 1 <= len(shape) <= 2 or (len(shape) == 2 and shape[1] != 1) or shape[0] < 0:
        raise RequestError(f"{where}: expected shape [n] or [n, 1], found {shape}")
    if tensor.datatype not in TYPED_FIELDS:
        raise RequestError(
            f"{where}: expected a datatype of {sorted(TYPED_FIELDS)}, found '{tensor.datatype}'"
        )
    if raw is not None:
        if tensor.HasField("contents"):
            raise RequestError(f"{where}: has both raw_input_contents and contents")
        values = _from_raw(raw, tensor.datatype, where=where)
    elif tensor.datatype == "BYTES":
        values = _objects(list(tensor.contents.bytes_contents))
    else:
        field = getattr(tensor.contents, TYPED_FIELDS[tensor.datatype])
        values = np.array(field, dtype=RAW_DTYPES[tensor.datatype])
    if len(values) != shape[0]:
        raise RequestError(f"{where}: shape {shape} asks for {shape[0]} values, found {len(values)}")
    return values


def _from_raw(raw: bytes, datatype: str, *, where: str) -> Array:
    if datatype == "BYTES":
        return _objects(_split_bytes(raw, where=where))
    dtype = RAW_DTYPES[datatype]
    if len(raw) % dtype.itemsize:
        raise RequestError(f"{where}: {len(raw)} raw bytes are no whole number of {datatype} values")
    return np.frombuffer(raw, dtype=dtype)


def _split_bytes(raw: bytes, *, where: str) -> list[bytes]:
    values = []
    position = 0
    while position < len(raw):
        length = int.from_bytes(raw[position : position + 4], "little")
        end = position + 4 + length
        if position + 4 > len(raw) or end > len(raw):
            raise RequestError(f"{where}: a BYTES value at raw byte {position} passes the end, {len(raw)}")
        values.append(raw[position + 4 : end])
        position = end
    return values


def _objects(values: list[bytes]) -> Array:
    column = np.empty(len(values), dtype=np.object_)
    column[:] = values
    return column


def build_infer_request(inputs: Mapping[str, Array]) -> open_inference_pb2.ModelInferRequest:
    """A request with raw contents; an empty model name means the replica's one model.

    Raises: RequestError naming an input of a dtype that the protocol part here does not carry.
    """
    request = open_inference_pb2.ModelInferRequest()
    for name, column in inputs.items():
        datatype, raw = _to_raw(name, np.asarray(column))
        request.inputs.add(name=name, datatype=datatype, shape=column.shape)
        request.raw_input_contents.append(raw)
    return request


def _to_raw(name: str, column: Array) -> tuple[str, bytes]:
    for datatype, dtype in RAW_DTYPES.items():
        if column.dtype == dtype:
            return datatype, column.tobytes()
    if column.dtype.kind in "SUO":
        encoded = [value.encode() if isinstance(value, str) else bytes(value) for value in column.tolist()]
        return "BYTES", b"".join(len(value).to_bytes(4, "little") + value for value in encoded)
    raise RequestError(
        f"input '{name}': expected int64, int32, float32, str or bytes, found {column.dtype.name}"
    )


def write_outputs(
    response: open_inference_pb2.ModelInferResponse, outputs: Mapping[str, npt.NDArray[np.float32]]
) -> None:
    """Append one FP32 [B] tensor an output, as raw contents."""
    for name, values_B in outputs.items():
        response.outputs.add(name=name, datatype="FP32", shape=values_B.shape)
        response.raw_output_contents.append(np.ascontiguousarray(values_B, dtype="<f4").tobytes())


def read_outputs(response: open_inference_pb2.ModelInferResponse) -> dict[str, Array]:
    """Output name -> float32 [B]."""
    return {
        tensor.name: np.frombuffer(raw, dtype="<f4")
        for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=True)
    }
