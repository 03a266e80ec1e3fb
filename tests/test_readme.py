"""README's commands by hand do what it says, as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
IMPRESSIONS = 3000


def commands_by_hand() -> list[str]:
    """The commands of the section, continued lines joined, in their order."""
    section = (REPOSITORY / "README.md").read_text().split("## Serve and train by hand")[1]
    block = section.split("```console\n")[1].split("```")[0]
    return [line for line in block.replace("\\\n", " ").split("$ ") if line.strip()]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """A command in a shell of its own, in an empty folder; what still runs is ended afterwards."""
    started: list[subprocess.Popen[str]] = []
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }

    def begin(command: str) -> subprocess.Popen[str]:
        log = (tmp_path / f"{len(started)}.log").open("w")
        shell = subprocess.Popen(
            ["bash", "-c", command],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        log.close()
        started.append(shell)
        return shell

    yield begin
    for process in reversed(started):
        tree = [process, *psutil.Process(process.pid).children(recursive=True)] if _runs(process) else []
        for one in tree:
            one.send_signal(signal.SIGKILL)
        process.wait(timeout=20)


def _runs(process: subprocess.Popen[str]) -> bool:
    return process.poll() is None


def trained(tmp_path: Path) -> int:
    status = tmp_path / "run" / "status" / "trainer.json"
    return int(json.loads(status.read_text())["impressions_trained"]) if status.exists() else 0


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_commands_by_hand_run_as_written(
    start: Callable[[str], subprocess.Popen[str]], tmp_path: Path, free_port: Callable[[], int]
) -> None:
    """Only the ports are free ones, KAFKA:9092 is what the broker printed, and the stream is shorter."""
    config, broker, shard, replica, train, produce, status = commands_by_hand()
    ports = {"7001": str(free_port()), "7002": str(free_port())}

    def here(command: str, *, kafka: str = "") -> str:
        command = re.sub(r"127\.0\.0\.1:(700\d)", lambda found: f"127.0.0.1:{ports[found[1]]}", command)
        return command.strip().replace("KAFKA:9092", kafka)

    assert start(config).wait(timeout=60) == 0
    serving = start(broker)
    assert serving.stdout is not None
    kafka = serving.stdout.readline().strip()
    assert re.fullmatch(r"127\.0\.0\.1:\d+", kafka)
    start(here(shard))
    start(here(replica))
    trainer = start(here(train, kafka=kafka))
    producer = start(here(produce, kafka=kafka) + f" --impressions {IMPRESSIONS}")
    assert producer.wait(timeout=120) == 0
    deadline_s = time.monotonic() + 200
    while trained(tmp_path) < IMPRESSIONS:
        assert trainer.poll() is None, (tmp_path / "4.log").read_text()[-3000:]
        assert time.monotonic() < deadline_s, "the stream was not trained in time"
        time.sleep(0.2)
    assert trained(tmp_path) == IMPRESSIONS
    rows = 0
    while not rows:  # the version of the last rows may still be on its way
        assert time.monotonic() < deadline_s, "the replica never held a row"
        asked = start(here(status))
        answer, _ = asked.communicate(timeout=60)
        assert asked.returncode == 0
        rows = json.loads(answer)["num_rows"]
    assert json.loads(answer)["version"]["generation"] == 1


def test_every_part_of_the_path_is_among_the_commands_by_hand() -> None:
    parts = [" ".join(shlex.split(command, comments=True)) for command in commands_by_hand()]
    for part, wanted in zip(
        parts, ("config", "broker", "shard", "replica", "train", "produce", "status"), strict=True
    ):
        assert f" {wanted} " in f"{part} ", part
