"""The network: calls and streams between processes, late, lost, twice, out of order, damaged, or cut off.

A call is executed at most as often as it arrives; that its caller sees no answer says nothing about that. A
stream keeps its order as TCP does, but may end anywhere; damage to it stands for what proxies and bugs do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from param_server.errors import ParamServerError, UnavailableError
from proto import param_server_pb2
from tests.simulation.kernel import Kernel, Process, SimulatedCrashError, Task

FAST_MS, SLOW_MS = 3, 900
TIMEOUT_MS = 700

Parts = list[param_server_pb2.VersionPart]


@dataclass(slots=True)
class NetworkFaults:
    drop_rate: float = 0.0
    duplicate_rate: float = 0.0
    slow_rate: float = 0.0
    """Of messages that arrive after others which were sent later, or after the caller gave up."""
    damage_rate: float = 0.0
    """Of versions in a stream."""


class Network:
    """Between processes by name; a cut link carries nothing in one direction."""

    def __init__(self, kernel: Kernel) -> None:
        self.faults = NetworkFaults()
        self.num_lost = 0
        self.num_doubled = 0
        self.num_damaged = 0
        self._kernel = kernel
        self._cut: set[tuple[str, str]] = set()

    def cut(self, one: str, other: str) -> None:
        self._cut.add((one, other))

    def heal(self) -> None:
        self._cut.clear()

    def reaches(self, one: Process, other: Process) -> bool:
        return (one.name, other.name) not in self._cut

    def delay_ms(self) -> int:
        slow = self._kernel.chance(self.faults.slow_rate)
        return self._kernel.random.randint(1, SLOW_MS if slow else FAST_MS)

    def send(self, one: Process, other: Process, arrive: Callable[[], None]) -> None:
        """Zero, one or two arrivals."""
        copies = 1
        if not self.reaches(one, other) or self._kernel.chance(self.faults.drop_rate):
            copies = 0
            self.num_lost += 1
        elif self._kernel.chance(self.faults.duplicate_rate):
            copies = 2
            self.num_doubled += 1
        for _ in range(copies):
            self._kernel.after(self.delay_ms(), arrive)

    def call(
        self, caller: Process, server: Process, handle: Callable[[], Any], *, what: str
    ) -> Callable[[Task], None]:
        """To be yielded by a task: `handle` runs at the server, and its result or error comes back.

        A call without an answer ends with UnavailableError.
        """

        def begin(task: Task) -> None:
            answered = False

            def answer(value: Any, error: Exception | None) -> None:
                nonlocal answered
                if not answered:
                    answered = True
                    task.resume(value, error)

            def arrive() -> None:
                if not server.up:
                    return
                if server.pause_left_ms:
                    self._kernel.after(server.pause_left_ms, arrive)
                    return
                value, error = None, None
                try:
                    value = handle()
                except ParamServerError as raised:
                    error = raised
                except SimulatedCrashError as crash:
                    self._kernel.note(f"{server.name} ends inside {what}, at {crash}")
                    server.end()
                    return
                outcome = "done" if error is None else type(error).__name__
                self._kernel.note(f"{caller.name} -> {server.name}: {what}: {outcome}")
                self.send(server, caller, lambda: answer(value, error))

            self.send(caller, server, arrive)
            late = UnavailableError(f"{server.name}: no answer to {what} after {TIMEOUT_MS} ms")
            self._kernel.after(TIMEOUT_MS, lambda: answer(None, late))

        return begin

    def damaged(self, parts: Parts) -> Parts:
        """One version of a stream, perhaps without, with twice, with swapped or with flipped parts."""
        if not self._kernel.chance(self.faults.damage_rate):
            return parts
        self.num_damaged += 1
        choose = self._kernel.random
        index = choose.randrange(len(parts))
        kind = choose.choice(("lose all", "lose one", "double", "swap", "flip"))
        if kind == "lose all":
            return []
        if kind == "lose one":
            return parts[:index] + parts[index + 1 :]
        if kind == "double":
            return parts[: index + 1] + parts[index:]
        if kind == "swap":
            other = choose.randrange(len(parts))
            swapped = list(parts)
            swapped[index], swapped[other] = swapped[other], swapped[index]
            return swapped
        return [*parts[:index], self._flipped(parts[index]), *parts[index + 1 :]]

    def _flipped(self, part: param_server_pb2.VersionPart) -> param_server_pb2.VersionPart:
        copy = param_server_pb2.VersionPart()
        copy.CopyFrom(part)
        inside = copy.manifest if copy.WhichOneof("part") == "manifest" else copy.blob
        if copy.WhichOneof("part") == "end":
            copy.end.sequence += 1
        else:
            data = bytearray(inside.data)
            data[self._kernel.random.randrange(len(data))] ^= 1 << self._kernel.random.randrange(8)
            inside.data = bytes(data)
        return copy
