"""Broker, shard, replicas and disks of a run: started, killed, stopped, filled and brought back.

A service that was killed comes back at its old address with its old data: the embedded broker has none to
come back with, so it is only ever stopped.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import msgspec

from tests.chaos.processes import CampaignError, Process, Zygote, free_port, wait_for_file
from tests.conftest import KafkaBroker

SMALL_DISK_BYTES = 32 << 20
BALLAST = "ballast"


class Service(Protocol):
    """Something that can die and come back, or stand still and go on."""

    def kill(self) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def go_on(self) -> None: ...


@dataclass
class ForkedService:
    """A service that the zygote forks."""

    zygote: Zygote
    name: str
    module: str
    argv: list[str]
    ready: Path
    log: Path
    process: Process | None = None

    def start(self) -> None:
        """Start it and wait until it says that it listens."""
        self.ready.unlink(missing_ok=True)
        self.process = self.zygote.start(self.name, self.module, self.argv, log=self.log)
        wait_for_file(self.ready, self.process)

    def facts(self) -> dict[str, str | int]:
        return msgspec.json.decode(self.ready.read_bytes(), type=dict[str, str | int])

    def kill(self) -> None:
        self._running().kill()

    def stop(self) -> None:
        self._running().send(signal.SIGSTOP)

    def go_on(self) -> None:
        self._running().send(signal.SIGCONT)

    def _running(self) -> Process:
        if self.process is None or not self.process.running():
            raise CampaignError(f"{self.name}: ended by itself; log: {self.log}")
        return self.process


@dataclass
class RealBroker:
    """A Kafka broker with its own data directory."""

    broker: KafkaBroker

    @classmethod
    def create(cls, home: Path, directory: Path) -> RealBroker:
        directory.mkdir(parents=True)
        return cls(KafkaBroker(home, directory, free_port(), free_port()))

    def start(self) -> None:
        self.broker.start()

    def kill(self) -> None:
        self.broker.kill()

    def stop(self) -> None:
        assert self.broker.process is not None
        self.broker.process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self.broker.process is not None
        self.broker.process.send_signal(signal.SIGCONT)


def embedded_broker(zygote: Zygote, *, config: Path, directory: Path) -> ForkedService:
    ready = directory / "broker.json"
    argv = ["broker", "--config", str(config), "--ready-file", str(ready)]
    return ForkedService(zygote, "broker", "trainer", argv, ready, directory / "broker.log")


def shard(zygote: Zygote, *, log_dir: Path, directory: Path) -> tuple[ForkedService, str]:
    """Returns: the shard, not yet started, and its address."""
    address, ready = f"127.0.0.1:{free_port()}", directory / "shard.json"
    argv = ["shard", "--address", address, "--log-dir", str(log_dir), "--ready-file", str(ready)]
    return ForkedService(zygote, "shard", "param_server", argv, ready, directory / "shard.log"), address


def replica(zygote: Zygote, *, name: str, shard_address: str, directory: Path) -> tuple[ForkedService, str]:
    """Returns: the replica, not yet started, and its address."""
    address, ready = f"127.0.0.1:{free_port()}", directory / f"{name}.json"
    argv = ["replica", "--shard", shard_address, "--address", address, "--name", name]
    argv += ["--ready-file", str(ready)]
    return ForkedService(zygote, name, "param_server", argv, ready, directory / f"{name}.log"), address


@dataclass
class SmallDisk:
    """A small file system of its own, which can be filled to the last byte and emptied again."""

    directory: Path
    num_fills: int = field(default=0, init=False)

    def fill(self) -> None:
        """From now on no byte more fits."""
        with (self.directory / BALLAST).open("wb", buffering=0) as file:
            # Others write and delete meanwhile, so the room is not asked for but used up.
            for num_bytes in (1 << 20, 1 << 12, 1):
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(num_bytes))
        self.num_fills += 1

    def empty(self) -> None:
        (self.directory / BALLAST).unlink(missing_ok=True)


@contextlib.contextmanager
def small_disk(directory: Path) -> Iterator[SmallDisk]:
    """Mount one; its content is copied back into the directory at the end.

    Raises: CampaignError where this user may not mount.
    """
    directory.mkdir(parents=True, exist_ok=True)
    options = f"size={SMALL_DISK_BYTES}"
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "freshet-chaos", str(directory)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        raise CampaignError(f"{directory}: cannot mount a small disk ({mounted.stderr.strip()})")
    try:
        disk = SmallDisk(directory)
        yield disk
    finally:
        copy = directory.with_name(f"{directory.name}.copy")
        (directory / BALLAST).unlink(missing_ok=True)
        shutil.copytree(directory, copy)
        subprocess.run(["umount", "--lazy", str(directory)], check=True)
        shutil.rmtree(directory)
        copy.rename(directory)


def can_mount() -> bool:
    """Whether this user may mount file systems: root outside of a locked-down container."""
    return os.geteuid() == 0 and shutil.which("mount") is not None
