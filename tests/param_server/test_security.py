"""TLS and tokens: who is let in at which port, who is not, and what the operator is told."""

from __future__ import annotations

import argparse
import socket
import ssl
import subprocess
from concurrent import futures
from pathlib import Path
from types import SimpleNamespace

import grpc
import msgspec
import numpy as np
import pytest

from param_server import security_arguments
from param_server.client import (
    AccessError,
    AddressError,
    ClientSecurity,
    HistoryClient,
    ParamServerClient,
    ReplicaClient,
    UnavailableError,
    Version,
)
from param_server.security import NO_SECURITY, TokenCheck
from param_server.transport import CHANNEL_OPTIONS, MESSAGE_BYTES_MAX, check_address, open_server
from proto import param_server_pb2, param_server_pb2_grpc
from tests.certificates import make_authority, make_certificate

TOKEN = "correct-horse-battery"
SHARD_TOKEN = "staple-battery-horse-correct"


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Real keys and certificates of two authorities, made for these tests and gone after them."""
    folder = tmp_path_factory.mktemp("pems")
    for authority, name in (("ours", "server"), ("ours", "renewed"), ("ours", "client"), ("theirs", "thief")):
        if not (folder / f"{authority}.pem").exists():
            make_authority(folder, authority)
        make_certificate(folder, name, authority=authority)
    return folder


def security_of(pems: Path, name: str, *, authority: str = "ours", token: str = TOKEN) -> ClientSecurity:
    return ClientSecurity(
        ca_file=str(pems / f"{authority}.pem"),
        cert_file=str(pems / f"{name}.pem"),
        key_file=str(pems / f"{name}.key"),
        token=token,
    )


def tls_arguments(pems: Path, name: str) -> list[str]:
    return [
        *("--tls-ca", str(pems / "ours.pem"), "--tls-cert", str(pems / f"{name}.pem")),
        *("--tls-key", str(pems / f"{name}.key")),
    ]


@pytest.fixture
def secured(kit, children, pems: Path, tmp_path: Path):
    """A shard and a replica, each with TLS and a token of its own, and a version that is live."""
    (tmp_path / "token").write_text(TOKEN + "\n")
    (tmp_path / "shard-token").write_text(SHARD_TOKEN + "\n")
    shard = children.start(
        *("shard", "--log-dir", str(tmp_path / "log"), "--token-file", str(tmp_path / "shard-token")),
        *tls_arguments(pems, "server"),
    )
    replica = children.start(
        *("replica", "--shard", shard.address, "--token-file", str(tmp_path / "token")),
        *("--shard-token-file", str(tmp_path / "shard-token"), *tls_arguments(pems, "server")),
    )
    security = security_of(pems, "client")
    shard_security = security_of(pems, "client", token=SHARD_TOKEN)
    with (
        ParamServerClient(shard.address, timeout_s=60, security=shard_security) as client,
        ReplicaClient(replica.address, timeout_s=60, security=security) as one,
    ):
        trainer = kit.trainer(client)
        trainer.open()
        trainer.train(kit.all_keys())
        trainer.full()
        kit.wait_for_version(one, trainer.head)
        yield SimpleNamespace(trainer=trainer, replica=one, shard=shard.address, address=replica.address)


@pytest.mark.timeout(300)
def test_with_certificate_and_token_everything_works(kit, secured, children, pems, tmp_path):
    inputs = kit.make_inputs(np.random.default_rng(4), 6)
    prediction = secured.replica.predict(inputs)
    for task, values in secured.trainer.expected(inputs).items():
        np.testing.assert_allclose(prediction.outputs[task], values, atol=1e-6, rtol=0)
    from tritonclient import grpc as triton

    client = triton.InferenceServerClient(
        secured.address,
        ssl=True,
        root_certificates=str(pems / "ours.pem"),
        private_key=str(pems / "client.key"),
        certificate_chain=str(pems / "client.pem"),
    )
    headers = {"authorization": f"Bearer {TOKEN}"}
    assert client.is_server_ready(headers=headers)
    with pytest.raises(triton.InferenceServerException, match="token is missing or wrong"):
        client.is_server_live()
    client.close()
    shown = children.popen(
        *("status", secured.address, "--token-file", str(tmp_path / "token"), *tls_arguments(pems, "client")),
        stdout=subprocess.PIPE,
    )
    output, _ = shown.communicate(timeout=60)
    assert shown.returncode == 0
    assert msgspec.json.decode(output)["ready"] is True


@pytest.mark.timeout(300)
def test_who_lacks_the_certificate_or_the_token_is_not_let_in(kit, secured, pems):
    """At either port, by every client, and nothing that they asked for has happened."""
    wrong_tokens = ("", "x" * len(TOKEN), TOKEN + "x")
    wrong_tls = (
        security_of(pems, "thief"),
        security_of(pems, "client", authority="theirs"),
        ClientSecurity(token=TOKEN),
        ClientSecurity(),
    )
    cases = [(security_of(pems, "client", token=one), 30.0, AccessError) for one in wrong_tokens]
    # A handshake that fails is tried again until the call's time is over.
    cases += [(security, 0.7, UnavailableError) for security in wrong_tls]
    for security, timeout_s, expected in cases:
        with ReplicaClient(secured.address, timeout_s, security=security) as one:
            with pytest.raises(expected):
                one.pin(Version(1, 1))
            with pytest.raises(expected):
                one.predict({})
    # The token of those who predict does not open the shard.
    with ParamServerClient(secured.shard, 30.0, security=security_of(pems, "client")) as client:
        for call in (
            client.status,
            lambda: client.open_generation(9),
            lambda: client.publish(Version(1, 2), []),
        ):
            with pytest.raises(AccessError, match=r"shard .*: the bearer token is missing or wrong"):
                call()
    with HistoryClient(secured.shard, security=security_of(pems, "client")) as history:
        for call in (history.promoted, lambda: history.promote(Version(1, 1))):
            with pytest.raises(AccessError):
                call()
    assert secured.replica.status().pinned is None
    assert secured.trainer.client.status().fenced_generation == secured.trainer.generation


@pytest.mark.timeout(120)
def test_a_replica_with_a_wrong_token_says_so_and_goes_on_trying(kit, children, pems, secured, tmp_path):
    replica = children.start(
        *("replica", "--shard", secured.shard, "--token-file", str(tmp_path / "token")),
        *tls_arguments(pems, "server"),
    )
    with ReplicaClient(replica.address, security=security_of(pems, "client")) as one:
        kit.wait_until(lambda: "the bearer token is missing or wrong" in one.status().last_refusal)
        assert not one.status().ready


class Counting(param_server_pb2_grpc.ReplicaServicer):
    def Status(self, request, context):
        return param_server_pb2.ReplicaStatus(num_rows=7)


@pytest.fixture
def start_server():
    servers = []

    def start(security: ClientSecurity = NO_SECURITY, *, servicer=None, num_threads: int = 4) -> str:
        server, address = open_server("127.0.0.1:0", num_threads=num_threads, security=security)
        param_server_pb2_grpc.add_ReplicaServicer_to_server(servicer or Counting(), server)
        server.start()
        servers.append(server)
        return address

    yield start
    for server in servers:
        server.stop(None).wait()


def served_certificate(address: str, pems: Path) -> bytes:
    host, port = address.split(":")
    context = ssl.create_default_context(cafile=str(pems / "ours.pem"))
    context.load_cert_chain(pems / "client.pem", pems / "client.key")
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port)), timeout=10) as raw,
        context.wrap_socket(raw, server_hostname="localhost") as wrapped,
    ):
        certificate = wrapped.getpeercert(binary_form=True)
    assert certificate is not None
    return certificate


def test_a_renewed_certificate_is_used_without_a_restart_and_a_broken_file_changes_nothing(
    start_server, pems, tmp_path
):
    for name in ("server.pem", "server.key"):
        (tmp_path / name).write_bytes((pems / name).read_bytes())
    mine = ClientSecurity(
        ca_file=str(pems / "ours.pem"),
        cert_file=str(tmp_path / "server.pem"),
        key_file=str(tmp_path / "server.key"),
        token=TOKEN,
    )
    address = start_server(mine)

    def of(name: str) -> bytes:
        return ssl.PEM_cert_to_DER_cert((pems / f"{name}.pem").read_text())

    assert served_certificate(address, pems) == of("server")
    (tmp_path / "server.pem").write_text("nonsense")
    assert served_certificate(address, pems) == of("server")
    (tmp_path / "server.key").write_bytes((pems / "renewed.key").read_bytes())
    (tmp_path / "server.pem").write_bytes((pems / "renewed.pem").read_bytes())
    assert served_certificate(address, pems) == of("renewed")
    with ReplicaClient(address, security=security_of(pems, "client")) as one:
        assert one.status().num_rows == 7


def test_on_loopback_a_token_works_without_tls(start_server):
    address = start_server(ClientSecurity(token=TOKEN))
    with ReplicaClient(address, security=ClientSecurity(token=TOKEN)) as one:
        assert one.status().num_rows == 7
    with ReplicaClient(address) as one, pytest.raises(AccessError):
        one.status()


def test_a_port_without_security_is_loopback_only_and_warns(start_server, capsys):
    address = start_server()
    said = capsys.readouterr()
    assert "anyone on this machine can call this port" in said.out + said.err
    with ReplicaClient(address) as one:
        assert one.status().num_rows == 7


@pytest.mark.parametrize("address", ["0.0.0.0:0", "10.1.2.3:80", "[::]:0", "shard.example:9000"])
def test_beyond_loopback_tls_and_a_servers_token_are_a_must(address, pems):
    with pytest.raises(
        AddressError, match=f"address '{address.replace('[', '.').replace(']', '.')}': without TLS"
    ):
        check_address(address, security=ClientSecurity(token=TOKEN))
    tls = security_of(pems, "client", token="")
    assert check_address(address, security=tls) is False
    with pytest.raises(AddressError, match="without a bearer token"):
        check_address(address, security=tls, token_needed=True)
    assert check_address(address, security=security_of(pems, "client"), token_needed=True) is False


def test_a_server_with_tls_and_a_token_may_listen_to_everyone(pems):
    server, address = open_server("0.0.0.0:0", num_threads=1, security=security_of(pems, "server"))
    server.stop(None)
    assert address.startswith("0.0.0.0:")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ca_file": "a"}, "TLS needs ca_file, cert_file and key_file together"),
        ({"ca_file": "a", "cert_file": "b"}, "together"),
        ({"token": "short"}, "a token has 16..4096 visible ASCII characters"),
        ({"token": "with a space in it, long"}, "without a space"),
        ({"token": "eingültigeslangestoken"}, "visible ASCII"),
        ({"token": "line\nbreak-in-a-token"}, "visible ASCII"),
    ],
)
def test_wrong_security_is_refused_without_showing_the_token(fields, message):
    with pytest.raises(ValueError, match=message) as caught:
        ClientSecurity(**fields)
    assert fields.get("token", "?") not in str(caught.value)


def test_a_token_shows_in_no_representation():
    security = ClientSecurity(token=TOKEN)
    assert TOKEN not in repr(security) + str(security) + f"{[security]}"


def test_tls_files_that_cannot_be_used_are_named(pems, tmp_path, children):
    (tmp_path / "empty.pem").write_text("")
    for ca_file, message in (
        (tmp_path / "absent.pem", "No such file"),
        (tmp_path / "empty.pem", "no PEM block"),
    ):
        security = msgspec.structs.replace(security_of(pems, "client"), ca_file=str(ca_file))
        with pytest.raises(AccessError, match=f"{ca_file.name}: .*{message}"):
            ReplicaClient("127.0.0.1:1", security=security)


def test_tokens_come_from_a_file_or_the_environment(tmp_path):
    path = tmp_path / "token"
    path.write_text(f"  {TOKEN}\n")
    parser = argparse.ArgumentParser()
    security_arguments.add_arguments(parser)
    security_arguments.add_shard_token(parser)
    from_file = parser.parse_args(["--token-file", str(path)])
    neither = parser.parse_args([])
    environ = {"FRESHET_TOKEN": SHARD_TOKEN, "FRESHET_SHARD_TOKEN": SHARD_TOKEN}
    assert security_arguments.read_security(from_file, environ).token == TOKEN
    assert security_arguments.read_security(neither, environ).token == SHARD_TOKEN
    assert security_arguments.read_security(neither, {}).token == ""
    own = security_arguments.read_security(from_file, {})
    assert security_arguments.read_shard_security(from_file, environ, own=own).token == SHARD_TOKEN
    assert security_arguments.read_shard_security(from_file, {}, own=own) is own
    path.write_text("\n")
    with pytest.raises(AccessError, match="token: it is empty"):
        security_arguments.read_security(from_file, {})
    path.unlink()
    with pytest.raises(AccessError, match="token: No such file"):
        security_arguments.read_security(from_file, {})
    half = parser.parse_args(["--tls-ca", "ca.pem"])
    with pytest.raises(AccessError, match="TLS needs ca_file, cert_file and key_file together"):
        security_arguments.read_security(half, {})


def test_two_authorization_headers_do_not_pass():
    check = TokenCheck(TOKEN)
    good = ("authorization", f"Bearer {TOKEN}")
    for metadata, passes in (
        ([good], True),
        ([good, good], False),
        ([], False),
        ([("authorization", "")], False),
    ):
        details = SimpleNamespace(method="/x", invocation_metadata=metadata)
        assert (check.intercept_service(lambda _: "served", details) == "served") is passes


# --- limits ---


def test_a_message_beyond_the_limit_is_refused_and_the_server_goes_on(start_server):
    address = start_server()
    unlimited = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=unlimited) as channel:
        send = channel.unary_unary("/freshet.v1.Replica/Status", request_serializer=bytes)
        with pytest.raises(grpc.RpcError) as caught:
            send(bytes(MESSAGE_BYTES_MAX + 1), timeout=20)
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with ReplicaClient(address) as one:
        assert one.status().num_rows == 7


class Slow(param_server_pb2_grpc.ReplicaServicer):
    def __init__(self) -> None:
        self.release = futures.Future()

    def Status(self, request, context):
        self.release.result(timeout=60)
        return param_server_pb2.ReplicaStatus()


def test_calls_beyond_the_limit_are_refused_at_once_instead_of_queued(start_server, monkeypatch):
    monkeypatch.setattr("param_server.transport.CALLS_WAITING_MAX", 3)
    slow = Slow()
    address = start_server(servicer=slow, num_threads=1)
    with grpc.insecure_channel(address, options=CHANNEL_OPTIONS) as channel:
        stub = param_server_pb2_grpc.ReplicaStub(channel)
        calls = [stub.Status.future(param_server_pb2.StatusRequest(), timeout=60) for _ in range(8)]
        refused = []
        while len(refused) < 4:
            refused = [one for one in calls if one.done()]
        slow.release.set_result(None)
        codes = sorted(one.code().name for one in calls)
    assert codes == ["OK"] * 4 + ["RESOURCE_EXHAUSTED"] * 4


def test_connections_beyond_the_limit_are_refused(monkeypatch):
    from param_server import transport

    options = [
        (name, 3 if name.endswith("incoming_connections") else value)
        for name, value in transport.SERVER_OPTIONS
    ]
    monkeypatch.setattr(transport, "SERVER_OPTIONS", options)
    server, address = open_server("127.0.0.1:0", num_threads=4)
    param_server_pb2_grpc.add_ReplicaServicer_to_server(Counting(), server)
    server.start()
    # With a pool of its own, each channel is a connection of its own.
    own = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.insecure_channel(address, options=own) for _ in range(5)]
    answers = []
    for channel in channels:
        try:
            param_server_pb2_grpc.ReplicaStub(channel).Status(param_server_pb2.StatusRequest(), timeout=5)
            answers.append(True)
        except grpc.RpcError:
            answers.append(False)
    for channel in channels:
        channel.close()
    server.stop(None).wait()
    assert answers == [True, True, True, False, False]
