"""Shard and replicas as processes: what clients see, and what kills do not change."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from param_server.client import (
    ParamServerClient,
    ReplicaClient,
    RequestError,
    UnavailableError,
    Version,
)
from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]


def assert_predicts_like(trainer, replica, inputs):
    prediction = replica.predict(inputs)
    assert prediction.version == trainer.head
    expected = trainer.expected(inputs)
    assert sorted(prediction.outputs) == sorted(expected)
    for task, values in expected.items():
        np.testing.assert_allclose(prediction.outputs[task], values, atol=1e-6, rtol=0)


def test_replicas_equal_the_trainer_after_full_deltas_deletes_and_kills(kit, children):
    shard = children.shard()
    replicas = [children.replica(shard.address, name=f"replica-{number}") for number in range(2)]
    clients = [ReplicaClient(replica.address, timeout_s=60) for replica in replicas]
    inputs = kit.make_inputs(np.random.default_rng(3), 50)
    keys = kit.all_keys()
    with ParamServerClient(shard.address, timeout_s=60) as client:
        trainer = kit.trainer(client)
        trainer.open()
        with pytest.raises(UnavailableError, match="has not received a version"):
            clients[0].predict(inputs)
        trainer.train(keys)
        trainer.full()
        for step in range(3):
            changed = keys[step::4]
            trainer.train(changed)
            trainer.delta(changed, deletes=keys[3 + 4 * step : 11 : 7])
        for one in clients:
            kit.wait_for_version(one, trainer.head)
            assert_predicts_like(trainer, one, inputs)
            assert one.status().num_rows == len(trainer.rows) == client.status().num_rows

        # A replica that is killed comes back with the newest version, at the same address.
        replicas[0].kill()
        trainer.train(keys[:9])
        trainer.delta(keys[:9])
        children.replica(shard.address, replicas[0].address)
        kit.wait_for_version(clients[0], trainer.head)
        assert_predicts_like(trainer, clients[0], inputs)

        # Without a shard the replicas go on answering; with it back they go on following.
        shard.kill()
        assert_predicts_like(trainer, clients[1], inputs)
        restarted = children.shard(shard.address)
        assert restarted.address == shard.address
        assert client.status().head == trainer.head
        trainer.train(keys[5:15])
        trainer.delta(keys[5:15])
        trainer.full()
        for one in clients:
            kit.wait_for_version(one, trainer.head)
            assert_predicts_like(trainer, one, inputs)
            applied = [version for version, _ in one.status().applied]
            assert applied == sorted(set(applied))
        assert clients[1].status().num_reloads == 0
    assert restarted.terminate() == 0
    assert replicas[1].terminate() == 0
    for one in clients:
        one.close()


def test_every_answer_is_of_one_version_while_versions_rush_by(kit, children):
    """Every version writes its number into all rows, and minus its sum into the bias: a whole version
    answers exactly sigmoid(0), a mix of two differs by at least sigmoid(4)."""
    shard = children.shard()
    replica = children.replica(shard.address)
    keys = kit.all_keys()
    inputs = {
        "domain": np.zeros(8, np.int64),
        "item_id": np.arange(8),
        "tags": np.arange(16),
        "tags.lengths": np.full(8, 2, np.int32),
        "age": np.full(8, 2.0, np.float32),
    }
    num_versions_min, num_versions_max = 60, 3000
    faults, seen = [], []

    with ParamServerClient(shard.address, timeout_s=60) as client:
        trainer = kit.trainer(client)
        trainer.open()

        def set_all(number: int) -> None:
            trainer.rows = {one: np.full(kit.dim, number, np.float32) for one in keys}
            weight = np.ones((4 * kit.dim, len(kit.tasks)), np.float32)
            bias = np.full(len(kit.tasks), -4 * kit.dim * number, np.float32)
            trainer.weights = {"weight": weight, "bias": bias}

        set_all(1)
        trainer.full()
        done = threading.Event()

        def ask() -> None:
            with ReplicaClient(replica.address, timeout_s=60) as one:
                kit.wait_until(lambda: one.status().ready)
                last = Version(0, 0)
                while not (done.is_set() and last == trainer.head):
                    prediction = one.predict(inputs)
                    whole = all((values == 0.5).all() for values in prediction.outputs.values())
                    if not whole or prediction.version < last:
                        faults.append((prediction, last))
                    last = prediction.version
                    seen.append(last)

        askers = [threading.Thread(target=ask) for _ in range(2)]
        for asker in askers:
            asker.start()
        for number in range(2, num_versions_max + 1):
            if number > num_versions_min and len(set(seen)) >= 5:
                break
            set_all(number)
            if number % 20 == 0:
                trainer.full()
            else:
                trainer.delta(keys)
        done.set()
        for asker in askers:
            asker.join()
    assert faults == []
    assert len(set(seen)) >= 5, "too few versions were met while they changed"


@pytest.fixture
def served(kit, children):
    """A shard, a replica and a trainer with one full version live."""
    shard = children.shard()
    replica = children.replica(shard.address)
    with ParamServerClient(shard.address, timeout_s=60) as client:
        trainer = kit.trainer(client)
        trainer.open()
        trainer.train(kit.all_keys())
        trainer.full()
        with ReplicaClient(replica.address, timeout_s=60) as one:
            kit.wait_for_version(one, trainer.head)
            yield trainer, one, replica


def test_a_triton_client_works_unchanged(kit, served):
    from tritonclient import grpc as triton

    trainer, _, replica = served
    inputs = kit.make_inputs(np.random.default_rng(4), 6)
    client = triton.InferenceServerClient(replica.address)
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("freshet")
    assert client.get_server_metadata().name == "freshet"
    metadata = client.get_model_metadata("freshet")
    assert {one.name: one.datatype for one in metadata.inputs} == {
        "domain": "BYTES",
        "item_id": "INT64",
        "tags": "INT64",
        "tags.lengths": "INT32",
        "age": "FP32",
    }
    assert [one.name for one in metadata.outputs] == list(kit.tasks)
    tensors = []
    for one in metadata.inputs:
        column = inputs[one.name]
        tensor = triton.InferInput(one.name, list(column.shape), one.datatype)
        tensor.set_data_from_numpy(column)
        tensors.append(tensor)
    result = client.infer("freshet", tensors, request_id="42")
    for task, values in trainer.expected(inputs).items():
        np.testing.assert_allclose(result.as_numpy(task), values, atol=1e-6, rtol=0)
    response = result.get_response()
    assert response.id == "42"
    assert response.parameters["version"].string_param == str(trainer.head)
    assert response.parameters["age_ms"].int64_param >= 0
    wanted = [triton.InferRequestedOutput("like")]
    assert [one.name for one in client.infer("freshet", tensors, outputs=wanted).get_response().outputs] == [
        "like"
    ]
    for name, version, outputs, message in (
        ("other", "", None, "not served"),
        ("freshet", "9.9", None, "not live"),
        ("freshet", "", [triton.InferRequestedOutput("hate")], "'hate'"),
    ):
        with pytest.raises(triton.InferenceServerException, match=message):
            client.infer(name, tensors, model_version=version, outputs=outputs)
    client.close()


def test_bad_requests_are_refused_by_name_counted_and_hurt_nobody(kit, served):
    trainer, one, _ = served
    inputs = kit.make_inputs(np.random.default_rng(5), 6)
    bad = [
        ({"item_id": inputs["item_id"][:-1]}, "item_id"),
        ({"surplus": np.zeros(6, np.int64)}, "surplus"),
        ({"domain": np.array(["nowhere"] * 6, object)}, "domain"),
        ({"age": np.zeros(6, np.float64)}, "age"),
    ]
    for change, name in bad:
        with pytest.raises(RequestError, match=f"'{name}'"):
            one.predict({**inputs, **change})
    assert_predicts_like(trainer, one, inputs)
    status = one.status()
    assert status.num_refused_requests == len(bad) - 1, "the last one never left the client"
    assert status.num_predictions == 1
    expected_unknown = sum(int(item) >= 30 for item in inputs["item_id"])
    expected_unknown += sum(int(tag) >= 30 for tag in inputs["tags"])
    expected_unknown += int(np.isnan(inputs["age"]).sum())
    assert status.num_unknown_ids == expected_unknown
    empty = kit.make_inputs(np.random.default_rng(5), 0)
    assert [values.shape for values in one.predict(empty).outputs.values()] == [(0,), (0,)]


def test_the_replica_needs_no_torch():
    check = (
        "import sys, param_server.__main__, param_server.replica_service, param_server.predict\n"
        "assert 'onnxruntime' in sys.modules\n"
        "assert not {'torch', 'trainer'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", check], cwd=ROOT, check=True, timeout=120)


def test_a_taken_port_a_public_address_and_a_log_in_use_end_the_process_in_one_line(children, tmp_path):
    shard = children.shard()
    log = ("--log-dir", str(tmp_path / "other"))
    cases = [
        (("shard", "--address", shard.address, *log), "cannot be bound"),
        (("shard", "--address", "0.0.0.0:0", *log), "only loopback"),
        (("replica", "--shard", "example.org:1"), "only loopback"),
        (("shard", "--log-dir", str(tmp_path / "log")), "another process"),
    ]
    started = [(children.popen(*arguments, stderr=subprocess.PIPE), message) for arguments, message in cases]
    for process, message in started:
        _, errors = process.communicate(timeout=120)
        last = errors.decode().strip().splitlines()[-1]
        assert process.returncode == 1
        assert message in last
        assert last.startswith("param_server ")
        assert b"Traceback" not in errors


def test_a_process_that_cannot_say_that_it_listens_ends_with_its_threads_in_one_line(children, tmp_path):
    away = str(tmp_path / "away" / "ready.json")
    shard = ("shard", "--log-dir", str(tmp_path / "other"))
    replica = ("replica", "--shard", f"127.0.0.1:{free_port()}")
    for arguments in (shard, replica):
        process = children.popen(*arguments, "--ready-file", away, stderr=subprocess.PIPE)
        _, errors = process.communicate(timeout=120)
        last = errors.decode().strip().splitlines()[-1]
        assert process.returncode == 1
        assert last.startswith(f"param_server {arguments[0]}: ")
        assert "No such file or directory" in last
        assert b"Traceback" not in errors


def test_status_shows_a_shard_and_a_replica(served, children):
    trainer, _, replica = served
    shard_address = trainer.client.where.split()[1]
    for address, key in ((shard_address, "num_full"), (replica.address, "num_predictions")):
        shown = children.popen("status", address, stdout=subprocess.PIPE)
        output, _ = shown.communicate(timeout=120)
        assert shown.returncode == 0
        assert key in json.loads(output)


def test_an_address_of_another_kind_or_of_nobody_is_said_to_be_one(served, children):
    _, _, replica = served
    promoted = children.popen("promote", replica.address, "1.1", stderr=subprocess.PIPE)
    shown = children.popen("status", f"127.0.0.1:{free_port()}", stderr=subprocess.PIPE)
    for asked, named in (
        (promoted, "another kind of server listens"),
        (shown, "nothing answers at 127.0.0.1"),
    ):
        _, error = asked.communicate(timeout=120)
        assert asked.returncode == 1
        assert named in error.decode()
        assert error.count(b"\n") == 1, error


def test_the_status_command_says_by_its_exit_code_whether_a_replica_is_ready(served, children):
    trainer, _, replica = served
    shard_address = trainer.client.where.split()[1]
    for address in (shard_address, replica.address):
        assert children.popen("status", address, "--ready", stdout=subprocess.DEVNULL).wait(timeout=120) == 0
    # Pinned to a version that there is not, it has none to answer from.
    fresh = children.start("replica", "--shard", shard_address, "--pin", "99.1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    asked = children.popen("status", fresh.address, "--ready", **pipes)
    output, error = asked.communicate(timeout=120)
    assert asked.returncode == 1
    assert json.loads(output)["ready"] is False
    assert b"not ready: no version with a model yet" in error
    assert children.popen("status", fresh.address, stdout=subprocess.DEVNULL).wait(timeout=120) == 0
