"""The campaign's side of the zygote: processes to start, kill, stop and wait for."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from tests.chaos.zygote import ONE_THREAD, Answer, Ended, Order, Signal, Start, Started

REPOSITORY = Path(__file__).resolve().parents[2]
START_TIMEOUT_S = 120.0
LOOK_S = 0.01


class CampaignError(Exception):
    """A process did not do what it must; the text says which, and where its log is."""


@dataclass(eq=False)
class Process:
    """A child of the zygote."""

    name: str
    pid: int
    log: Path
    zygote: Zygote
    code: int | None = None
    """Once it has ended: exit code, or minus the signal."""

    def running(self) -> bool:
        self.zygote.look()
        return self.code is None

    def send(self, number: signal.Signals) -> None:
        """Nothing where it has ended."""
        self.zygote.order(Signal(pid=self.pid, number=number))

    def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        self.send(signal.SIGKILL)
        self.wait(20.0)

    def wait(self, timeout_s: float) -> int:
        """Raises: CampaignError if it still runs after that long."""
        deadline_s = time.monotonic() + timeout_s
        while self.running():
            if time.monotonic() >= deadline_s:
                raise CampaignError(f"{self.name}: still runs after {timeout_s:g} s; log: {self.log}")
            self.zygote.look(LOOK_S)
        assert self.code is not None
        return self.code

    def tail(self, num_bytes: int = 2000) -> str:
        """The end of its log."""
        return self.log.read_bytes()[-num_bytes:].decode(errors="replace")


@dataclass
class Zygote:
    """The zygote's process; `with` ends it and every child of it."""

    config: Path
    program: Path
    """Where the dense model's program is kept, once a child has exported it."""
    log: Path
    children: dict[int, Process] = field(default_factory=dict)
    _started: list[int] = field(default_factory=list)
    _waiting: bytes = b""

    def __enter__(self) -> Self:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.zygote", str(self.config)],
                cwd=REPOSITORY,
                env={**os.environ, **ONE_THREAD},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self._pid_of_next()  # its own, once everything is imported
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def start(
        self,
        name: str,
        module: str,
        argv: list[str],
        *,
        log: Path,
        env: dict[str, str] | None = None,
        file_bytes_max: int = 0,
    ) -> Process:
        self.order(
            Start(module=module, argv=argv, env=env or {}, log=str(log), file_bytes_max=file_bytes_max)
        )
        pid = self._pid_of_next()
        process = self.children[pid] = Process(name, pid, log, self)
        return process

    def order(self, order: Order) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(order) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._dead() from error

    def look(self, wait_s: float = 0.0) -> None:
        """Take in what the zygote says; wait at most that long for it."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], wait_s)[0]:
            return
        data = os.read(self._process.stdout.fileno(), 1 << 16)
        if not data:
            raise self._dead()
        *lines, self._waiting = (self._waiting + data).split(b"\n")
        for line in lines:
            answer: Answer = msgspec.json.decode(line, type=Answer)
            if isinstance(answer, Started):
                self._started.append(answer.pid)
            elif isinstance(answer, Ended):
                self.children.pop(answer.pid).code = answer.code

    def _pid_of_next(self) -> int:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not self._started:
            if time.monotonic() >= deadline_s:
                raise self._dead()
            self.look(LOOK_S)
        return self._started.pop()

    def _dead(self) -> CampaignError:
        return CampaignError(f"the zygote does not answer; log: {self.log}\n{self.log.read_text()[-2000:]}")


def wait_for_file(path: Path, process: Process, timeout_s: float = 30.0) -> bytes:
    """The ready file of a process.

    Raises: CampaignError if it ends first, or does not write it in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        if not process.running() or time.monotonic() >= deadline_s:
            raise CampaignError(f"{process.name}: not ready (exit code {process.code}):\n{process.tail()}")
        process.zygote.look(LOOK_S)
    return path.read_bytes()
