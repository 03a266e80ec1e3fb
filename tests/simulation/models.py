"""A model as small as one can be: its answer to zeros is the one number that its dense weights hold."""

from __future__ import annotations

from functools import cache

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from param_server.client import INPUT_NAME, OUTPUT_NAME
from param_server.manifest import BlobRef, blob_ref, content_name
from param_server.serving_model import ServingModel
from param_server.signature import ServingSignature, SignatureFeature, encode_signature
from proto.tensor_blob import encode_tensors
from tests.simulation.universe import DIM, TABLE

SCHEMA_HASH = "s1"
NUM_PROGRAMS = 2

Blob = tuple[BlobRef, bytes]


@cache
def shared_blobs(number: int) -> tuple[Blob, Blob]:
    """The program and the signature; programs of different numbers differ in their bytes alone."""
    graph = helper.make_graph(
        [helper.make_node("Gemm", [INPUT_NAME, "weight", "bias"], [OUTPUT_NAME])],
        f"program-{number % NUM_PROGRAMS}",
        [helper.make_tensor_value_info(INPUT_NAME, TensorProto.FLOAT, ["batch", DIM])],
        [helper.make_tensor_value_info(OUTPUT_NAME, TensorProto.FLOAT, ["batch", 1])],
        [
            numpy_helper.from_array(np.ones((DIM, 1), np.float32), "weight"),
            numpy_helper.from_array(np.zeros(1, np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    program = bytes(model.SerializeToString())
    feature = SignatureFeature(name="id", class_id=1, table=TABLE, dim=DIM)
    signature = encode_signature(
        ServingSignature(
            model_name="m", schema_hash=SCHEMA_HASH, features=(feature,), domains=("d",), tasks=("click",)
        )
    )
    return (
        (blob_ref("program", content_name("program", program), program), program),
        (blob_ref("signature", content_name("signature", signature), signature), signature),
    )


def dense_blob(bias: float) -> Blob:
    data = encode_tensors({"bias": np.array([bias], np.float32)}, metadata={})
    return blob_ref("dense", "dense", data), data


def answer(model: ServingModel) -> float:
    """What the model says to zeros."""
    return float(model.run(np.zeros((1, DIM), np.float32))[0, 0])
