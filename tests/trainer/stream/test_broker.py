"""Security settings come whole from the environment, and mistakes in them are named."""

from __future__ import annotations

import socket
import threading

import pytest

from trainer.errors import ConfigError, StreamError
from trainer.stream.broker import OLD_PROTOCOL, Security, connect_options, security_from_environment


def test_without_settings_the_connection_is_plain():
    assert security_from_environment({}) == Security()
    assert security_from_environment({"FRESHET_KAFKA_SECURITY_PROTOCOL": ""}).protocol == "PLAINTEXT"


def test_every_setting_reaches_the_client():
    security = security_from_environment(
        {
            "FRESHET_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "FRESHET_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "FRESHET_KAFKA_SASL_USERNAME": "reader",
            "FRESHET_KAFKA_SASL_PASSWORD": "hidden-word",
            "FRESHET_KAFKA_SSL_CAFILE": "ca.pem",
        }
    )
    assert security.options() == {
        "security_protocol": "SASL_SSL",
        "sasl_mechanism": "SCRAM-SHA-512",
        "sasl_plain_username": "reader",
        "sasl_plain_password": "hidden-word",
        "ssl_cafile": "ca.pem",
    }
    assert "hidden-word" not in repr(security)


@pytest.mark.parametrize(
    ("environ", "text"),
    [
        ({"FRESHET_KAFKA_SECURITY_PROTOCOL": "TLS"}, "found 'TLS'"),
        ({"FRESHET_KAFKA_SECURITY_PROTOCOL": "SASL_SSL"}, "SASL_MECHANISM is needed"),
    ],
)
def test_a_wrong_setting_is_named(environ, text):
    with pytest.raises(ConfigError, match=text):
        security_from_environment(environ)


def test_an_address_without_a_port_is_a_mistake_of_the_configuration():
    with pytest.raises(ConfigError, match="expected host:port, found 'somewhere'"):
        connect_options("somewhere", security=Security(), timeout_s=1)


def test_a_server_that_is_no_broker_is_not_waited_for_in_vain():
    server = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            connection.close()

    threading.Thread(target=answer, daemon=True).start()
    port = server.getsockname()[1]
    with pytest.raises(StreamError, match=f"127.0.0.1:{port}.*Kafka broker"):
        connect_options(f"127.0.0.1:{port}", security=Security(), timeout_s=1)
    server.close()


def test_the_second_server_is_tried_when_the_first_is_away(embedded_broker, free_port):
    servers = f"127.0.0.1:{free_port()},{embedded_broker.bootstrap_servers}"
    assert connect_options(servers, security=Security(), timeout_s=5)["api_version"] == OLD_PROTOCOL


def test_a_real_broker_is_spoken_to_in_its_own_version(kafka_broker):
    options = connect_options(kafka_broker.bootstrap_servers, security=Security(), timeout_s=5)
    assert "api_version" not in options
