"""Reaching a Kafka broker: security settings, the protocol it speaks, its topics."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka.admin import NewTopic
from kafka.errors import KafkaError, TopicAlreadyExistsError

from trainer.errors import ConfigError, StreamError

ENVIRONMENT_PREFIX = "FRESHET_KAFKA_"
PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
OLD_PROTOCOL = (2, 3)
"""Spoken to brokers that refuse the newest handshake; the embedded broker is one of them."""
RETRY_S = 0.2
METADATA_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class Security:
    """How to reach a broker that does not take everyone; the default is plain text."""

    protocol: str = "PLAINTEXT"
    sasl_mechanism: str | None = None
    sasl_username: str | None = None
    sasl_password: str | None = field(default=None, repr=False)
    ssl_cafile: str | None = None

    def options(self) -> dict[str, Any]:
        """As kafka-python's arguments."""
        return {
            "security_protocol": self.protocol,
            "sasl_mechanism": self.sasl_mechanism,
            "sasl_plain_username": self.sasl_username,
            "sasl_plain_password": self.sasl_password,
            "ssl_cafile": self.ssl_cafile,
        }


def security_from_environment(environ: Mapping[str, str]) -> Security:
    """Read FRESHET_KAFKA_SECURITY_PROTOCOL, _SASL_MECHANISM, _SASL_USERNAME, _SASL_PASSWORD, _SSL_CAFILE.

    Called from __main__ only, so that no other code knows of secrets.
    Raises: ConfigError for an unknown protocol, or for SASL without a mechanism.
    """
    values = {name: environ.get(ENVIRONMENT_PREFIX + name) or None for name in _SECURITY_NAMES}
    protocol = values["SECURITY_PROTOCOL"] or "PLAINTEXT"
    if protocol not in PROTOCOLS:
        raise ConfigError(
            f"{ENVIRONMENT_PREFIX}SECURITY_PROTOCOL must be one of {', '.join(PROTOCOLS)}, found '{protocol}'"
        )
    if protocol.startswith("SASL") and not values["SASL_MECHANISM"]:
        raise ConfigError(f"{ENVIRONMENT_PREFIX}SASL_MECHANISM is needed with {protocol}")
    return Security(
        protocol=protocol,
        sasl_mechanism=values["SASL_MECHANISM"],
        sasl_username=values["SASL_USERNAME"],
        sasl_password=values["SASL_PASSWORD"],
        ssl_cafile=values["SSL_CAFILE"],
    )


_SECURITY_NAMES = ("SECURITY_PROTOCOL", "SASL_MECHANISM", "SASL_USERNAME", "SASL_PASSWORD", "SSL_CAFILE")


def connect_options(bootstrap_servers: str, *, security: Security, timeout_s: float) -> dict[str, Any]:
    """Wait until a broker answers and find out what it speaks: arguments for every kafka-python client.

    Args: bootstrap_servers: host:port, several with commas between them.
    Raises: StreamError naming the servers if none answers within timeout_s.
    """
    deadline_s = time.monotonic() + timeout_s
    failure = "no server given"
    options = {
        "bootstrap_servers": bootstrap_servers.split(","),
        "bootstrap_timeout_ms": max(1_000, int(timeout_s * 1_000)),
        **security.options(),
    }
    while True:
        for server in bootstrap_servers.split(","):
            left_s = max(0.1, deadline_s - time.monotonic())
            try:
                if _refuses_newest(server, security.protocol, timeout_s=min(5.0, left_s)):
                    return {**options, "api_version": OLD_PROTOCOL}
                return options
            except OSError as error:
                failure = f"{server}: {error.strerror or error}"
        if time.monotonic() + RETRY_S >= deadline_s:
            raise StreamError(
                f"no Kafka broker answered at {bootstrap_servers} within {timeout_s:g} s ({failure}); "
                "check kafka.bootstrap_servers and that the broker runs"
            )
        time.sleep(RETRY_S)


def _refuses_newest(server: str, protocol: str, *, timeout_s: float) -> bool:
    """Whether the broker answers UNSUPPORTED_VERSION to the handshake with which kafka-python begins.

    kafka-python retries that handshake until its timeout when the refusal has a form that it cannot read
    (the embedded broker's has). Over TLS only the connection is tried.
    Raises: OSError if the server cannot be reached or hangs up.
    """
    host, _, port = server.strip().rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(f"kafka.bootstrap_servers: expected host:port, found '{server}'")
    with socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s) as connection:
        if protocol.endswith("SSL"):
            return False
        # ApiVersions (key 18) version 4, correlation id 1, client id "freshet", no tagged fields; the
        # body is the client's name and version as compact strings (length + 1).
        body = struct.pack(">hhih", 18, 4, 1, 7) + b"freshet\0" + b"\x08freshet" + b"\x021" + b"\0"
        connection.sendall(struct.pack(">i", len(body)) + body)
        answer = b""
        while len(answer) < 10:
            received = connection.recv(10 - len(answer))
            if not received:
                raise ConnectionError("the server closed the connection; is it a Kafka broker?")
            answer += received
        _, correlation_id, error_code = struct.unpack(">iih", answer)
        if correlation_id != 1:
            raise ConnectionError("the answer is not Kafka's; is it a Kafka broker?")
        return bool(error_code == 35)


def ensure_topic(
    topic: str, *, num_partitions: int, options: Mapping[str, Any], may_create: bool = True
) -> list[int]:
    """The topic's partitions, ascending; the topic is created where it is missing and this is allowed.

    Args: may_create: False where positions in the topic exist already: a new topic would not be theirs.
    Raises: StreamError if the topic is missing and could not be created, or must not be.
    """
    consumer = KafkaConsumer(**options, enable_auto_commit=False)
    try:
        partitions = consumer.partitions_for_topic(topic)
        if partitions:
            return sorted(partitions)
        if not may_create:
            raise StreamError(
                f"topic '{topic}' does not exist, but there are positions in it: it was deleted, or this is "
                "another cluster. Name the cluster and topic that the run began with; or start with a fresh "
                "run directory"
            )
        failure = _create_topic(topic, num_partitions, options)
        deadline_s = time.monotonic() + METADATA_WAIT_S
        while time.monotonic() < deadline_s:
            partitions = consumer.partitions_for_topic(topic)
            if partitions:
                return sorted(partitions)
            time.sleep(RETRY_S)
    except KafkaError as error:
        failure = str(error)
    finally:
        consumer.close()
    raise StreamError(
        f"topic '{topic}' does not exist and could not be created ({failure}); create it with the number of "
        "partitions that you want, or allow this user to create topics"
    )


def _create_topic(topic: str, num_partitions: int, options: Mapping[str, Any]) -> str:
    """Returns: why it failed, or "" (a broker without an admin API may still create topics by itself)."""
    if options.get("api_version") == OLD_PROTOCOL:
        # No admin API; but asking as a producer makes the embedded broker create the topic, with a
        # number of partitions of its own.
        producer = KafkaProducer(**options, max_block_ms=int(METADATA_WAIT_S * 1_000))
        try:
            producer.partitions_for(topic)
        except KafkaError as error:
            return str(error)
        finally:
            producer.close()
        return ""
    try:
        admin = KafkaAdminClient(**options)
    except KafkaError as error:
        return str(error)
    try:
        # -1: the broker's own default replication factor.
        admin.create_topics([NewTopic(name=topic, num_partitions=num_partitions, replication_factor=-1)])
    except TopicAlreadyExistsError:
        return ""
    except KafkaError as error:
        return str(error)
    finally:
        admin.close()
    return ""
