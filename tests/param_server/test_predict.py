"""Requests: what becomes of their columns, and what is refused by name."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_eviction.keys import make_keys
from param_server.errors import RequestError
from param_server.infer_codec import build_infer_request, read_inputs
from param_server.predict import mean_present
from param_server.request_keys import request_keys
from proto import open_inference_pb2 as oip


def good_inputs() -> dict[str, np.ndarray]:
    domain = np.empty(2, object)
    domain[:] = [b"slide", b"discovery"]
    return {
        "domain": domain,
        "item_id": np.array([5, -6]),
        "tags": np.array([7, 8, 9]),
        "tags.lengths": np.array([3, 0], np.int32),
        "age": np.array([1.0, np.nan], np.float32),
    }


def test_columns_become_keys_of_their_classes(kit):
    found, batch = request_keys(kit.make_signature(), good_inputs())
    assert batch == 2
    by_name = {one.feature.name: one for one in found}
    expected = {"domain": (1, [1, 0]), "item_id": (4, [5, -6]), "tags": (6, [7, 8, 9]), "age": (9, [1, 3])}
    for name, (class_id, ids) in expected.items():
        keys, _ = make_keys(np.array(ids), class_id=class_id)
        assert by_name[name].keys_L.tolist() == keys.tolist(), name
    assert by_name["tags"].lengths_B.tolist() == [3, 0]


@pytest.mark.parametrize(
    ("values", "buckets"),
    [([-np.inf, 0.999, 1.0, 2.9, 3.0, np.inf, np.nan], [0, 0, 1, 1, 2, 2, 3])],
)
def test_a_number_falls_into_the_bucket_of_the_edges_below_it(kit, values, buckets):
    inputs = {**good_inputs(), "age": np.array(values, np.float32)}
    inputs["domain"] = np.zeros(7, np.int64)
    inputs["item_id"] = np.zeros(7, np.int64)
    inputs["tags.lengths"] = np.array([3] + [0] * 6, np.int32)
    found, _ = request_keys(kit.make_signature(), inputs)
    keys, _ = make_keys(np.array(buckets), class_id=9)
    assert found[3].keys_L.tolist() == keys.tolist()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("item_id", None, "'item_id' is missing"),
        ("tags.lengths", None, "'tags.lengths' is missing"),
        ("other", np.zeros(2), "'other' is not one of"),
        ("item_id", np.zeros(3, np.int64), "'item_id': expected 2 values, found 3"),
        ("item_id", np.zeros(2, np.int32), "'item_id': expected int64"),
        ("age", np.zeros(2, np.int64), "'age': expected float32"),
        ("age", np.zeros(1, np.float32), "'age': expected 2 values"),
        ("tags", np.zeros(4, np.int64), "lengths sum to 3, input 'tags' has 4"),
        ("tags.lengths", np.array([4, -1], np.int32), "lengths must be in 0..5"),
        ("tags.lengths", np.array([6, 0], np.int32), "lengths must be in 0..5"),
        ("tags.lengths", np.array([3, 0, 0], np.int32), "'tags.lengths': expected 2 values"),
        ("tags.lengths", np.array([3, 0]), "'tags.lengths': expected int32"),
        ("domain", np.array([b"slide", b"moon"], object), "unknown domain 'moon'"),
        ("domain", np.array([0, 2]), "indices must be in 0..1"),
        ("domain", np.array([-1, 0]), "indices must be in 0..1"),
        ("domain", np.zeros(2, np.float32), "expected BYTES or INT64"),
        ("domain", np.zeros((1 << 16) + 1, np.int64), "at most 65536"),
    ],
)
def test_a_wrong_input_is_refused_by_name(kit, name, value, message):
    inputs = good_inputs()
    if value is None:
        del inputs[name]
    else:
        inputs[name] = value
    with pytest.raises(RequestError, match=message):
        request_keys(kit.make_signature(), inputs)


def test_typed_and_raw_contents_mean_the_same():
    raw = build_infer_request(good_inputs())
    typed = oip.ModelInferRequest()
    for tensor, column in zip(raw.inputs, good_inputs().values(), strict=True):
        copy = typed.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        field = {"INT64": "int64_contents", "INT32": "int_contents", "FP32": "fp32_contents"}
        name = field.get(tensor.datatype, "bytes_contents")
        getattr(copy.contents, name).extend(column.tolist())
    one, other = read_inputs(raw), read_inputs(typed)
    assert list(one) == list(other) == list(good_inputs())
    for name, column in good_inputs().items():
        assert one[name].dtype == other[name].dtype == column.dtype
        np.testing.assert_array_equal(one[name], column)
        np.testing.assert_array_equal(other[name], column)


def tensor(**fields):
    fields = {"name": "x", "datatype": "INT64", "shape": [1], **fields}
    raw = fields.pop("raw", bytes(8))
    request = oip.ModelInferRequest(inputs=[oip.ModelInferRequest.InferInputTensor(**fields)])
    request.raw_input_contents.append(raw)
    return request


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (tensor(shape=[]), "shape"),
        (tensor(shape=[1, 2]), "shape"),
        (tensor(shape=[-1]), "shape"),
        (tensor(shape=[2**62]), "found 1"),
        (tensor(shape=[2]), "found 1"),
        (tensor(raw=bytes(7)), "no whole number"),
        (tensor(datatype="FP64"), "datatype"),
        (tensor(datatype="BYTES", raw=b"\x00\x00"), "passes the end"),
        (tensor(datatype="BYTES", raw=b"\xff\xff\xff\xff"), "passes the end"),
        (tensor(contents=oip.InferTensorContents(int64_contents=[1])), "both"),
        (oip.ModelInferRequest(raw_input_contents=[b""]), "1 entries for 0 inputs"),
        (oip.ModelInferRequest(inputs=[{"name": "x", "datatype": "INT64", "shape": [0]}] * 2), "twice"),
    ],
)
def test_a_malformed_tensor_is_refused(request_, message):
    with pytest.raises(RequestError, match=message):
        read_inputs(request_)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60))
def test_random_bytes_as_strings_raise_nothing_but_the_declared_error(raw):
    try:
        values = read_inputs(tensor(datatype="BYTES", raw=raw, shape=[3]))["x"]
    except RequestError:
        return
    assert sum(4 + len(value) for value in values) == len(raw)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.lists(st.booleans(), max_size=4), max_size=6), st.integers(0, 99))
def test_the_mean_is_over_the_rows_that_are_present(present, seed):
    present_L = np.array([one for group in present for one in group], np.bool_)
    lengths_B = np.array([len(group) for group in present], np.int64)
    rows_LD = np.random.default_rng(seed).normal(size=(len(present_L), 3)).astype(np.float32)
    rows_LD[~present_L] = 0
    found = mean_present(rows_LD, present_L, lengths_B)
    start = 0
    for index, group in enumerate(present):
        chosen = rows_LD[start : start + len(group)][present_L[start : start + len(group)]]
        expected = chosen.mean(axis=0) if len(chosen) else np.zeros(3)
        np.testing.assert_allclose(found[index], expected, atol=1e-6)
        start += len(group)
