"""Manifests: round trip, order of versions, and what is refused."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from param_server.errors import ManifestError
from param_server.manifest import (
    Manifest,
    ManifestPosition,
    Version,
    blob_ref,
    content_name,
    decode_manifest,
    encode_manifest,
)


def make_manifest(**changes) -> Manifest:
    fields = {
        "version": Version(3, 5),
        "parent": Version(3, 4),
        "kind": "delta",
        "blobs": (
            blob_ref("rows", "t-0", b"rows", table="t", num_rows=2, num_deletes=1),
            blob_ref("dense", "dense", b"dense"),
            blob_ref("program", content_name("program", b"p"), b"p"),
            blob_ref("signature", content_name("signature", b"s"), b"s"),
        ),
        "schema_hash": "abc",
        "watermark_ms": 10,
        "produced_ms_newest": 20,
        "created_ms": 30,
        "positions": (ManifestPosition(topic="i", partition=1, kafka_offset=2, row=3),),
        "counts": {"impressions": 4},
    }
    return Manifest(**{**fields, **changes})


def test_round_trip_and_unknown_fields_are_tolerated():
    manifest = make_manifest()
    assert decode_manifest(encode_manifest(manifest), where="here") == manifest
    newer = msgspec.json.decode(encode_manifest(manifest)) | {"field_of_next_year": [1]}
    assert decode_manifest(msgspec.json.encode(newer), where="here") == manifest


def test_versions_are_ordered_by_generation_then_sequence():
    ordered = [Version(1, 1), Version(1, 2), Version(1, 10), Version(2, 0), Version(10, 0)]
    assert sorted(ordered[index] for index in (3, 0, 4, 2, 1)) == ordered
    assert [Version.parse(str(version)) for version in ordered] == ordered


@pytest.mark.parametrize(
    "text", ["", "1", "1.", ".1", "1.2.3", "-1.2", "1. 2", "a.b", "٣.1", "1." + "9" * 30, "1." + "9" * 19]
)
def test_a_text_that_is_no_version_is_refused(text):
    with pytest.raises(ManifestError):
        Version.parse(text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parent": Version(3, 5)}, "above its parent"),
        ({"parent": None}, "needs a parent"),
        ({"format_version": 2}, "format"),
        ({"blobs": (blob_ref("dense", "dense", b"d"),)}, "or none of them"),
        ({"blobs": make_manifest().blobs[:3]}, "or none of them"),
        ({"blobs": make_manifest().blobs[:1] * 2}, "unique"),
    ],
)
def test_a_manifest_that_contradicts_itself_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_manifest(**changes)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "A", "a b", "ü", "x" * 129, "a\n"])
def test_a_blob_name_that_could_leave_its_folder_is_refused(name):
    with pytest.raises(ManifestError, match="blob's name"):
        blob_ref("rows", name, b"x", table="t")


def test_a_blob_reference_must_fit_its_kind():
    with pytest.raises(ManifestError, match="table"):
        blob_ref("rows", "a", b"x")
    with pytest.raises(ManifestError, match="sha256"):
        blob_ref("program", "program", b"x")
    with pytest.raises(ManifestError, match="num_bytes"):
        blob_ref("rows", "a", bytes((4 << 20) + 1), table="t")
    with pytest.raises(ManifestError, match="num_bytes"):
        blob_ref("dense", "a", b"")


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=100) | st.text(max_size=100).map(str.encode))
def test_random_bytes_raise_nothing_but_the_declared_error(data):
    with pytest.raises(ManifestError, match="here"):
        decode_manifest(data, where="here")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_a_damaged_manifest_raises_nothing_but_the_declared_error(data):
    text = bytearray(encode_manifest(make_manifest()))
    for _ in range(data.draw(st.integers(1, 3))):
        text[data.draw(st.integers(0, len(text) - 1))] = data.draw(st.integers(0, 255))
    try:
        manifest = decode_manifest(bytes(text), where="here")
    except ManifestError:
        return
    assert manifest.parent is not None
    assert manifest.parent < manifest.version
