"""The corpus: good inputs and near misses to start from; `python -m tests.fuzz corpus` writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from param_server.blob_parts import split_blob, to_message
from param_server.infer_codec import build_infer_request
from param_server.manifest import Manifest, Version, blob_ref, content_name, encode_manifest
from param_server.signature import encode_signature
from proto import param_server_pb2
from proto.row_segment import RowSegment, encode
from proto.tensor_blob import crc32c, encode_tensors
from tests.fuzz.targets import DIM, SIGNATURE

CORPUS = Path(__file__).parent / "corpus"


def corpus(target: str) -> list[bytes]:
    """The committed inputs of a target."""
    return [path.read_bytes() for path in sorted((CORPUS / target).glob("*.bin"))]


def write_corpus() -> None:
    for target, name, data in _seeds():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.bin").write_bytes(data)


def _seeds() -> Iterator[tuple[str, str, bytes]]:
    for row_format in ("float32", "float16", "int8"):
        yield "segment", row_format, encode(_segment(whole=True), row_format=row_format)
    yield "segment", "bare", encode(_segment(whole=False), row_format="float32")
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode()
    yield "segment", "huge_shape", len(header).to_bytes(8, "little") + header + bytes(4)
    yield "segment", "huge_header", (2**62).to_bytes(8, "little") + b"{}"
    yield "segment", "deep_header", (400).to_bytes(8, "little") + b'{"a":' + b"[" * 395
    version = _version()
    manifest = encode_manifest(version[0])
    yield "manifest", "full", manifest
    yield "manifest", "no_parent", manifest.replace(b'"full"', b'"delta"')
    yield "manifest", "big_numbers", manifest.replace(b'"sequence":1', b'"sequence":9999999999999999999999')
    yield "signature", "good", encode_signature(SIGNATURE)
    yield "signature", "wide", encode_signature(SIGNATURE).replace(b'"dim":4', b'"dim":4097')
    columns = {
        "domain": np.array([b"slide", b"discovery"], object),
        "item_id": np.array([5, -6]),
        "tags": np.array([7, 8, 9]),
        "tags.lengths": np.array([3, 0], np.int32),
        "age": np.array([1.0, np.nan], np.float32),
    }
    raw = build_infer_request(columns)
    yield "request", "raw", raw.SerializeToString()
    raw.inputs[0].shape[0] = 2**62
    yield "request", "huge_shape", raw.SerializeToString()
    typed = build_infer_request({})
    contents = {"domain": "int64_contents", "item_id": "int64_contents", "tags": "int64_contents"}
    contents |= {"tags.lengths": "int_contents", "age": "fp32_contents"}
    for name, field in contents.items():
        values = [0, 1] if name == "domain" else columns[name].tolist()
        kind = {"int64_contents": "INT64", "int_contents": "INT32", "fp32_contents": "FP32"}[field]
        tensor = typed.inputs.add(name=name, datatype=kind, shape=[len(values)])
        getattr(tensor.contents, field).extend(values)
    yield "request", "typed", typed.SerializeToString()
    for name, first in (("mended", b"\x01"), ("as_sent", b"\x00")):
        yield "subscription", name, first + _stream(*version)


def _segment(*, whole: bool) -> RowSegment:
    rng = np.random.default_rng(1)
    extra = {
        "state_N": rng.random(3, np.float32),
        "scores_N": rng.random(3, np.float32),
        "last_seen_s_N": rng.integers(0, 2**33, 3),
        "updates_N": rng.integers(0, 2**32, 3, dtype=np.uint32),
    }
    return RowSegment(
        table="t",
        ids_N=np.array([3, -9, 2**60]),
        rows_ND=rng.normal(size=(3, DIM)).astype(np.float32),
        deleted_ids_M=np.array([1, 2]),
        **(extra if whole else {}),
    )


def _version() -> tuple[Manifest, list[tuple[str, str, bytes]]]:
    signature = encode_signature(SIGNATURE)
    segment = RowSegment("t", np.arange(2), np.ones((2, DIM), np.float32), np.zeros(0, np.int64))
    blobs = [
        ("rows", "t-0", encode(segment, row_format="float32")),
        ("dense", "dense", encode_tensors({"w": np.ones(2, np.float32)}, metadata={})),
        ("program", content_name("program", b"program"), b"program"),
        ("signature", content_name("signature", signature), signature),
    ]
    references = tuple(
        blob_ref(kind, name, data, table="t" if kind == "rows" else "", num_rows=2 * (kind == "rows"))
        for kind, name, data in blobs
    )
    manifest = Manifest(
        version=Version(1, 1),
        parent=None,
        kind="full",
        blobs=references,
        schema_hash="s1",
        watermark_ms=5,
        produced_ms_newest=6,
        created_ms=7,
    )
    return manifest, blobs


def _stream(manifest: Manifest, blobs: list[tuple[str, str, bytes]]) -> bytes:
    data = encode_manifest(manifest)
    part = param_server_pb2.VersionPart
    parts = [part(manifest=param_server_pb2.ManifestPart(data=data, crc32c=crc32c(data)))]
    for kind, name, content in blobs:
        parts += [part(blob=one) for one in split_blob(manifest.version, kind, name, content)]
    parts.append(part(end=to_message(manifest.version)))
    texts = [one.SerializeToString() for one in parts]
    return b"".join(len(text).to_bytes(2, "little") + text for text in texts)
