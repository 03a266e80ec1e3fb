"""The pods' own commands and probes, run as processes on this machine, with TLS and tokens.

What a cluster would give is put in its place: files for mounted secrets and volumes, ports of this machine
for the Services' names, an embedded broker for Kafka. The sources are those that the image copies.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from param_server.client import ClientSecurity, ReplicaClient
from tests.certificates import make_authority, make_certificate
from tests.k8s.manifests import FOLDER, REPOSITORY, Document, commands_of, container_of, named

BIN = Path(sys.executable).parent
IMPRESSIONS = 12_000
DEADLINE_S = 150.0
HERE = {"kafka:9092": "", "bytes_limit = 2147483648": "bytes_limit = 16777216"}
"""What the test changes in freshet.toml; the broker's address is filled in."""


def make_tls_files(folder: Path) -> None:
    """An authority and one certificate for all pods, under the names that the secrets have."""
    folder.mkdir()
    make_authority(folder, "ca")
    make_certificate(folder, "tls", authority="ca")
    for name in ("ca", "tls"):
        (folder / f"{name}.pem").rename(folder / f"{name}.crt")


class Cluster:
    """A folder for /etc and /var of all pods, and a port for each Service."""

    def __init__(self, folder: Path, *, ports: dict[str, int], broker: str) -> None:
        self.folder = folder
        self.ports = ports
        self._processes: list[subprocess.Popen[bytes]] = []
        config = folder / "etc/freshet/config"
        tokens = folder / "etc/freshet/tokens"
        for one in (config, tokens, folder / "var/freshet/log", folder / "var/freshet/run", folder / "image"):
            one.mkdir(parents=True)
        make_tls_files(folder / "etc/freshet/tls")
        for name in ("shard", "replica"):
            (tokens / name).write_text(f"the-token-of-the-{name}\n")
        text = (FOLDER / "freshet.toml").read_text()
        for given, here in (HERE | {"kafka:9092": broker}).items():
            assert given in text
            text = text.replace(given, here)
        (config / "freshet.toml").write_text(self.here(text))
        shutil.copy(FOLDER / "serving.toml", config)
        for copied in re.findall(r"^COPY (\S+) ", (FOLDER / "Dockerfile").read_text(), re.MULTILINE):
            shutil.copytree(
                REPOSITORY / copied,
                folder / "image" / copied,
                ignore=shutil.ignore_patterns("__pycache__"),
            )

    def here(self, text: str) -> str:
        """A word of a manifest as it must be on this machine."""
        text = re.sub(r"freshet-shard-0\.freshet-shard:", "localhost:", text)
        for given, port in self.ports.items():
            text = text.replace(f":{given}", f":{port}")
        return re.sub(r"(?<![\w.])/(etc|var)/freshet", rf"{self.folder}/\1/freshet", text)

    def environment(self, container: Document) -> dict[str, str]:
        given = {one["name"]: one["value"] for one in container.get("env", []) if "value" in one}
        image = dict(re.findall(r"(\w+)=(\S+)", (FOLDER / "Dockerfile").read_text().partition("\nENV ")[2]))
        image["NUMBA_CACHE_DIR"] = os.environ.get("NUMBA_CACHE_DIR", str(self.folder / "numba"))
        return {
            **{name: os.environ[name] for name in ("LANG", "LC_ALL") if name in os.environ},
            "PATH": f"{BIN}:{os.environ['PATH']}",
            **image,
            **given,
            "POD_NAME": "freshet-replica-x",
            "FRESHET_SHARD_TOKEN": "the-token-of-the-shard",
        }

    def start(self, workload: Document) -> subprocess.Popen[bytes]:
        process = self._popen(container_of(workload), "main")
        self._processes.append(process)
        return process

    def probe(self, workload: Document, name: str) -> int:
        """The exit code of a probe."""
        process = self._popen(
            container_of(workload), name, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        return process.wait(timeout=60)

    def _popen(self, container: Document, name: str, **options: Any) -> subprocess.Popen[bytes]:
        words = [
            self.here(word).replace("$(POD_NAME)", "freshet-replica-x")
            for word in commands_of(container)[name]
        ]
        return subprocess.Popen(words, cwd=self.folder / "image", env=self.environment(container), **options)

    def end(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.2)


@pytest.fixture
def cluster(tmp_path: Path, free_port: Callable[[], int], start_embedded_broker: Any) -> Iterator[Cluster]:
    broker = start_embedded_broker({"impressions": 8, "impressions-dead-letters": 1})
    ports = {"7000": free_port(), "8001": free_port()}
    cluster = Cluster(tmp_path / "cluster", ports=ports, broker=broker.bootstrap_servers)
    yield cluster
    cluster.end()


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_pods_train_and_serve(cluster: Cluster, tmp_path: Path) -> None:
    shard, trainer = named("StatefulSet", "freshet-shard"), named("StatefulSet", "freshet-trainer")
    replica = named("Deployment", "freshet-replica")
    running = {"shard": cluster.start(shard)}
    wait_for(lambda: cluster.probe(shard, "startupProbe") == 0)
    running["replica"] = cluster.start(replica)
    wait_for(lambda: cluster.probe(replica, "livenessProbe") == 0)
    assert cluster.probe(replica, "readinessProbe") == 1, "it has no version yet"
    assert cluster.probe(trainer, "startupProbe") == 1

    running["trainer"] = cluster.start(trainer)
    wait_for(lambda: cluster.probe(trainer, "startupProbe") == 0)
    config = cluster.folder / "etc/freshet/config/freshet.toml"
    produce = ("produce", "--config", str(config), "--run-dir", str(tmp_path / "producer"))
    subprocess.run(
        [sys.executable, "-m", "trainer", *produce, "--impressions", str(IMPRESSIONS)],
        cwd=REPOSITORY,
        check=True,
        timeout=60,
    )
    wait_for(lambda: cluster.probe(replica, "readinessProbe") == 0)
    for workload in (shard, replica, trainer):
        assert cluster.probe(workload, "livenessProbe") == 0

    tls = cluster.folder / "etc/freshet/tls"
    security = ClientSecurity(
        ca_file=str(tls / "ca.crt"),
        cert_file=str(tls / "tls.crt"),
        key_file=str(tls / "tls.key"),
        token="the-token-of-the-replica",
    )
    with ReplicaClient(f"localhost:{cluster.ports['8001']}", timeout_s=30, security=security) as client:
        answer = client.predict(inputs())
        assert set(answer.outputs) >= {"click", "like"}
        assert all(np.isfinite(values).all() for values in answer.outputs.values())

    running["trainer"].send_signal(signal.SIGTERM)
    running["trainer"].wait(timeout=trainer["spec"]["template"]["spec"]["terminationGracePeriodSeconds"])
    assert list((cluster.folder / "var/freshet/run/checkpoints").glob("step-*"))
    for name, workload in (("replica", replica), ("shard", shard)):
        running[name].send_signal(signal.SIGTERM)
        grace_s = workload["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
        assert running[name].wait(timeout=grace_s) == 0
    # Whatever the image's folders were written to, a read-only root file system would have refused.
    assert not list((cluster.folder / "image").rglob("*.pyc"))


def inputs() -> dict[str, np.ndarray]:
    """Two impressions of the quickstart's schema."""
    domains = np.empty(2, object)
    domains[:] = [b"slide", b"discovery"]
    ids = np.array([1, 2])
    single = dict.fromkeys(("user_id", "user_group", "item_id", "category", "author_id", "hour"), ids)
    numbers = np.array([0.5, 3.0], np.float32)
    return {
        "domain": domains,
        **single,
        "tags": np.array([3, 4, 5]),
        "tags.lengths": np.array([2, 1], np.int32),
        "item_age_h": numbers,
        "domain_click_rate": numbers,
    }
