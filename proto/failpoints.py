"""Named places at which a test kills or stops the process; idle in production.

`reach("after_map")` does nothing but look at a global unless the environment armed that name:

    FRESHET_FAILPOINT=NAME:HIT:ACTION   at the HIT-th time (from 1); ACTION is kill or stop (SIGKILL, SIGSTOP)
    FRESHET_FAILPOINT_LOG=FILE          one line a firing, durable before the signal: NAME:HIT

With several processes of one kind the variable RANK (a shard's number) chooses one: NAME:HIT:ACTION:RANK.
Each package lists its own names; only __main__ reads the environment. It lies in `proto` since every
package may import that.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(slots=True)
class _Armed:
    name: str
    hit: int
    act: Callable[[], None]
    num_reached: int = 0
    mutex: threading.Lock = field(default_factory=threading.Lock)


_armed: _Armed | None = None


def reach(name: str) -> None:
    """The place `name` is passed; any thread."""
    if _armed is not None and _armed.name == name:
        _fire(_armed)


def arm(name: str, *, hit: int, act: Callable[[], None]) -> None:
    """Call `act` at the `hit`-th time, in the thread that gets there; replaces what was armed."""
    global _armed
    _armed = _Armed(name, hit, act)


def disarm() -> None:
    global _armed
    _armed = None


def arm_from_text(text: str, *, names: Sequence[str], rank: str, log: str | None) -> None:
    """Arm what FRESHET_FAILPOINT says, if it means this rank.

    Args: names: those that this package reaches; rank: of this process; log: FRESHET_FAILPOINT_LOG.
    Raises: ValueError for a text that is not NAME:HIT:ACTION[:RANK] or a name that does not exist.
    """
    parts = text.split(":")
    name, hit, action, wanted = [*parts, "0"][:4] if len(parts) in (3, 4) else ("", "", "", "")
    if name not in names or not hit.isdigit() or action not in _SIGNALS or not wanted.isdigit():
        raise ValueError(
            f"FRESHET_FAILPOINT must be NAME:HIT:kill|stop[:RANK], found '{text}'; names: {', '.join(names)}"
        )
    if wanted == rank:
        number, path = _SIGNALS[action], Path(log) if log else None
        arm(name, hit=int(hit), act=lambda: _signal(number, path, f"{name}:{hit}\n"))


def _fire(armed: _Armed) -> None:
    with armed.mutex:
        armed.num_reached += 1
        if armed.num_reached != armed.hit:
            return
    armed.act()


def _signal(number: signal.Signals, log: Path | None, line: str) -> None:
    if log is not None:
        with log.open("ab") as file:
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())
    os.kill(os.getpid(), number)
