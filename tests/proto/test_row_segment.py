"""RowSegments: round trips in every row format, splitting, and blobs that an enemy wrote."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from proto.row_formats import packed_row_bytes
from proto.row_segment import (
    BlobError,
    NotFiniteError,
    RowSegment,
    decode,
    decode_packed,
    encode,
    finite_rows,
    split,
)
from proto.tensor_blob import decode_tensors, encode_tensors

COLUMNS = ("ids_N", "rows_ND", "deleted_ids_M", "state_N", "scores_N", "last_seen_s_N", "updates_N")


def make_segment(num_rows: int = 50, num_deletes: int = 7, dim: int = 8, *, whole: bool = True) -> RowSegment:
    rng = np.random.default_rng(num_rows + dim)
    ids = rng.choice(2**62, size=num_rows + num_deletes, replace=False) - 2**61
    segment = RowSegment(
        table="dim8",
        ids_N=ids[:num_rows],
        rows_ND=rng.normal(size=(num_rows, dim)).astype(np.float32),
        deleted_ids_M=ids[num_rows:],
    )
    if not whole:
        return segment
    return dataclasses.replace(
        segment,
        state_N=rng.random(num_rows, np.float32),
        scores_N=rng.random(num_rows, np.float32),
        last_seen_s_N=rng.integers(0, 2**33, num_rows),
        updates_N=rng.integers(0, 2**32, num_rows, dtype=np.uint32),
    )


def assert_equal(one: RowSegment, other: RowSegment) -> None:
    assert one.table == other.table
    for name in COLUMNS:
        mine, theirs = getattr(one, name), getattr(other, name)
        assert (mine is None) == (theirs is None), name
        if mine is not None:
            assert mine.dtype == theirs.dtype
            np.testing.assert_array_equal(mine, theirs, err_msg=name)


@pytest.mark.parametrize("shape", [(50, 7), (0, 7), (50, 0), (0, 0)])
@pytest.mark.parametrize("whole", [True, False])
def test_float32_round_trip_is_exact(shape, whole):
    segment = make_segment(*shape, whole=whole)
    assert_equal(decode(encode(segment, row_format="float32"), where="here"), segment)


@pytest.mark.parametrize(("row_format", "rms_max"), [("float16", 5e-4), ("int8", 6e-3)])
def test_packed_rows_stay_within_their_error_and_other_columns_are_exact(row_format, rms_max):
    segment = make_segment(2000, 3, 16)
    decoded = decode(encode(segment, row_format=row_format), where="here")
    error = np.sqrt(np.mean((decoded.rows_ND - segment.rows_ND) ** 2) / np.mean(segment.rows_ND**2))
    assert 0 < error < rms_max
    assert_equal(dataclasses.replace(decoded, rows_ND=segment.rows_ND), segment)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.lists(st.floats(-(2.0**99), 2.0**99, width=32), min_size=4, max_size=4), min_size=1, max_size=6
    ),
)
def test_an_int8_value_is_off_by_at_most_half_a_step(rows):
    rows_ND = np.array(rows, np.float32)
    segment = RowSegment(
        table="t", ids_N=np.arange(len(rows)), rows_ND=rows_ND, deleted_ids_M=np.zeros(0, np.int64)
    )
    decoded = decode(encode(segment, row_format="int8"), where="here").rows_ND
    spread_N = rows_ND.max(axis=1).astype(np.float64) - rows_ND.min(axis=1)
    step_N1 = spread_N[:, None] / 255
    slack_N1 = np.abs(rows_ND).max(axis=1).astype(np.float64)[:, None] * 1e-6 + 1e-38
    assert (np.abs(decoded.astype(np.float64) - rows_ND) <= 0.5 * step_N1 + slack_N1).all()


def test_int8_keeps_a_row_of_one_value_exact():
    rows_ND = np.full((2, 4), 0.1, np.float32)
    segment = RowSegment("t", np.arange(2), rows_ND, np.zeros(0, np.int64))
    np.testing.assert_array_equal(decode(encode(segment, row_format="int8"), where="x").rows_ND, rows_ND)


def test_int8_has_the_layout_that_fbgemm_reads():
    torch = pytest.importorskip("torch")
    pytest.importorskip("fbgemm_gpu")
    segment = make_segment(20, 0, 16)
    tensors, _ = decode_tensors(encode(segment, row_format="int8"), where="here")
    theirs = torch.ops.fbgemm.Fused8BitRowwiseQuantizedToFloat(torch.from_numpy(tensors["rows"].copy()))
    ours = decode(encode(segment, row_format="int8"), where="here").rows_ND
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("row_format", "value"), [("float16", 1e5), ("int8", 3e38)])
def test_a_row_that_does_not_fit_is_refused_instead_of_cut(row_format, value):
    segment = RowSegment("t", np.arange(1), np.full((1, 4), value, np.float32), np.zeros(0, np.int64))
    with pytest.raises(BlobError, match=row_format):
        encode(segment, row_format=row_format)


@pytest.mark.parametrize("row_format", ["float32", "float16", "int8"])
@pytest.mark.parametrize("shape", [(1000, 0), (1000, 900), (0, 900), (0, 0), (1, 1)])
def test_split_parts_fit_and_join_to_the_whole(row_format, shape):
    segment = make_segment(*shape)
    parts = split(segment, bytes_max=4096, row_format=row_format)
    assert all(len(encode(part, row_format=row_format)) <= 4096 for part in parts)
    for name in COLUMNS:
        pieces = [column for part in parts if (column := getattr(part, name)) is not None]
        np.testing.assert_array_equal(np.concatenate(pieces), getattr(segment, name), err_msg=name)


def test_split_refuses_a_size_in_which_no_row_fits():
    with pytest.raises(BlobError, match="bytes_max is 1040"):
        split(make_segment(), bytes_max=1040)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": "a/b"}, "table name"),
        ({"ids_N": np.zeros(50, np.int64)}, "more than once"),
        ({"deleted_ids_M": np.zeros(2, np.int64)}, "more than once"),
        ({"deleted_ids_M": make_segment().ids_N[:1]}, "more than once"),
        ({"ids_N": np.arange(49)}, "shape"),
        ({"ids_N": np.arange(50, dtype=np.int32)}, "int32"),
        ({"state_N": np.zeros(49, np.float32)}, "state_N"),
        ({"updates_N": np.zeros(50, np.int64)}, "updates_N"),
        ({"rows_ND": np.full((50, 8), np.nan, np.float32)}, "not finite"),
        ({"rows_ND": np.full((50, 8), np.inf, np.float32)}, "not finite"),
        ({"scores_N": np.full(50, np.nan, np.float32)}, "scores_N"),
        ({"rows_ND": np.zeros((50, 0), np.float32)}, "dim"),
        ({"rows_ND": np.zeros((50, 8), np.float64)}, "float64"),
    ],
)
def test_a_segment_that_breaks_its_rules_is_neither_written_nor_read(changes, message, monkeypatch):
    bad = dataclasses.replace(make_segment(), **changes)
    with pytest.raises(BlobError, match=message):
        encode(bad, row_format="float32")
    # Written by someone who does not check, it is refused by the reader.
    monkeypatch.setattr("proto.row_segment._check", lambda segment, where: None)
    blob = encode(bad, row_format="float32")
    monkeypatch.undo()
    with pytest.raises(BlobError):
        decode(blob, where="here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("format", "other"),
        ("format_version", "2"),
        ("row_format", "int4"),
        ("row_format", "int8"),
        ("dim", "9"),
        ("dim", "-8"),
        ("dim", "99999999999999999999"),
        ("dim", "٨"),
        ("table", ""),
    ],
)
def test_wrong_metadata_is_refused(key, value):
    tensors, metadata = decode_tensors(encode(make_segment(), row_format="float32"), where="here")
    with pytest.raises(BlobError, match="over there"):
        decode(encode_tensors(tensors, metadata={**metadata, key: value}), where="over there")


def test_unknown_and_missing_columns_are_refused():
    tensors, metadata = decode_tensors(encode(make_segment(), row_format="float32"), where="here")
    with pytest.raises(BlobError, match="unknown"):
        decode(encode_tensors({**tensors, "extra": tensors["ids_N"]}, metadata=metadata), where="here")
    del tensors["ids_N"]
    with pytest.raises(BlobError, match="'ids_N' is missing"):
        decode(encode_tensors(tensors, metadata=metadata), where="here")


def test_an_int8_scale_that_is_not_finite_is_refused():
    tensors, metadata = decode_tensors(encode(make_segment(), row_format="int8"), where="here")
    packed = tensors["rows"].copy()
    packed[3, -8:-4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)
    with pytest.raises(BlobError, match="not finite"):
        decode(encode_tensors({**tensors, "rows": packed}, metadata=metadata), where="here")


BLOBS = {name: encode(make_segment(6, 2, 4), row_format=name) for name in ("float32", "float16", "int8")}


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(BLOBS)), st.data())
def test_a_truncated_blob_is_always_refused(row_format, data):
    blob = BLOBS[row_format]
    end = data.draw(st.integers(0, len(blob) - 1))
    with pytest.raises(BlobError):
        decode(blob[:end], where="here")


@settings(max_examples=400, deadline=None)
@given(st.sampled_from(sorted(BLOBS)), st.data())
def test_flipped_bits_give_the_declared_error_or_a_valid_segment(row_format, data):
    blob = bytearray(BLOBS[row_format])
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        segment = decode(bytes(blob), where="here")
    except BlobError:
        return
    assert np.isfinite(segment.rows_ND).all()
    assert segment.rows_ND.shape == (len(segment.ids_N), 4)
    encode(segment, row_format="float32")


def spoiled(row_format: str, bad_rows: list[int]) -> bytes:
    """Six good rows of dim 4, some then made not finite by someone who does not check."""
    tensors, metadata = decode_tensors(encode(make_segment(6, 2, 4), row_format=row_format), where="here")
    rows = tensors["rows"].copy()
    for row in bad_rows:
        if row_format == "int8":
            rows[row, -4:] = np.frombuffer(np.float32(np.inf).tobytes(), np.uint8)
        else:
            rows[row, 1] = np.nan
    return encode_tensors({**tensors, "rows": rows}, metadata=metadata)


@pytest.mark.parametrize("row_format", ["float32", "float16", "int8"])
def test_rows_that_are_not_finite_are_refused_with_their_number(row_format):
    with pytest.raises(NotFiniteError, match=r"over there: column 'rows' .* 2 of 6 rows") as caught:
        decode(spoiled(row_format, [1, 4]), where="over there")
    assert caught.value.num_rows == 2


def test_an_int8_range_beyond_float32_is_refused_even_where_no_code_reaches_its_end():
    tensors, metadata = decode_tensors(encode(make_segment(6, 0, 4), row_format="int8"), where="here")
    rows = tensors["rows"].copy()
    rows[2, :4] = 0
    rows[2, 4:8] = np.frombuffer(np.float32(3e38).tobytes(), np.uint8)
    with pytest.raises(NotFiniteError):
        decode(encode_tensors({**tensors, "rows": rows}, metadata=metadata), where="here")


def test_a_writer_can_part_with_rows_that_are_not_finite_and_names_them():
    good = make_segment(6, 2, 4)
    rows_ND, state_N = good.rows_ND.copy(), good.state_N.copy()
    rows_ND[1, 2], state_N[4] = np.inf, np.nan
    kept, refused_ids = finite_rows(dataclasses.replace(good, rows_ND=rows_ND, state_N=state_N))
    assert refused_ids.tolist() == good.ids_N[[1, 4]].tolist()
    assert kept.ids_N.tolist() == good.ids_N[[0, 2, 3, 5]].tolist()
    assert kept.deleted_ids_M.tolist() == good.deleted_ids_M.tolist()
    assert_equal(decode(encode(kept, row_format="float32"), where="here"), kept)
    same, none = finite_rows(good)
    assert same is good
    assert len(none) == 0


@pytest.mark.parametrize("row_format", ["float32", "float16", "int8"])
def test_packed_rows_stay_views_of_the_blob_and_unpack_to_the_decoded_rows(row_format):
    blob = encode(make_segment(50, 7, 8), row_format=row_format)
    packed = decode_packed(blob, where="here")
    assert packed.rows_NW.nbytes == 50 * packed_row_bytes(8, row_format)
    assert not packed.rows_NW.flags.owndata
    assert_equal(packed.unpacked(), decode(blob, where="here"))


def test_by_default_a_segment_is_cut_to_what_may_travel():
    ids = np.arange(70_000)
    segment = RowSegment("t", ids, np.zeros((len(ids), 16), np.float32), ids[:0])
    parts = split(segment)
    assert len(parts) == 2
    assert all(len(encode(part, row_format="float32")) <= 4 << 20 for part in parts)
