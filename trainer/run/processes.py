"""One child process of a run: its command, its log, its ready file and its end."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import msgspec

from trainer.errors import ChildError
from trainer.run import guard

_GUARD_SCRIPT = Path(guard.__file__)
_TAIL_BYTES = 8192
_ERROR_BYTES = 1 << 18
"""How far from its end a log is searched for an error."""
_TRACEBACK = "Traceback (most recent call last):"
_LAUNCHERS_ERROR = "ChildFailedError"
"""With it torchrun says that a worker ended, without saying why."""
_ORPHAN_GRACE_S = 8.0
"""At most this long does a child outlive a supervisor that was killed."""

Facts = dict[str, str | int]
"""What a child says of itself once it listens, e.g. {"address": "127.0.0.1:41234", "pid": 71}."""


class Fact(NamedTuple):
    """A part of a command that is known only when another child has said it."""

    child: str
    name: str


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """How one process is started and ended."""

    name: str
    argv: tuple[str | Fact, ...]
    ends_itself: bool = False
    """True: exit code 0 is its normal end (trainer, producer); False: it runs until it is stopped."""
    ready_timeout_s: float | None = 60.0
    """`--ready-file PATH` is added to the command and this long is waited for it; None = no ready file."""
    stop_grace_s: float = 10.0
    """Between SIGTERM and SIGKILL."""
    broken_off_grace_s: float = 60.0
    """The most of it once the run is broken off: a process of the path has died."""
    stopped_codes: tuple[int, ...] = (0, -signal.SIGTERM)
    """Exit codes of a clean end after SIGTERM."""


class Child:
    """A started process. Its guard ends with it, and it ends with its guard or with this process."""

    def __init__(
        self,
        spec: ChildSpec,
        process: subprocess.Popen[bytes],
        *,
        log_path: Path,
        log_begin: int,
        ready_path: Path,
    ) -> None:
        self.spec = spec
        self.log_path = log_path
        self.was_told_to_stop = False
        self._process = process
        self._ready_path = ready_path
        self._log_begin = log_begin

    @classmethod
    def start(
        cls, spec: ChildSpec, *, logs: Path, ready: Path, facts: Mapping[str, Mapping[str, str | int]]
    ) -> Child:
        """Start the process; to be called by the main thread, as the kernel ties a child to its thread.

        Raises: ChildError where a Fact of the command is not known.
        """
        log_path = logs / f"{spec.name}.log"
        ready_path = ready / f"{spec.name}.json"
        ready_path.unlink(missing_ok=True)
        command = [_resolve(part, facts, wanted_by=spec.name) for part in spec.argv]
        if spec.ready_timeout_s is not None:
            command += ["--ready-file", str(ready_path)]
        grace_s = min(spec.stop_grace_s, _ORPHAN_GRACE_S)
        guarded = [sys.executable, "-I", "-S", str(_GUARD_SCRIPT), str(os.getpid()), str(grace_s)]
        with log_path.open("ab") as log:
            log_begin = log.tell()
            process = subprocess.Popen(
                guarded + command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a Ctrl-C of the terminal reaches the supervisor alone
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        return cls(spec, process, log_path=log_path, log_begin=log_begin, ready_path=ready_path)

    @property
    def pid(self) -> int:
        """The guard's process id."""
        return self._process.pid

    def exit_code(self) -> int | None:
        """None while it runs; negative = the signal that ended it."""
        return self._process.poll()

    def ready_facts(self) -> Facts | None:
        """What the ready file says; None while there is none.

        Raises: ChildError where the file is not a JSON object of strings and numbers.
        """
        try:
            return msgspec.json.decode(self._ready_path.read_bytes(), type=Facts)
        except FileNotFoundError:
            return None
        except msgspec.MsgspecError as error:
            raise ChildError(
                f"{self.spec.name}: its ready file {self._ready_path} is wrong: {error}"
            ) from error

    def last_lines(self, count: int = 20) -> list[str]:
        """The newest lines it has written to its log, from at most 8 KiB of it."""
        return self._log_end(_TAIL_BYTES)[-count:]

    def last_error(self, count: int = 15) -> list[str]:
        """The newest traceback or "error: " line of its log, which a launcher's own words may have buried.

        Returns: at most `count` lines, of a long traceback the first and the last; empty if there is none.
        """
        found = find_last_error(self._log_end(_ERROR_BYTES))
        return found if len(found) <= count else [found[0], *found[-(count - 1) :]]

    def _log_end(self, num_bytes: int) -> list[str]:
        with self.log_path.open("rb") as log:
            log.seek(max(self._log_begin, log.seek(0, os.SEEK_END) - num_bytes))
            return log.read(num_bytes).decode(errors="replace").splitlines()

    def terminate(self) -> None:
        self.was_told_to_stop = True
        self._signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the whole tree at once."""
        self.was_told_to_stop = True
        self._signal(signal.SIGUSR1)

    def wait(self, timeout_s: float) -> int | None:
        """The exit code, or None if it still runs after timeout_s."""
        try:
            return self._process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            return None

    def ended_cleanly(self) -> bool:
        """Exit code 0, or one of the specification's if it was told to stop."""
        code = self.exit_code()
        return code == 0 or (self.was_told_to_stop and code in self.spec.stopped_codes)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)


def describe_exit(code: int) -> str:
    """An exit code as an operator reads it: "exit code 3" or "ended by SIGKILL"."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"ended by signal {-code}"


def find_last_error(lines: Sequence[str]) -> list[str]:
    """The last traceback, up to the line that names its error, or the last line "error: ...".

    Torchrun's own traceback is passed over. Lines may have a prefix such as "[rank0]: ".
    """
    for begin in range(len(lines) - 1, -1, -1):
        if lines[begin].startswith("error: "):
            return [lines[begin]]
        prefix, mark, _ = lines[begin].partition(_TRACEBACK)
        if not mark:
            continue
        end = begin + 1
        while end < len(lines) and lines[end].startswith(prefix + " "):
            end += 1
        block = list(lines[begin : end + 1])
        if _LAUNCHERS_ERROR not in block[-1]:
            return block
    return []


def _resolve(part: str | Fact, facts: Mapping[str, Mapping[str, str | int]], *, wanted_by: str) -> str:
    if isinstance(part, str):
        return part
    if part.name not in facts.get(part.child, {}):
        raise ChildError(
            f"{wanted_by}: needs '{part.name}' of {part.child}; its ready file gave "
            f"{sorted(facts.get(part.child, {})) or 'nothing'}"
        )
    return str(facts[part.child][part.name])
