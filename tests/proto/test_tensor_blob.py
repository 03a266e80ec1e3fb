"""Tensor blobs: what the safetensors library writes we read, and the other way round; hostile bytes."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save

from proto.tensor_blob import BlobError, crc32c, decode_tensors, encode_tensors

TENSORS = {
    "a": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1, -2], np.int64),
    "c": np.array([3], np.uint8),
    "empty": np.zeros((0, 4), np.float16),
}
BLOB = encode_tensors(TENSORS, metadata={"k": "v"})


def with_header(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_crc32c_is_castagnoli():
    assert crc32c(b"123456789") == 0xE3069283


def test_the_library_reads_what_we_write():
    loaded = load(BLOB)
    assert sorted(loaded) == sorted(TENSORS)
    for name, array in TENSORS.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array)


def test_we_read_what_the_library_writes():
    tensors, metadata = decode_tensors(save(TENSORS, metadata={"x": "y"}), where="here")
    assert metadata == {"x": "y"}
    for name, array in TENSORS.items():
        assert tensors[name].dtype == array.dtype
        np.testing.assert_array_equal(tensors[name], array)
    assert decode_tensors(save({}), where="here") == ({}, {})


def test_equal_tensors_give_equal_bytes_whatever_their_order():
    assert encode_tensors(dict(reversed(TENSORS.items())), metadata={"k": "v"}) == BLOB


def test_decoded_tensors_cannot_be_written():
    tensors, _ = decode_tensors(bytearray(BLOB), where="here")
    with pytest.raises(ValueError, match="read-only"):
        tensors["a"][0, 0] = 1


@pytest.mark.parametrize(
    ("blob", "message"),
    [
        (b"", "at least 8 bytes"),
        (b"\xff" * 8, "header says"),
        ((2**63).to_bytes(8, "little") + b"{}", "header says"),
        (with_header(b"[]", b""), "safetensors header"),
        (with_header(b"[" * 100_000, b""), "safetensors header"),
        (with_header(b'{"\xff": 1}', b""), "safetensors header"),
        (with_header({"__metadata__": {"k": 1}}, b""), "safetensors header"),
        (with_header({"a": {"dtype": "F32", "shape": [1]}}, bytes(4)), "safetensors header"),
        (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b""), "bytes 0..4 of 0"),
        (with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(4)), "takes 8"),
        (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)), "expected 0"),
        (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(9)), "found 9"),
        (with_header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 0]}}, b""), "shape"),
        (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, bytes(4)), "byte -4"),
        (with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, -4]}}, bytes(4)), "0..-4"),
        (with_header({"a": {"dtype": "F32", "shape": [2**62], "data_offsets": [0, 4]}}, bytes(4)), "shape"),
        (
            with_header({"a": {"dtype": "U8", "shape": [2**47], "data_offsets": [0, 2**47]}}, bytes(4)),
            "takes 140737488355328 bytes",
        ),
        (
            with_header(
                b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1' + b"0" * 99 + b"]}}", b""
            ),
            "0\\.\\.1000",
        ),
        (with_header({"a": {"dtype": "U8", "shape": [0] * 9, "data_offsets": [0, 0]}}, b""), "at most 8"),
        (with_header({f"t{i}": {} for i in range(5000)}, b""), "at most 4096 tensors"),
        (with_header(b'{"a": ' + b'{"b": ' * 50_000, b""), "safetensors header"),
        (with_header(b" " * ((1 << 20) + 8), b""), "at most 1048576 are allowed"),
        (with_header({"a": {"dtype": "U8", "shape": [1.5], "data_offsets": [0, 1]}}, bytes(1)), "header"),
        (with_header({"a": {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}}, b""), "dtype"),
        (
            with_header({"a": {"dtype": "F32", "shape": [2**47] * 7 + [0], "data_offsets": [0, 0]}}, b""),
            "shape",
        ),
        (
            with_header(
                {
                    "a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]},
                    "b": {"dtype": "F32", "shape": [1], "data_offsets": [2, 6]},
                },
                bytes(8),
            ),
            "expected 4",
        ),
    ],
)
def test_a_malformed_blob_is_refused_naming_the_place(blob, message):
    with pytest.raises(BlobError, match=message) as caught:
        decode_tensors(blob, where="version 1.2: blob 'x'")
    assert str(caught.value).startswith("version 1.2: blob 'x'")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_raise_nothing_but_the_declared_error(blob):
    with pytest.raises(BlobError):
        decode_tensors(blob, where="here")


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.binary(max_size=20))
def test_a_random_header_raises_nothing_but_the_declared_error(text, data):
    header = b'{"a": {' + text.encode("utf-8", "surrogatepass") + b"}}"
    with pytest.raises(BlobError):
        decode_tensors(with_header(header, data), where="here")


def test_an_unknown_dtype_is_not_encoded():
    with pytest.raises(BlobError, match="complex64"):
        encode_tensors({"a": np.zeros(1, np.complex64)}, metadata={})
