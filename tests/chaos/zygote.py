"""A process that has imported everything once and forks a fresh process for every start.

Importing torch and torchrec takes seconds of CPU; a campaign starts trainers a thousand times. The children
are real processes: they run the same `main` as `python -m trainer` and `python -m param_server`, own their
memory, files and sockets, and are killed for real.

A fork keeps only the calling thread, so it is safe only while there is no other: no thread pool of OpenMP or
BLAS, no gRPC, no process group. This is looked at before every fork. (onnxruntime starts a thread when it is
imported; a replica imports it in its own process.)

    python -m tests.chaos.zygote CONFIG_TOML

Orders and answers are lines of JSON on stdin and stdout. Its end is the end of all its children.
"""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import select
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import msgspec

PR_SET_PDEATHSIG = 1
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""To be in the environment before numpy and torch are imported."""
EXIT_ERROR = 70
"""Exit code of a child that ended by an exception of its own."""


class Start(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """Fork a child that runs the module's main."""

    module: str
    argv: list[str]
    env: dict[str, str]
    log: str
    file_bytes_max: int = 0
    """No file of the child may grow beyond it; 0 = no limit."""


class Signal(msgspec.Struct, frozen=True, kw_only=True, tag="signal"):
    """Send a signal to a child; nothing where it has ended. The zygote knows: no process id is reused."""

    pid: int
    number: int


class Started(msgspec.Struct, frozen=True, kw_only=True, tag="started"):
    pid: int


class Ended(msgspec.Struct, frozen=True, kw_only=True, tag="ended"):
    pid: int
    code: int
    """Exit code; negative = the signal."""


Order = Start | Signal
Answer = Started | Ended


def main(arguments: list[str]) -> None:
    die_with_parent()
    mains = preload(Path(arguments[0]))
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the campaign decides when things end
    # What is there now lives for ever: children need not touch it, so its pages stay shared.
    gc.collect()
    gc.freeze()
    _answer(Started(pid=os.getpid()))
    _serve(mains, wake_fd=read_fd)


def preload(config_path: Path) -> dict[str, Callable[[list[str]], int]]:
    """Import and compile all that a child needs; returns the mains by module."""
    import torch
    import torchrec  # noqa: F401

    import param_server.__main__
    import param_server.shard
    import trainer.__main__
    import trainer.worker
    from trainer.config import load_config
    from trainer.warm_up import compile_kernels

    torch.set_num_threads(1)
    compile_kernels(load_config(config_path))

    # Exporting a program takes seconds and starts threads: a child of its own does it once, into the file
    # in which trainers keep theirs, and every run begins with a copy of it.
    def write_program(argv: list[str]) -> int:
        return _write_program(Path(argv[0]), Path(argv[1]))

    return {
        "trainer": trainer.__main__.main,
        "param_server": param_server.__main__.main,
        "program": write_program,
    }


def _write_program(config_path: Path, program_path: Path) -> int:
    from trainer.collectives import start_ranks
    from trainer.config import load_config
    from trainer.publish.program_cache import program_of
    from trainer.recommender import Recommender

    config = load_config(config_path)
    program_of(Recommender(config, ranks=start_ranks()), config=config, path=program_path)
    return 0


def _serve(mains: dict[str, Callable[[list[str]], int]], *, wake_fd: int) -> None:
    """Until stdin is closed."""
    children: set[int] = set()
    waiting = b""
    while True:
        ready, _, _ = select.select([0, wake_fd], [], [])
        if wake_fd in ready:
            os.read(wake_fd, 4096)
        _reap(children)
        if 0 not in ready:
            continue
        data = os.read(0, 1 << 16)
        if not data:
            return
        *lines, waiting = (waiting + data).split(b"\n")
        for line in lines:
            order: Order = msgspec.json.decode(line, type=Order)
            if isinstance(order, Start):
                children.add(_start(order, mains))
            else:
                _reap(children)
                if order.pid in children:
                    os.kill(order.pid, order.number)


def _reap(children: set[int]) -> None:
    """Tell of every child that has ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        children.discard(pid)
        _answer(Ended(pid=pid, code=os.waitstatus_to_exitcode(status)))


def _start(order: Start, mains: dict[str, Callable[[list[str]], int]]) -> int:
    num_threads = len(os.listdir("/proc/self/task"))
    assert num_threads == 1, f"a fork with {num_threads} threads would copy their locks and not them"
    zygote_pid = os.getpid()
    pid = os.fork()
    if pid == 0:
        _become(order, mains[order.module], zygote_pid=zygote_pid)
    _answer(Started(pid=pid))
    return pid


def _become(order: Start, run: Callable[[list[str]], int], *, zygote_pid: int) -> None:
    """In the child: never returns."""
    code = EXIT_ERROR
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        os.setsid()
        die_with_parent()
        assert os.getppid() == zygote_pid, "the zygote died while it forked"
        log_fd = os.open(order.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(log_fd, 1)
        os.dup2(log_fd, 2)
        os.closerange(3, 64)
        if order.file_bytes_max:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (order.file_bytes_max, order.file_bytes_max))
        os.environ.update(order.env)
        code = run(order.argv)
    finally:
        # Not sys.exit: what the zygote registered to run at its own end is not the child's.
        if sys.exc_info()[1] is not None:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _answer(answer: Answer) -> None:
    os.write(1, msgspec.json.encode(answer) + b"\n")


def die_with_parent() -> None:
    """Ask the kernel for SIGKILL when the parent ends, so that nothing outlives a campaign."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
