"""The trainer of one life: its ranks, started as torchrun would start them, or by torchrun itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.chaos.processes import LOOK_S, REPOSITORY, CampaignError, Process, Zygote, free_port
from tests.chaos.scenarios import Life
from tests.chaos.zygote import ONE_THREAD

GRACE_S = 4.0
"""Between SIGTERM and SIGKILL for the ranks that a dead one leaves behind; torchrun gives them 30 s."""


@dataclass
class Ranks:
    """The ranks of one life."""

    processes: list[Process]

    @classmethod
    def start(
        cls, life: Life, *, zygote: Zygote, config: Path, run_dir: Path, fired_log: Path, name: str
    ) -> Ranks:
        """Fork them, with the environment that torchrun gives to its workers; one rank needs none."""
        argv = ["train", "--config", str(config), "--run-dir", str(run_dir)]
        env: dict[str, str] = {}
        if life.failpoint:
            env["FRESHET_FAILPOINT"] = f"{life.failpoint}:{life.hit}:kill:{life.rank}"
            env["FRESHET_FAILPOINT_LOG"] = str(fired_log)
        if life.world_size > 1:
            port = str(free_port())
            env |= {"WORLD_SIZE": str(life.world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes = []
        for rank in range(life.world_size):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if life.world_size > 1 else {}
            log = run_dir / f"{name}.rank{rank}.log"
            processes.append(zygote.start(f"rank {rank}", "trainer", argv, log=log, env=env | place))
        return cls(processes)

    def running(self) -> bool:
        """Whether any of them runs; where one has failed the others are ended first."""
        running = [process for process in self.processes if process.running()]
        if running and any(process.code for process in self.processes):
            self._end(running)
            return False
        return bool(running)

    @staticmethod
    def _end(left: list[Process]) -> None:
        """SIGTERM, then SIGKILL, as torchrun does when one of its workers has failed."""
        deadline_s = time.monotonic() + GRACE_S
        for process in left:
            process.send(signal.SIGTERM)
            process.send(signal.SIGCONT)  # it may stand still
        while any(process.running() for process in left) and time.monotonic() < deadline_s:
            left[0].zygote.look(LOOK_S)
        for process in left:
            process.kill()

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def tail(self) -> str:
        """The end of the log of a rank that failed, else of the first one."""
        failed = [process for process in self.processes if process.code]
        process = (failed or self.processes)[0]
        return f"{process.name}, exit code {process.code}, log {process.log}:\n{process.tail()}"


def run_under_torchrun(
    life: Life, *, config: Path, run_dir: Path, log: Path, timeout_s: float
) -> tuple[int, int]:
    """Two real workers; kills the ranks of the life's events, each a while after all of them train.

    Returns: (torchrun's exit code, kills that met a running worker).
    Raises: CampaignError if it takes too long.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={life.world_size}"]
    restarts = [f"--max-restarts={len(life.events) + 1}", "--monitor-interval=0.2"]
    train = ["-m", "trainer", "train", "--config", str(config), "--run-dir", str(run_dir)]
    with log.open("ab") as output:
        launched = subprocess.Popen(
            [sys.executable, *launcher, *restarts, *train],
            cwd=REPOSITORY,
            env={**os.environ, **ONE_THREAD},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    deadline_s = time.monotonic() + timeout_s
    num_kills = 0
    status = run_dir / "status" / "trainer.json"
    try:
        for event in life.events:
            status.unlink(missing_ok=True)
            while launched.poll() is None and not (status.exists() and b'"training"' in status.read_bytes()):
                _check_time(deadline_s, log)
                time.sleep(LOOK_S)
            time.sleep(event.after_s)
            workers = _workers(launched.pid)
            if launched.poll() is None and len(workers) > event.rank:
                workers[event.rank].kill()
                num_kills += 1
        while launched.poll() is None:
            _check_time(deadline_s, log)
            time.sleep(LOOK_S)
    finally:
        for process in _workers(launched.pid):
            process.kill()
        launched.kill()
        launched.wait()
    return launched.returncode, num_kills


def _check_time(deadline_s: float, log: Path) -> None:
    if time.monotonic() >= deadline_s:
        raise CampaignError(
            f"torchrun did not come to its end in time; log: {log}\n{log.read_text()[-2000:]}"
        )


def _workers(launcher_pid: int) -> list[psutil.Process]:
    """torchrun's workers, by process id, which is the order of their ranks."""
    try:
        found = psutil.Process(launcher_pid).children()
        return sorted((one for one in found if "train" in one.cmdline()), key=lambda one: one.pid)
    except psutil.NoSuchProcess:
        return []
