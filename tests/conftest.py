"""Fixtures that several folders of tests share: the process group, free ports, and brokers of both kinds."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import structlog

from tests.ports import free_port

if TYPE_CHECKING:
    from trainer.collectives import Ranks

REPOSITORY = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 60.0
SERVERS_VARIABLE = "FRESHET_TEST_BOOTSTRAP_SERVERS"
JAVA_OPTIONS = ("-Xms128m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Dlog4j2.level=WARN")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """With FRESHET_NO_SKIPS, as in CI, a skipped test fails the run: all that tests need is there."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("FRESHET_NO_SKIPS") and reporter is not None and reporter.stats.get("skipped"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A command that a test called in this process logs to that test's stderr, which is then closed."""
    yield
    structlog.reset_defaults()


@pytest.fixture(scope="session", autouse=True)
def heeded_interrupts() -> Iterator[None]:
    """A job that a shell runs in the background ignores SIGINT, and so would the commands that tests start.

    Set before they fork: between fork and exec (`preexec_fn`) gRPC starts its threads again, and they
    complain on the command's stderr when their descriptors are closed.
    """
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def ranks() -> Ranks:
    """The one process group that a test process may have."""
    import torch

    from trainer.collectives import start_ranks

    torch.set_num_threads(1)
    return start_ranks()


@pytest.fixture(scope="session", name="free_port")
def give_free_port() -> Callable[[], int]:
    """Finds a port of loopback for a server, which may be killed and come back there."""
    return free_port


@dataclass
class EmbeddedBroker:
    """An embedded broker's process."""

    bootstrap_servers: str
    process: subprocess.Popen[bytes]
    topics: list[str] = field(default_factory=list)

    def new_topic(self) -> str:
        """A topic of three partitions that no other test has used."""
        return self.topics.pop()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=20)


@pytest.fixture(scope="session")
def start_embedded_broker(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[dict[str, int]], EmbeddedBroker]]:
    """Start embedded brokers with given topics (name → partitions); all end with the session."""
    started: list[EmbeddedBroker] = []

    def start(topics: dict[str, int]) -> EmbeddedBroker:
        ready_file = tmp_path_factory.mktemp("embedded") / "ready.json"
        program = (
            "import json, sys\n"
            "from pathlib import Path\n"
            "from trainer.stream.embedded_broker import run_embedded_broker\n"
            "run_embedded_broker(topics=json.loads(sys.argv[1]), ready_file=Path(sys.argv[2]))\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", program, json.dumps(topics), str(ready_file)], cwd=REPOSITORY
        )
        wait_for(lambda: ready_file.exists() or process.poll() is not None)
        assert process.poll() is None, f"the embedded broker ended with {process.returncode}"
        ready = json.loads(ready_file.read_text())
        assert ready["pid"] == process.pid
        started.append(EmbeddedBroker(ready["bootstrap_servers"], process))
        return started[-1]

    yield start
    for broker in started:
        if broker.process.poll() is None:
            broker.stop()


@pytest.fixture(scope="session")
def embedded_broker(start_embedded_broker: Callable[[dict[str, int]], EmbeddedBroker]) -> EmbeddedBroker:
    """One embedded broker for the session, with topics to take from."""
    names = [f"topic-{number}" for number in range(90)]
    broker = start_embedded_broker(dict.fromkeys(names, 3))
    broker.topics = names
    return broker


@dataclass
class KafkaBroker:
    """A real Kafka broker (KRaft) on loopback; kill and start keep its data.

    given_servers: a cluster of the user's instead, which nobody kills: a test that must is skipped.
    """

    home: Path
    directory: Path
    port: int
    controller_port: int
    given_servers: str = ""
    process: subprocess.Popen[bytes] | None = None
    topics: list[str] = field(default_factory=list)

    @property
    def bootstrap_servers(self) -> str:
        return self.given_servers or f"127.0.0.1:{self.port}"

    def options(self) -> dict[str, Any]:
        """For every kafka-python client."""
        from trainer.stream.broker import Security, connect_options

        return connect_options(self.bootstrap_servers, security=Security(), timeout_s=30)

    def new_name(self) -> str:
        """A name that no topic has; topics of that name, or beginning with it, leave with the session."""
        self.topics.append(f"freshet-test-{uuid.uuid4().hex[:12]}")
        return self.topics[-1]

    def new_topic(self) -> str:
        """A topic of three partitions that no other test has used."""
        from trainer.stream.broker import ensure_topic

        name = self.new_name()
        assert ensure_topic(name, num_partitions=3, options=self.options()) == [0, 1, 2]
        return name

    def delete_topics(self) -> None:
        """Leave a cluster that is not ours as it was."""
        from kafka import KafkaAdminClient

        admin = KafkaAdminClient(**self.options())
        found = [name for name in admin.list_topics() if name.startswith(tuple(self.topics))]
        if found:
            admin.delete_topics(found)
        admin.close()

    def skip_unless_ours(self) -> None:
        """Called first by a test that kills the broker, restarts it or asks its machine."""
        if self.given_servers:
            pytest.skip(f"{SERVERS_VARIABLE} names a cluster that tests must not kill")

    def start(self) -> None:
        self.skip_unless_ours()
        properties = self.directory / "server.properties"
        if not properties.exists():
            properties.write_text(self._properties())
            self._format(properties)
        self.process = self._java("kafka.Kafka", str(properties))
        wait_for(self._accepts)

    def _format(self, properties: Path) -> None:
        # The id in one word with its option: one of 64 begins with "-" and would be taken for an option.
        storage = self._java(
            "kafka.tools.StorageTool", "format", f"--cluster-id={_cluster_id()}", "-c", str(properties)
        )
        assert storage.wait(60) == 0, self._log_end()

    def kill(self) -> None:
        """SIGKILL: nothing is shut down in order."""
        self.skip_unless_ours()
        assert self.process is not None
        self.process.kill()
        self.process.wait(timeout=20)

    def _accepts(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, self._log_end()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def _log_end(self) -> str:
        return (self.directory / "broker.log").read_text()[-2000:]

    def _java(self, *arguments: str) -> subprocess.Popen[bytes]:
        with (self.directory / "broker.log").open("ab") as log:
            return subprocess.Popen(
                ["java", *JAVA_OPTIONS, "-cp", f"{self.home}/libs/*", *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _properties(self) -> str:
        plain, controller = f"127.0.0.1:{self.port}", f"127.0.0.1:{self.controller_port}"
        settings = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{plain},CONTROLLER://{controller}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "log.dirs": self.directory / "log",
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 1,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 1,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "group.initial.rebalance.delay.ms": 0,
            # Tests stamp records in 2023: the first check of retention would delete them.
            "log.retention.ms": -1,
            # A killed broker may come back at once only if its old registration has lapsed.
            "broker.session.timeout.ms": 1000,
            "broker.heartbeat.interval.ms": 200,
        }
        return "\n".join(f"{name}={value}" for name, value in settings.items())


@pytest.fixture(scope="session")
def kafka_broker(
    tmp_path_factory: pytest.TempPathFactory, free_port: Callable[[], int]
) -> Iterator[KafkaBroker]:
    """A real broker: the cluster that FRESHET_TEST_BOOTSTRAP_SERVERS names, else one from KAFKA_HOME's
    jars."""
    given = os.environ.get(SERVERS_VARIABLE)
    if given:
        cluster = KafkaBroker(Path(), tmp_path_factory.mktemp("kafka"), 0, 0, given_servers=given)
        yield cluster
        cluster.delete_topics()
        return
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("KAFKA_HOME is not set: no Kafka distribution to test against")
    if shutil.which("java") is None:
        pytest.skip("java is not installed: Kafka needs version 17 or newer")
    broker = KafkaBroker(Path(home), tmp_path_factory.mktemp("kafka"), free_port(), free_port())
    broker.start()
    yield broker
    broker.kill()


@pytest.fixture(params=["embedded", "kafka"])
def broker(request: pytest.FixtureRequest) -> EmbeddedBroker | KafkaBroker:
    """Each kind of broker in turn: what holds for one holds for the other."""
    name = "embedded_broker" if request.param == "embedded" else "kafka_broker"
    found: EmbeddedBroker | KafkaBroker = request.getfixturevalue(name)
    return found


def wait_for(condition: Callable[[], bool]) -> None:
    """Poll until the condition holds; fails the test after START_TIMEOUT_S."""
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline_s, "the condition did not come true in time"
        time.sleep(0.05)


def _cluster_id() -> str:
    import base64

    return base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
