"""The replica's rules: whole versions only, never back, reload on a gap, and what it refuses to load."""

from __future__ import annotations

import threading

import msgspec
import numpy as np
import onnx
import pytest
import structlog

from param_server.blob_parts import split_blob, to_message
from param_server.client import Version, blob_ref, content_name, encode_tensors
from param_server.errors import BadBlobError, GapError, ManifestError
from param_server.follower import REFUSED_AGAIN_MAX_S, Follower
from param_server.infer_codec import build_infer_request
from param_server.manifest import encode_manifest
from param_server.predict import answer
from param_server.receive import receive_versions
from param_server.replica import Replica
from param_server.replica_service import ReplicaService
from param_server.serving_model import Program
from param_server.sources import ShardSource
from param_server.transport import open_server
from proto import open_inference_pb2 as oip
from proto import param_server_pb2, param_server_pb2_grpc
from proto.tensor_blob import crc32c, decode_tensors
from tests.ports import free_port


class Stream:
    """Versions as the parts in which a shard sends them; `edit` may spoil them."""

    def __init__(self, trainer) -> None:
        self.trainer = trainer

    def version(self, kind: str, keys, deletes=(), *, edit=lambda parts: parts, replace=None):
        trainer = self.trainer
        trainer.shared_sent = False
        manifest, blobs = trainer.describe(kind, list(keys), list(deletes))
        if replace:
            blobs = [(k, name, replace.get(k, data)) for k, name, data in blobs]
            blobs = [
                (k, content_name(k, data) if k in ("program", "signature") else name, data)
                for k, name, data in blobs
            ]
            refs = tuple(
                msgspec.structs.replace(blob_ref(k, name, data, table="t" if k == "rows" else ""), **counts)
                for (k, name, data), counts in zip(
                    blobs,
                    [{"num_rows": b.num_rows, "num_deletes": b.num_deletes} for b in manifest.blobs],
                    strict=True,
                )
            )
            manifest = msgspec.structs.replace(manifest, blobs=refs)
        data = encode_manifest(manifest)
        part = param_server_pb2.VersionPart
        head = param_server_pb2.ManifestPart(data=data, crc32c=crc32c(data))
        parts = [part(manifest=head)]
        for blob_kind, name, content in blobs:
            parts += [part(blob=one) for one in split_blob(manifest.version, blob_kind, name, content)]
        parts.append(part(end=to_message(manifest.version)))
        trainer.head = manifest.version
        return edit(parts)


@pytest.fixture
def stream(kit):
    trainer = kit.trainer(client=None)
    trainer.generation = 1
    trainer.train(kit.all_keys())
    return Stream(trainer)


@pytest.fixture
def replica():
    return Replica(clock_ms=lambda: 5)


def test_versions_are_applied_in_order_and_only_whole(kit, stream, replica):
    keys = kit.all_keys()
    full = stream.version("full", keys)
    assert not replica.ready
    replica.apply_all(full[:-1], shared={})
    assert replica.store.version is None, "the end has not come"
    replica.apply_all([*full[:-1], *full], shared={})
    assert replica.store.version == Version(1, 1)
    assert replica.ready
    replica.apply_all(stream.version("delta", keys[:3], keys[3:5]), shared={})
    assert replica.store.num_rows == len(keys) - 2
    assert list(replica.applied) == [(Version(1, 1), 5), (Version(1, 2), 5)]


def test_a_gap_is_refused_and_the_live_version_stays(kit, stream, replica):
    keys = kit.all_keys()
    replica.apply_all(stream.version("full", keys), shared={})
    stream.version("delta", keys[:3])  # lost on the way
    with pytest.raises(GapError, match=r"version 1\.3 follows 1\.2, held is 1\.1"):
        replica.apply_all(stream.version("delta", keys[:3]), shared={})
    assert replica.store.version == Version(1, 1)


def test_a_reload_from_an_older_full_version_never_goes_back(kit, stream, replica):
    """The whole chain comes again, and one version more: the answer goes from 1.3 to 1.4 at once."""
    keys = kit.all_keys()
    chain = [stream.version("full", keys)]
    chain += [stream.version("delta", keys[:3], keys[index : index + 1]) for index in (5, 6)]
    for parts in chain:
        replica.apply_all(parts, shared={})
    live = replica.store
    seen = []
    for parts in chain:
        replica.apply_all(parts, shared={})
        seen.append(replica.store.version)
    assert seen == [Version(1, 3)] * 3
    assert replica.store is live
    replica.apply_all(stream.version("delta", keys[:3], keys[7:8]), shared={})
    assert replica.store.version == Version(1, 4)
    assert replica.store.num_rows == len(keys) - 3
    applied = [version for version, _ in replica.applied]
    assert applied == [Version(1, 1), Version(1, 2), Version(1, 3), Version(1, 4)]


def test_an_orphan_is_replaced_by_a_newer_generation_built_beside_it(kit, stream, replica):
    """1.2 was lost by the shard; generation 2 goes on from 1.1. The replica holds 1.2 until 2.1 is whole."""
    keys = kit.all_keys()
    full = stream.version("full", keys)
    replica.apply_all(full, shared={})
    replica.apply_all(stream.version("delta", keys[:9], keys[10:12]), shared={})
    assert replica.store.version == Version(1, 2)
    stream.trainer.head, stream.trainer.generation = Version(1, 1), 2
    newer = stream.version("delta", [], keys[20:21])
    with pytest.raises(GapError):
        replica.apply_all(newer, shared={})
    replica.apply_all(full, shared={})
    assert replica.store.version == Version(1, 2)
    replica.apply_all(newer, shared={})
    assert replica.store.version == Version(2, 1)
    assert replica.store.num_rows == len(keys) - 1


def spoil(index: int, change):
    def edit(parts):
        change(parts[index])
        return parts

    return edit


def flip(part) -> None:
    part.blob.data = bytes([part.blob.data[0] ^ 1]) + part.blob.data[1:]


def flip_with_right_checksum(part) -> None:
    flip(part)
    part.blob.crc32c = crc32c(part.blob.data)


@pytest.mark.parametrize(
    "edit",
    [
        spoil(1, flip),
        spoil(2, flip_with_right_checksum),
        spoil(1, lambda part: setattr(part.blob, "name", "t-1")),
        spoil(1, lambda part: setattr(part.blob, "kind", "dense")),
        spoil(1, lambda part: setattr(part.blob.version, "sequence", 9)),
        spoil(0, lambda part: setattr(part.manifest, "crc32c", 0)),
        spoil(-1, lambda part: setattr(part.end, "sequence", 9)),
        lambda parts: parts[:1] + parts[2:],
        lambda parts: parts[1:],
    ],
)
def test_a_damaged_version_is_refused_and_the_live_one_stays(kit, stream, replica, edit):
    replica.apply_all(stream.version("full", kit.all_keys()), shared={})
    with pytest.raises((BadBlobError, ManifestError)):
        replica.apply_all(stream.version("delta", kit.all_keys()[:3], edit=edit), shared={})
    assert replica.store.version == Version(1, 1)
    assert replica.ready


def hostile_header(rows: bytes) -> bytes:
    header = b'{"rows":{"dtype":"F32","shape":[1099511627776,4],"data_offsets":[0,17592186044416]}}'
    return len(header).to_bytes(8, "little") + header


def respelled(rows: bytes, change) -> bytes:
    """The tensors of a rows blob, changed by someone who does not check."""
    tensors, metadata = decode_tensors(rows, where="here")
    tensors = {name: array.copy() for name, array in tensors.items()}
    change(tensors, metadata)
    return encode_tensors(tensors, metadata=metadata)


def not_finite(tensors, metadata) -> None:
    tensors["rows"][1:3] = np.nan


def doubled_id(tensors, metadata) -> None:
    tensors["ids_N"][1] = tensors["ids_N"][0]


def deleted_too(tensors, metadata) -> None:
    tensors["deleted_ids_M"] = tensors["ids_N"][:1]


def other_dtype(tensors, metadata) -> None:
    tensors["rows"] = tensors["rows"].astype(np.float64)


def other_dim(tensors, metadata) -> None:
    tensors["rows"] = np.zeros((len(tensors["rows"]), 8), np.float32)
    metadata["dim"] = "8"


def other_table(tensors, metadata) -> None:
    metadata["table"] = "u"


@pytest.mark.parametrize(
    ("spoil_rows", "message"),
    [
        (hostile_header, r"version 1\.2: blob 't-0': tensor 'rows': .* takes 17592186044416 bytes"),
        (lambda rows: rows[:-1], r"version 1\.2: blob 't-0'"),
        (lambda rows: respelled(rows, not_finite), r"blob 't-0': column 'rows' is not finite .* 2 of 5 rows"),
        (lambda rows: respelled(rows, doubled_id), r"blob 't-0': id \d+ occurs more than once"),
        (lambda rows: respelled(rows, deleted_too), r"blob 't-0': id \d+ occurs more than once"),
        (lambda rows: respelled(rows, other_dtype), r"blob 't-0': float32 rows .* found float64"),
        (lambda rows: respelled(rows, other_dim), r"version 1\.2: table 't': expected dim 4, found 8"),
        (lambda rows: respelled(rows, other_table), r"blob 't-0': expected \(table, rows, deletes\)"),
    ],
)
def test_bad_rows_are_refused_by_name_counted_and_change_nothing(kit, stream, replica, spoil_rows, message):
    keys = kit.all_keys()
    replica.apply_all(stream.version("full", keys), shared={})
    before = replica.store.gather({"t": np.array(keys)})
    _, blobs = stream.trainer.describe("delta", keys[:5], [])
    plan = replica.plan()
    bad = stream.version("delta", keys[:5], replace={"rows": spoil_rows(blobs[0][2])})
    with pytest.raises(BadBlobError, match=message) as caught:
        replica.apply_all(bad, shared={}, plan=plan)
    replica.refuse(caught.value, plan)
    assert replica.num_rows_refused == (2 if "not finite" in message else 0)
    assert replica.last_refusal == str(caught.value)
    assert replica.plan().held is None, "it asks for the newest full version"
    after = replica.store.gather({"t": np.array(keys)})
    assert after.version == Version(1, 1)
    np.testing.assert_array_equal(before.rows_ND["t"], after.rows_ND["t"])


def other_model(kit, **weights) -> bytes:
    good = {"weight": np.zeros((16, 2), np.float32), "bias": np.zeros(2, np.float32)}
    return encode_tensors({**good, **weights}, metadata={})


def external_program(kit) -> bytes:
    model = onnx.load_model_from_string(kit.make_program())
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="/etc/passwd")
    return model.SerializeToString()


@pytest.mark.parametrize(
    ("kind", "make", "message"),
    [
        ("dense", lambda kit: b"garbage", "safetensors|header"),
        ("dense", lambda kit: other_model(kit, weight=np.zeros((3, 2), np.float32)), "weight 'weight'"),
        ("dense", lambda kit: other_model(kit, surplus=np.zeros(1, np.float32)), "weight 'surplus'"),
        ("dense", lambda kit: other_model(kit, bias=np.full(2, np.nan, np.float32)), "not finite"),
        ("program", lambda kit: b"\xff\xff garbage", "not an ONNX program"),
        ("program", lambda kit: kit.make_program(width=12), "weight 'weight'"),
        ("program", lambda kit: kit.make_program(num_tasks=3), "weight 'bias'"),
        ("program", external_program, "outside of the program"),
        ("signature", lambda kit: b"{}", "signature"),
    ],
)
def test_a_model_that_does_not_load_is_refused_and_the_live_one_stays(
    kit, stream, replica, kind, make, message
):
    replica.apply_all(stream.version("full", kit.all_keys()), shared={})
    bad = stream.version("delta", kit.all_keys()[:3], replace={kind: make(kit)})
    with pytest.raises((BadBlobError, ManifestError), match=message):
        replica.apply_all(bad, shared={})
    assert replica.store.version == Version(1, 1)


def test_weights_of_the_version_replace_those_in_the_program(kit):
    program = Program(kit.make_program(), where="here")
    weights = {"weight": np.zeros((16, 2), np.float32), "bias": np.array([0, 1], np.float32)}
    session = program.session(weights, where="here")
    found = session.run(np.ones((3, 16), np.float32))
    np.testing.assert_allclose(found, [[0.5, 1 / (1 + np.exp(-1))]] * 3, atol=1e-6)


def program_of_the_domain(kit) -> bytes:
    """Adds the domain's index to every task's logit."""
    model = onnx.load_model_from_string(kit.make_program())
    gemm, sigmoid = model.graph.node
    gemm.output[0] = "of_embeddings"
    node = onnx.helper.make_node
    more = [
        node("Cast", ["domains"], ["index"], to=onnx.TensorProto.FLOAT),
        node("Unsqueeze", ["index", "axis"], ["column"]),
        node("Add", ["of_embeddings", "column"], ["logits"]),
    ]
    del model.graph.node[:]
    model.graph.node.extend([gemm, *more, sigmoid])
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "axis"))
    model.graph.input.append(onnx.helper.make_tensor_value_info("domains", onnx.TensorProto.INT64, ["batch"]))
    onnx.checker.check_model(model)
    return model.SerializeToString()


def test_a_program_that_reads_the_domain_is_told_each_impressions(kit, stream, replica):
    version = stream.version("full", kit.all_keys(), replace={"program": program_of_the_domain(kit)})
    replica.apply_all(version, shared={})
    inputs = kit.make_inputs(np.random.default_rng(3), 6)
    names = ("slide", "discovery", "slide", "slide", "discovery", "discovery")
    inputs["domain"] = np.array([name.encode() for name in names], object)
    found = answer(replica.store, inputs)
    expected = stream.trainer.expected({**inputs, "domain": np.array(names, object)})
    for task in kit.tasks:
        odds = expected[task] / (1 - expected[task]) * np.exp([kit.domains.index(name) for name in names])
        np.testing.assert_allclose(found.outputs[task], odds / (1 + odds), atol=1e-5)
    assert (
        answer(replica.store, {name: column[:0] for name, column in inputs.items()}).outputs["like"].size == 0
    )


def test_a_program_that_reads_the_domain_is_refused_where_no_request_brings_it(kit, stream, replica):
    signature = kit.make_signature()
    market, *others = signature.features
    signature = msgspec.structs.replace(
        signature, features=(msgspec.structs.replace(market, name="market"), *others)
    )
    blobs = {"program": program_of_the_domain(kit), "signature": msgspec.json.encode(signature)}
    with pytest.raises(BadBlobError, match="reads 'domains', and its signature has no feature 'domain'"):
        replica.apply_all(stream.version("full", kit.all_keys(), replace=blobs), shared={})
    assert replica.store.version is None


def test_an_unchanged_program_is_not_loaded_again(kit, stream, replica):
    replica.apply_all(stream.version("full", kit.all_keys()), shared={})
    before = replica.store.model
    shared = before.shared
    parts = stream.version("delta", kit.all_keys()[:3])
    rows_and_dense = [part for part in parts if part.blob.kind not in ("program", "signature")]
    replica.apply_all(rows_and_dense, shared=shared)
    after = replica.store.model
    assert after is not before
    assert after.signature is before.signature
    assert after._program is before._program


def test_a_request_that_meets_a_new_signature_is_read_again(kit, stream, replica, monkeypatch):
    """Between reading a request and gathering its rows, a version with another model goes live."""
    keys = kit.all_keys()
    replica.apply_all(stream.version("full", keys), shared={})
    signature = msgspec.structs.replace(kit.make_signature(), tasks=("hate", "share"))
    newer = stream.version("delta", keys[:3], replace={"signature": msgspec.json.encode(signature)})
    inputs = kit.make_inputs(np.random.default_rng(0), 4)
    inputs["domain"] = np.zeros(4, np.int64)
    gather = replica.store.gather

    def switch_then_gather(keys_N):
        monkeypatch.undo()
        replica.apply_all(newer, shared={})
        return gather(keys_N)

    monkeypatch.setattr(replica.store, "gather", switch_then_gather)
    result = answer(replica.store, inputs)
    assert result.version == Version(1, 2)
    assert list(result.outputs) == ["hate", "share"]


def test_what_a_stream_left_unfinished_is_dropped(kit, stream):
    parts = stream.version("full", kit.all_keys())
    assert list(receive_versions(parts[:-1], shared={})) == []
    assert len(list(receive_versions(parts, shared={}))) == 1


def test_a_stale_replica_is_not_ready_but_goes_on_answering(kit, stream):
    clock = {"now_ms": 0}
    replica = Replica(clock_ms=lambda: clock["now_ms"])
    service = ReplicaService(replica, stale_after_ms=1000, clock_ms=lambda: clock["now_ms"])
    assert not service.ServerReady(oip.ServerReadyRequest(), None).ready
    replica.apply_all(stream.version("full", kit.all_keys()), shared={})
    produced_ms = replica.store.model.manifest.produced_ms_newest
    for age_ms, ready in ((0, True), (1000, True), (1001, False)):
        clock["now_ms"] = produced_ms + age_ms
        assert service.ServerReady(oip.ServerReadyRequest(), None).ready is ready
        status = service.Status(param_server_pb2.StatusRequest(), None)
        assert (status.ready, status.age_ms) == (ready, age_ms)
        request = build_infer_request(kit.make_inputs(np.random.default_rng(0), 3))
        response = service.ModelInfer(request, None)
        assert response.parameters["age_ms"].int64_param == age_ms


def test_a_loop_survives_whatever_the_shard_sends_and_counts_reloads(kit, stream, shard_of_streams):
    """The shard sends a gap first; then, asked for a full version, the whole chain."""
    keys = kit.all_keys()
    full, lost, third = (stream.version(kind, keys[:9]) for kind in ("full", "delta", "delta"))
    address, asked = shard_of_streams([[*full, *third], [*full, *lost, *third]])
    replica, source = Replica(clock_ms=lambda: 0), ShardSource(address, name="r")
    follower = Follower(replica, source, name="r")
    thread = threading.Thread(target=follower.follow)
    thread.start()
    kit.wait_until(lambda: replica.store.version == Version(1, 3))
    follower.stop()
    thread.join()
    source.close()
    assert asked[:2] == [False, False], "the second time, too, it asks for a full version"
    assert replica.num_reloads == 1
    assert [version.sequence for version, _ in replica.applied] == [1, 2, 3]


def test_what_is_refused_again_and_again_is_asked_for_less_and_less_often(kit, stream, shard_of_streams):
    """Each attempt loads everything from the newest full version on, and then the one that cannot be."""
    keys = kit.all_keys()
    full, _, third = (stream.version(kind, keys[:9]) for kind in ("full", "delta", "delta"))
    address, asked = shard_of_streams([[*full, *third]] * 50)
    replica, source = Replica(clock_ms=lambda: 0), ShardSource(address, name="r")
    follower = Follower(replica, source, name="r")
    waited: list[float] = []

    class Wake(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            waited.append(timeout or 0.0)
            return len(waited) > 14 and super().wait(timeout)

    follower._wake = Wake()
    thread = threading.Thread(target=follower.follow)
    thread.start()
    kit.wait_until(lambda: len(waited) > 12)
    follower.stop()
    thread.join()
    source.close()
    assert waited[2:12] == sorted(waited[2:12])
    assert waited[11] == REFUSED_AGAIN_MAX_S
    assert len(asked) >= 12


def test_a_shard_that_is_away_is_said_once_and_said_again_when_it_is_back(
    kit, stream, shard_of_streams, monkeypatch
):
    """Nobody is there for the first attempts, however many they are."""
    address = f"127.0.0.1:{free_port()}"
    source = ShardSource(address, name="r")
    attempts = []
    follow = source.follow

    def counted(*arguments, **options):
        attempts.append(1)
        return follow(*arguments, **options)

    monkeypatch.setattr(source, "follow", counted)
    replica = Replica(clock_ms=lambda: 0)
    follower = Follower(replica, source, name="r")
    with structlog.testing.capture_logs() as logs:
        thread = threading.Thread(target=follower.follow)
        thread.start()
        kit.wait_until(lambda: len(attempts) > 3)
        keys = kit.all_keys()
        shard_of_streams([stream.version("full", keys[:9])], address=address)
        kit.wait_until(lambda: replica.store.version == Version(1, 1))
        follower.stop()
        thread.join()
    source.close()
    events = [one["event"] for one in logs]
    assert events.index("versions come again") > events.index("subscription ended, trying on")
    assert events[: events.index("versions come again")].count("subscription ended, trying on") == 1


def test_a_reload_that_was_made_is_not_asked_for_again(kit, stream, replica):
    """Also where the stream breaks off afterwards, as it does when the shard dies."""
    keys = kit.all_keys()
    full, delta = stream.version("full", keys[:9]), stream.version("delta", keys[:9])
    plan = replica.plan()
    replica.refuse(GapError("a version is missing"), plan)
    assert replica.plan().held is None
    replica.apply_all([*full, *delta], shared={}, plan=replica.plan())
    assert replica.plan().held == Version(1, 2)


@pytest.fixture
def shard_of_streams():
    """A real gRPC server whose Subscribe answers with given parts, one list a call."""
    servers = []

    def start(answers, *, address="127.0.0.1:0"):
        asked = []
        remaining = iter(answers)

        class Servicer(param_server_pb2_grpc.ParamServerServicer):
            def Subscribe(self, request, context):
                asked.append(request.HasField("held"))
                yield from next(remaining, [])

        server, address = open_server(address, num_threads=4)
        param_server_pb2_grpc.add_ParamServerServicer_to_server(Servicer(), server)
        server.start()
        servers.append(server)
        return address, asked

    yield start
    for server in servers:
        server.stop(None).wait()
