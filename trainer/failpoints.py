"""Named places in a training run at which a test kills or stops the process; idle in production.

`reach("after_map")` does nothing but look at a global unless the environment armed that name:

    FRESHET_FAILPOINT=NAME:HIT:ACTION   at the HIT-th time (from 1); ACTION: kill (SIGKILL) or stop (SIGSTOP)
    FRESHET_FAILPOINT_LOG=FILE          one line a firing, durable before the signal: NAME:HIT

With several ranks the variable RANK chooses one: NAME:HIT:ACTION:RANK. Only __main__ reads the environment.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from trainer.errors import ConfigError

FAILPOINTS = (
    "after_fetch",
    "after_map",
    "after_backward",
    "after_step",
    *(
        f"publish.{side}_{step}"
        for step in ("take", "append", "commit", "ack")
        for side in ("before", "after")
    ),
    "checkpoint.before_copy",
    "checkpoint.after_copy",
    "checkpoint.before_write",
    "checkpoint.inside_rows_file",
    "checkpoint.inside_ids_file",
    "checkpoint.inside_state_file",
    "checkpoint.inside_dense_file",
    "checkpoint.after_write",
    "checkpoint.before_gather",
    "checkpoint.after_gather",
    "checkpoint.before_manifest",
    "checkpoint.inside_manifest",
    "checkpoint.after_manifest",
    "checkpoint.inside_pointer",
    "checkpoint.after_pointer",
    "checkpoint.after_retention",
)
"""Every name that the code reaches; the fault campaign proves that each one fires."""

_SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


@dataclass(slots=True)
class _Armed:
    name: str
    hit: int
    number: signal.Signals
    log: Path | None
    num_reached: int = 0
    mutex: threading.Lock = field(default_factory=threading.Lock)


_armed: _Armed | None = None


def reach(name: str) -> None:
    """The place `name` is passed; any thread."""
    if _armed is not None and _armed.name == name:
        _fire(_armed)


def arm_from_environment(environ: Mapping[str, str]) -> None:
    """Raises: ConfigError for a text that is not NAME:HIT:ACTION[:RANK] or a name that does not exist."""
    global _armed
    text = environ.get("FRESHET_FAILPOINT", "")
    if not text:
        return
    parts = text.split(":")
    name, hit, action, rank = parts if len(parts) == 4 else (*parts, "0") if len(parts) == 3 else ("",) * 4
    if name not in FAILPOINTS or not hit.isdigit() or action not in _SIGNALS or not rank.isdigit():
        raise ConfigError(
            f"FRESHET_FAILPOINT must be NAME:HIT:kill|stop[:RANK], found '{text}'; "
            f"names: {', '.join(FAILPOINTS)}"
        )
    if environ.get("RANK", "0") == rank:
        log = environ.get("FRESHET_FAILPOINT_LOG")
        _armed = _Armed(name, int(hit), _SIGNALS[action], Path(log) if log else None)


def _fire(armed: _Armed) -> None:
    with armed.mutex:
        armed.num_reached += 1
        if armed.num_reached != armed.hit:
            return
    if armed.log is not None:
        with armed.log.open("ab") as file:
            file.write(f"{armed.name}:{armed.hit}\n".encode())
            file.flush()
            os.fsync(file.fileno())
    os.kill(os.getpid(), armed.number)
