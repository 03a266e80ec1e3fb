"""Keeps the children of a run: starts them in order, watches them, ends them in order.

Start, one after the other; each must be ready before the next begins:
  1. broker      nothing can be said about positions without it
  2. shard       owns the version log
  3. replicas    subscribe to the shard
  4. trainer     opens a generation at the shard, reads from the broker
  5. producer    only when the trainer trains, so that freshness measures the path and not the start
Stop, whatever the reason:
  1. producer and trainer   each finishes what it holds, which needs broker and shard
  2. replicas
  3. shard
  4. broker
A run is *broken off* when one of its processes has died. Producer and trainer then no longer wait for what
may not answer: the trainer only saves its state, and the producer is given little time.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Callable, Sequence
from types import FrameType, TracebackType

from trainer.errors import ChildError
from trainer.run.processes import Child, ChildSpec, Facts, describe_exit
from trainer.run.run_directory import RunDirectory

log = logging.getLogger(__name__)

_POLL_S = 0.05
_KILL_WAIT_S = 15.0


class InterruptedRun(BaseException):
    """A signal asked the run to end. Not an Exception: no handler for errors may swallow it."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


class StopSignals:
    """While entered, SIGINT, SIGTERM and SIGHUP are remembered instead of raised.

    The first is looked at by `check`; the second calls `on_second` at once.
    """

    _NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.on_second: Callable[[], None] = lambda: None
        self._previous: dict[signal.Signals, signal._HANDLER] = {}

    def check(self) -> None:
        """Raises: InterruptedRun once a signal has arrived."""
        if self.received is not None:
            raise InterruptedRun(self.received)

    def __enter__(self) -> StopSignals:
        for number in self._NUMBERS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = signal.Signals(number)
        else:
            self.on_second()


class Supervisor:
    """Owns the children; leaving its `with` block ends every one of them."""

    def __init__(self, directory: RunDirectory, signals: StopSignals) -> None:
        self.facts: dict[str, Facts] = {}
        self.children: dict[str, Child] = {}
        self._directory = directory
        self._signals = signals
        self._needed: set[str] = set()
        self._is_broken_off = False
        self._tick: Callable[[], None] = lambda: None
        signals.on_second = self.kill_all

    def __enter__(self) -> Supervisor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop_all()

    def on_tick(self, tick: Callable[[], None]) -> None:
        """Call `tick` about every 50 ms while waiting."""
        self._tick = tick

    def start(self, spec: ChildSpec) -> Facts:
        """Start one child and wait until it is ready.

        Returns: what its ready file says; empty where it has none.
        Raises: ChildError if it dies, or is not ready in time; InterruptedRun.
        """
        child = Child.start(spec, logs=self._directory.logs, ready=self._directory.ready, facts=self.facts)
        self.children[spec.name] = child
        if spec.ready_timeout_s is None:
            return {}
        if not self.wait_until(lambda: child.ready_facts() is not None, timeout_s=spec.ready_timeout_s):
            raise ChildError(f"{spec.name}: not ready within {spec.ready_timeout_s:g} s; {_tail(child)}")
        self.facts[spec.name] = child.ready_facts() or {}
        return self.facts[spec.name]

    def wait_until(self, condition: Callable[[], bool], *, timeout_s: float | None) -> bool:
        """Wait for a condition while watching everything else.

        Returns: False if it was still false after timeout_s (None = wait for ever).
        Raises: ChildError if a child dies meanwhile; InterruptedRun.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        while not condition():
            self._signals.check()
            self.check()
            self._tick()
            if deadline_s is not None and time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return True

    def need(self, name: str) -> None:
        """From now on any end of this child is an error, also one with exit code 0."""
        self._needed.add(name)

    def let_end(self, name: str) -> None:
        """Undo `need`. Raises: ChildError if some child ended too early."""
        self.check()
        self._needed.discard(name)

    def has_ended(self, name: str) -> bool:
        """True once the child has ended by itself with exit code 0."""
        return self.children[name].exit_code() == 0

    def check(self) -> None:
        """Raises: ChildError naming the first child that ended though it should not have."""
        for child in self.children.values():
            code = child.exit_code()
            if code is None or child.was_told_to_stop:
                continue
            is_needed = child.spec.name in self._needed
            if code == 0 and child.spec.ends_itself and not is_needed:
                continue
            too_early = " before the stream had ended" if code == 0 and is_needed else ""
            raise ChildError(f"{child.spec.name}: {describe_exit(code)}{too_early}; {_tail(child)}")

    def break_off(self) -> None:
        """Have `stop_all` wait for nothing that needs another process; to be called before it."""
        self._is_broken_off = True
        self._directory.broken_off.touch()

    def stop_all(self) -> None:
        """End every child in the order of the module's docstring; never raises for a child's sake."""
        for group in _stop_groups(list(self.children.values())):
            running = [child for child in group if child.exit_code() is None]
            for child in running:
                child.terminate()
            started_s = time.monotonic()
            for child in running:
                grace_s = child.spec.stop_grace_s
                if self._is_broken_off:
                    grace_s = min(grace_s, child.spec.broken_off_grace_s)
                if child.wait(max(0.0, grace_s - (time.monotonic() - started_s))) is None:
                    log.warning("%s: did not end within %g s, killed", child.spec.name, grace_s)
                    child.kill()
                    child.wait(_KILL_WAIT_S)

    def stop(self, name: str) -> None:
        """End one child that ends itself, before its time; what it left behind is finished.

        Raises: ChildError if it did not end cleanly within its grace.
        """
        child = self.children[name]
        child.terminate()
        self.wait_until(lambda: child.exit_code() is not None, timeout_s=child.spec.stop_grace_s)
        if not child.ended_cleanly():
            code = child.exit_code()
            found = "still runs" if code is None else describe_exit(code)
            raise ChildError(f"{name}: {found} after SIGTERM; {_tail(child)}")

    def kill_all(self) -> None:
        for child in self.children.values():
            child.kill()

    def unclean(self) -> list[str]:
        """One line for each child that did not end as it should."""
        lines = []
        for child in self.children.values():
            code = child.exit_code()
            if code is None:
                lines.append(f"{child.spec.name}: still running")
            elif not child.ended_cleanly():
                lines.append(f"{child.spec.name}: {describe_exit(code)}; log {child.log_path}")
        return lines


def _stop_groups(children: Sequence[Child]) -> list[list[Child]]:
    """Those that end themselves first and together, then the services, the last started first."""
    own_end = [child for child in children if child.spec.ends_itself]
    services = [child for child in children if not child.spec.ends_itself]
    return [own_end, *([child] for child in reversed(services))]


def _tail(child: Child) -> str:
    lines = child.last_lines()
    if not lines:
        return f"its log {child.log_path} is empty"
    text = f"the end of {child.log_path}:\n" + "\n".join(f"  | {line}" for line in lines)
    cause = child.last_error()
    if "\n".join(cause) in "\n".join(lines):
        return text
    return "its last error:\n" + "\n".join(f"  | {line}" for line in cause) + "\n" + text
