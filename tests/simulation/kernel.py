"""The kernel: one virtual clock, one queue of events, one random generator, and a log of what happened.

Everything that happens in a simulation is an event of this queue, and every choice comes from this
generator, so a seed is the whole run. A task is a generator function: it yields the milliseconds that it
sleeps, or a function that is given the task and resumes it once.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Generator
from typing import Any

RECENT_EVENTS = 60
QUEUE_EVENTS_MAX = 20_000

Steps = Generator[Any, Any, Any]


class ViolationError(AssertionError):
    """A promise was broken."""


class SimulatedCrashError(BaseException):
    """The process ends at this very place; nothing in it may catch that."""


class Kernel:
    """Runs events in the order of their time, then of their making."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now_ms = 0
        self.num_events = 0
        self.recent: deque[str] = deque(maxlen=RECENT_EVENTS)
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._digest = hashlib.blake2b(digest_size=16)

    @property
    def digest(self) -> str:
        """Of every line that was noted: equal for equal runs."""
        return self._digest.hexdigest()

    def note(self, text: str) -> None:
        line = f"{self.now_ms:>7} ms  {text}"
        self._digest.update(line.encode())
        self.recent.append(line)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def after(self, delay_ms: int, act: Callable[[], None]) -> None:
        if len(self._queue) >= QUEUE_EVENTS_MAX:
            raise ViolationError(f"{QUEUE_EVENTS_MAX} events wait: something sends without bound")
        heapq.heappush(self._queue, (self.now_ms + delay_ms, next(self._numbers), act))

    def run(self, until_ms: int) -> None:
        """Everything that happens up to this time."""
        while self._queue and self._queue[0][0] <= until_ms:
            self.now_ms, _, act = heapq.heappop(self._queue)
            self.num_events += 1
            act()
        self.now_ms = until_ms


class Process:
    """What can be killed, paused and started again; each life has tasks of its own."""

    def __init__(self, kernel: Kernel, name: str) -> None:
        self.kernel = kernel
        self.name = name
        self.up = False
        self.paused_until_ms = 0
        self._restarts = False
        self._tasks: list[Task] = []

    @property
    def pause_left_ms(self) -> int:
        return max(0, self.paused_until_ms - self.kernel.now_ms)

    def spawn(self, steps: Steps) -> None:
        self._tasks = [task for task in self._tasks if task.alive]
        task = Task(self, steps)
        self._tasks.append(task)
        self.kernel.after(0, task.resume)

    def end(self) -> None:
        """This life is over, wherever its tasks stand."""
        self.up = False
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.close()

    def restart_later(self, start: Callable[[], None]) -> None:
        """As a supervisor does it: once, however often the process ended meanwhile."""
        if self._restarts:
            return
        self._restarts = True

        def restart() -> None:
            self._restarts = False
            start()

        self.kernel.after(self.kernel.random.randint(20, 1500), restart)


class Task:
    """One thread of a process."""

    def __init__(self, process: Process, steps: Steps) -> None:
        self.process = process
        self.alive = True
        self._steps = steps

    def close(self) -> None:
        self.alive = False
        if not self._steps.gi_running:  # it is the one that ended the process: it returns by itself
            self._steps.close()

    def resume(self, value: Any = None, error: Exception | None = None) -> None:
        """Go on to the next yield, once the process is not paused; a dead task stays where it was."""
        if not self.alive:
            return
        if self.process.pause_left_ms:
            self.process.kernel.after(self.process.pause_left_ms, lambda: self.resume(value, error))
            return
        try:
            wanted = self._steps.send(value) if error is None else self._steps.throw(error)
        except StopIteration:
            self.alive = False
            return
        except SimulatedCrashError as crash:
            self.process.kernel.note(f"{self.process.name} ends at {crash}")
            self.process.end()
            return
        if isinstance(wanted, int):
            self.process.kernel.after(wanted, self.resume)
        else:
            wanted(self)


class Signal:
    """What a task waits for, at most so long."""

    def __init__(self, kernel: Kernel) -> None:
        self._kernel = kernel
        self._waiting: list[Callable[[], None]] = []

    def wait(self, timeout_ms: int) -> Callable[[Task], None]:
        def begin(task: Task) -> None:
            woken = False

            def wake() -> None:
                nonlocal woken
                if not woken:
                    woken = True
                    task.resume()

            self._waiting.append(wake)
            self._kernel.after(timeout_ms, wake)

        return begin

    def fire(self) -> None:
        waiting, self._waiting = self._waiting, []
        for wake in waiting:
            self._kernel.after(1, wake)
