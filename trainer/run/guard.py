"""Stands between the supervisor and one child, so that the child's whole process tree ends with either.

`python -I -S guard.py PARENT_PID GRACE_S command ...`; standard library only, a few megabytes.

A process group is not enough: torchrun puts each of its workers into a session of its own. The guard is
therefore the *subreaper* of everything the child starts: a process whose parent has gone becomes the
guard's child, and the guard ends only when it has none left. It leaves with the child's own exit status.

| it receives | it does |
|---|---|
| SIGTERM, SIGINT | passes it on to the child |
| SIGUSR1 | kills the whole tree |
| the supervisor is gone (SIGHUP, or another parent) | SIGTERM to the child; after GRACE_S kills the tree |
| the child has ended | kills what the child left behind |
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import select
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGCHLD)
_LOOK_S = 1.0
"""How often the parent is looked at where the kernel does not tell (anything but Linux)."""
_KILL_S = 10.0
"""A process that SIGKILL has not ended by then hangs inside the kernel; waiting longer does not help."""


def main(arguments: list[str]) -> None:
    parent_pid, grace_s, command = int(arguments[0]), float(arguments[1]), arguments[2:]
    wake_fd = _wake_on_signals()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGHUP)
    child_pid = os.fork()
    if child_pid == 0:
        _become(command, guard_pid=os.getppid())
    status = _watch(child_pid, parent_pid=parent_pid, grace_s=grace_s, wake_fd=wake_fd)
    end_tree()
    _leave_like(status)


def _wake_on_signals() -> int:
    """Turn signals into bytes of a pipe, so that the loop below is the only place that acts on them."""
    read_fd, write_fd = os.pipe()
    os.set_blocking(read_fd, False)
    os.set_blocking(write_fd, False)
    signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    for number in _HANDLED:
        signal.signal(number, lambda *_: None)
    return read_fd


def _become(command: list[str], *, guard_pid: int) -> None:
    """Runs in the forked child: never returns."""
    signal.set_wakeup_fd(-1)
    for number in _HANDLED:
        signal.signal(number, signal.SIG_DFL)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        if os.getppid() == guard_pid:  # otherwise the guard died before the line above took effect
            os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: cannot be started ({error.strerror})\n".encode())
    finally:
        os._exit(127)


def _watch(child_pid: int, *, parent_pid: int, grace_s: float, wake_fd: int) -> int:
    """Returns: the child's wait status, once it has ended."""
    kill_at_s: float | None = None
    while True:
        received = os.read(wake_fd, 4096) if select.select([wake_fd], [], [], _LOOK_S)[0] else b""
        status = _reap(child_pid)
        if status is not None:
            return status
        if os.getppid() != parent_pid and kill_at_s is None:
            os.kill(child_pid, signal.SIGTERM)
            kill_at_s = time.monotonic() + grace_s
        for number in (signal.SIGTERM, signal.SIGINT):
            if number in received:
                os.kill(child_pid, number)
        if signal.SIGUSR1 in received or (kill_at_s is not None and time.monotonic() >= kill_at_s):
            _kill_descendants()


def _reap(child_pid: int) -> int | None:
    """Collect every process that has ended; returns the child's wait status if it is among them."""
    found = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        if pid == child_pid:
            found = status


def end_tree() -> None:
    """Kill until no child is left; each orphan of a killed process becomes our child in turn."""
    deadline_s = time.monotonic() + _KILL_S
    while time.monotonic() < deadline_s:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            _kill_descendants()
            time.sleep(0.01)


def _kill_descendants() -> None:
    for pid in descendants(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def descendants(root_pid: int) -> list[int]:
    """Every process below root_pid, as /proc shows them; empty where there is no /proc."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            after_name = entry.read_text(errors="replace").rpartition(")")[2]
        except OSError:  # it ended while we looked
            continue
        children.setdefault(int(after_name.split()[1]), []).append(int(entry.parent.name))
    found: list[int] = []
    waiting = [root_pid]
    while waiting:
        below = children.get(waiting.pop(), [])
        found += below
        waiting += below
    return found


def _leave_like(status: int) -> None:
    """End as the child did: the same exit code, or by the same signal."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        sys.exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if -code not in (signal.SIGKILL, signal.SIGSTOP):
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, int(value), 0, 0, 0)


if __name__ == "__main__":
    main(sys.argv[1:])
