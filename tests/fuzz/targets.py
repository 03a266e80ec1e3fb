"""What the fuzzers call: each decoder of bytes from outside, with the errors that it may raise.

A target returns for bytes that are good or refused as declared; anything else that comes out of it is a
finding. What was accepted must also hold what its type promises.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from google.protobuf.message import DecodeError

from param_server.errors import BadBlobError, LimitError, ManifestError, RequestError
from param_server.infer_codec import read_inputs
from param_server.manifest import decode_manifest, encode_manifest
from param_server.receive import receive_versions
from param_server.request_keys import request_keys
from param_server.signature import (
    ServingSignature,
    SignatureFeature,
    decode_signature,
    encode_signature,
)
from proto import open_inference_pb2, param_server_pb2
from proto.row_segment import BlobError, decode_packed, encode
from proto.tensor_blob import crc32c

WHERE = "fuzz: input"
DIM = 4
SIGNATURE = ServingSignature(
    model_name="freshet",
    schema_hash="s1",
    features=(
        SignatureFeature(name="domain", class_id=1, table="t", dim=DIM),
        SignatureFeature(name="item_id", class_id=4, table="t", dim=DIM),
        SignatureFeature(name="tags", class_id=6, table="t", dim=DIM, kind="multi", ids_max=5),
        SignatureFeature(name="age", class_id=9, table="t", dim=DIM, kind="dense", bucket_edges=(1.0, 3.0)),
    ),
    domains=("discovery", "slide"),
    tasks=("click", "like"),
)


def _refused(error: Exception) -> bool:
    if not str(error).startswith(WHERE):
        raise AssertionError(f"the error does not name the place: {error}") from error
    return False


def fuzz_segment(data: bytes) -> bool:
    """A RowSegment; True = it was accepted."""
    try:
        packed = decode_packed(data, where=WHERE)
    except BlobError as error:
        return _refused(error)
    segment = packed.unpacked()
    assert np.isfinite(segment.rows_ND).all()
    assert segment.rows_ND.shape == (len(segment.ids_N), packed.dim)
    every_id = np.concatenate([segment.ids_N, segment.deleted_ids_M])
    assert len(np.unique(every_id)) == len(every_id)
    again = decode_packed(encode(segment, row_format="float32"), where=WHERE).unpacked()
    np.testing.assert_array_equal(again.rows_ND, segment.rows_ND)
    np.testing.assert_array_equal(again.ids_N, segment.ids_N)
    return True


def fuzz_manifest(data: bytes) -> bool:
    try:
        manifest = decode_manifest(data, where=WHERE)
    except ManifestError as error:
        return _refused(error)
    assert decode_manifest(encode_manifest(manifest), where=WHERE) == manifest
    assert manifest.num_bytes >= 0
    return True


def fuzz_signature(data: bytes) -> bool:
    try:
        signature = decode_signature(data, where=WHERE)
    except ManifestError as error:
        return _refused(error)
    assert decode_signature(encode_signature(signature), where=WHERE) == signature
    return True


def fuzz_request(data: bytes) -> bool:
    """An Open Inference request, down to the keys of its rows."""
    try:
        request = open_inference_pb2.ModelInferRequest.FromString(data)
    except DecodeError:
        return False
    try:
        keys, batch = request_keys(SIGNATURE, read_inputs(request))
    except RequestError:
        return False
    for one in keys:
        assert len(one.keys_L) == (batch if one.lengths_B is None else int(one.lengths_B.sum()))
    return True


def fuzz_subscription(data: bytes) -> bool:
    """Messages of a subscription, each behind its length. An odd first byte mends all checksums."""
    if not data:
        return False
    messages = []
    try:
        for piece in _pieces(data[1:]):
            message = param_server_pb2.VersionPart.FromString(piece)
            if data[0] % 2:
                _mend(message)
            messages.append(message)
    except DecodeError:
        return False
    num_versions = 0
    try:
        for received in receive_versions(messages, shared={}):
            assert {blob.name for blob in received.manifest.blobs} == set(received.blobs)
            num_versions += 1
    except (BadBlobError, LimitError, ManifestError):
        return False
    return num_versions > 0


def _pieces(data: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(data):
        length = int.from_bytes(data[position : position + 2], "little")
        yield data[position + 2 : position + 2 + length]
        position += 2 + length


def _mend(message: param_server_pb2.VersionPart) -> None:
    if message.HasField("manifest"):
        message.manifest.crc32c = crc32c(message.manifest.data)
    elif message.HasField("blob"):
        message.blob.crc32c = crc32c(message.blob.data)


TARGETS: dict[str, Callable[[bytes], bool]] = {
    "segment": fuzz_segment,
    "manifest": fuzz_manifest,
    "signature": fuzz_signature,
    "request": fuzz_request,
    "subscription": fuzz_subscription,
}
