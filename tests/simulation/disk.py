"""A disk in memory that loses, tears, rots, fills up and refuses, as its seed says; implements stores.Store.

All shards share one disk; each has its own store there, so a power loss at one of them takes what that one
had not synced and nothing of the others. What the disk keeps is what the contract of stores.py promises, and
no more:

- bytes of a segment that were not synced are cut off at any length after a power loss, or come back as zeros
- a create or replace that failed may have happened, is then visible, and is undone by a power loss
- deletes are undone by a power loss, newest first, as far back as the last durable change
- a failed sync may have written anything; the segment takes nothing more
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from param_server.errors import LogError, StoreExistsError, StoreMissingError
from param_server.stores import check_name
from tests.simulation.kernel import SimulatedCrashError

NO_SPACE = "No space left on device"


@dataclass(slots=True)
class DiskFaults:
    """What goes wrong from now on; all of it can be switched off."""

    full: bool = False
    error_rate: float = 0.0
    """Of calls that change something."""
    crash_after: dict[str, int] = field(default_factory=dict)
    """Owner -> calls until its process ends inside one."""


@dataclass(slots=True)
class _Object:
    data: bytearray
    owner: str
    durable_bytes: int


class SimulatedDisk:
    """The objects of all stores, and what a power loss would leave of them."""

    def __init__(self, seed: int) -> None:
        self.faults = DiskFaults()
        self.on_change: Callable[[str, bytes, bool], None] = lambda name, data, durable: None
        """Told of every whole object that became visible: name, data, and whether durably."""
        self.on_undo: Callable[[str, bytes], None] = lambda name, data: None
        """Told of every whole object that a power loss took back."""
        self.num_flips = 0
        self.num_torn = 0
        self.num_undone = 0
        self.num_errors = 0
        self._random = random.Random(seed)
        self._objects: dict[str, _Object] = {}
        self._aside: dict[str, bytes] = {}
        self._undo: dict[str, list[tuple[str, _Object | None]]] = {}
        """Owner -> (name, the object before) of changes that a power loss may take back, oldest first."""
        self._mutex = threading.RLock()

    @property
    def num_objects(self) -> int:
        return len(self._objects)

    @property
    def num_aside(self) -> int:
        """Damaged objects that a human will look at."""
        return len(self._aside)

    @property
    def num_bytes(self) -> int:
        return sum(len(one.data) for one in self._objects.values())

    def lose_power(self, owner: str) -> None:
        """What this owner had not made durable is lost: all, a part, or none of it."""
        for one in self._objects.values():
            if one.owner == owner and one.durable_bytes < len(one.data):
                self._tear(one)
        changes = self._undo.pop(owner, [])
        kept = self._random.randint(0, len(changes))
        for name, before in reversed(changes[kept:]):
            self.num_undone += 1
            if before is None:
                gone = self._objects.pop(name, None)
                if gone is not None:
                    self.on_undo(name, bytes(gone.data))
            else:
                self._objects[name] = before

    def keep_all(self, owner: str) -> None:
        """The process ended and the machine did not: the system still writes everything."""
        for one in self._objects.values():
            if one.owner == owner:
                one.durable_bytes = len(one.data)
        self._undo.pop(owner, None)

    def flip_bit(self, prefix: str) -> str:
        """Rot in one object at rest; returns its name, "" if there is none."""
        names = [name for name, one in self._objects.items() if name.startswith(prefix) and one.durable_bytes]
        if not names:
            return ""
        name = self._random.choice(sorted(names))
        one = self._objects[name]
        one.data[self._random.randrange(one.durable_bytes)] ^= 1 << self._random.randrange(8)
        self.num_flips += 1
        return name

    def _tear(self, one: _Object) -> None:
        self.num_torn += 1
        del one.data[self._random.randint(one.durable_bytes, len(one.data)) :]
        if self._random.random() < 0.5 and one.durable_bytes < len(one.data):
            # The size arrived and a page before it did not.
            start = self._random.randrange(one.durable_bytes, len(one.data))
            stop = self._random.randint(start, len(one.data))
            one.data[start:stop] = bytes(stop - start)
        one.durable_bytes = len(one.data)


class SimulatedStore:
    """One owner's view of the disk."""

    def __init__(self, disk: SimulatedDisk, *, owner: str) -> None:
        self._disk = disk
        self._owner = owner

    def create(self, name: str, data: bytes) -> None:
        with self._disk._mutex:
            self._check(name)
            if name in self._disk._objects:
                raise StoreExistsError(f"object {name}: it is there already")
            self._put(name, data)

    def replace(self, name: str, data: bytes) -> None:
        with self._disk._mutex:
            self._check(name)
            self._put(name, data)

    def open_segment(self, name: str) -> SimulatedSegment:
        with self._disk._mutex:
            self._check(name)
            if name in self._disk._objects:
                raise StoreExistsError(f"object {name}: it is there already")
            self._may_fail(name)
            one = _Object(bytearray(), self._owner, 0)
            self._disk._objects[name] = one
            self._names_are_durable()
            return SimulatedSegment(self, one, name=name)

    def read(self, name: str, *, start: int = 0, num_bytes: int | None = None) -> bytes:
        data = self._found(name).data
        return bytes(data[start : None if num_bytes is None else start + num_bytes])

    def size(self, name: str) -> int:
        return len(self._found(name).data)

    def list(self, prefix: str) -> list[str]:
        return sorted(name for name in self._disk._objects if name.startswith(prefix))

    def delete(self, name: str) -> None:
        with self._disk._mutex:
            self._check(name)
            self._may_fail(name, needs_room=False)
            before = self._disk._objects.pop(name, None)
            if before is not None:
                self._disk._undo.setdefault(self._owner, []).append((name, before))

    def close(self) -> None:
        """Nothing is held."""

    def set_aside(self, name: str) -> None:
        with self._disk._mutex:
            found = self._found(name)
            self._may_fail(name, needs_room=False)
            self._disk._aside[name] = bytes(found.data)
            del self._disk._objects[name]
            self._names_are_durable()

    def _put(self, name: str, data: bytes) -> None:
        """Whole and durable; after an error it may be there all the same, and not durably."""
        before = self._disk._objects.get(name)
        made = _Object(bytearray(data), self._owner, len(data))
        try:
            self._may_fail(name)
        except (LogError, SimulatedCrashError):
            if not self._disk.faults.full and self._disk._random.random() < 0.5:
                self._disk._objects[name] = made
                self._disk._undo.setdefault(self._owner, []).append((name, before))
                self._disk.on_change(name, data, False)
            raise
        self._disk._objects[name] = made
        self._names_are_durable()
        self._disk.on_change(name, data, True)

    def _names_are_durable(self) -> None:
        """The journal of a file system is written in order: one durable change takes those before along."""
        self._disk._undo.pop(self._owner, None)

    def _found(self, name: str) -> _Object:
        self._check(name)
        try:
            return self._disk._objects[name]
        except KeyError:
            raise StoreMissingError(f"object {name}: it is not in the simulated store") from None

    def _check(self, name: str) -> None:
        check_name(name)

    def _may_fail(self, name: str, *, needs_room: bool = True) -> None:
        """Every call that changes something passes here."""
        disk, faults = self._disk, self._disk.faults
        left = faults.crash_after.get(self._owner)
        if left is not None:
            faults.crash_after[self._owner] = left - 1
            if left <= 0:
                del faults.crash_after[self._owner]
                raise SimulatedCrashError(name)
        if faults.full and needs_room:
            disk.num_errors += 1
            raise LogError(f"object {name}: {NO_SPACE}")
        if faults.error_rate and disk._random.random() < faults.error_rate:
            disk.num_errors += 1
            raise LogError(f"object {name}: Input/output error")


class SimulatedSegment:
    """Implements stores.SegmentWriter."""

    def __init__(self, store: SimulatedStore, one: _Object, *, name: str) -> None:
        self._store = store
        self._object = one
        self._name = name
        self._num_bytes = 0
        self._failed = ""

    def append(self, *pieces: bytes) -> int:
        with self._store._disk._mutex:
            self._check()
            start, data = self._num_bytes, b"".join(pieces)
            try:
                self._store._may_fail(self._name)
            except (LogError, SimulatedCrashError):
                # A part of it may have been written; the next append begins at the same place.
                self._object.data[start:] = data[: self._store._disk._random.randint(0, len(data))]
                raise
            self._object.data[start:] = data
            self._num_bytes += len(data)
            return start

    def sync(self) -> None:
        with self._store._disk._mutex:
            self._check()
            if self._object.durable_bytes >= self._num_bytes:
                return
            try:
                self._store._may_fail(self._name)
            except LogError as error:
                self._failed = str(error)
                raise
            self._object.durable_bytes = self._num_bytes

    def close(self) -> None:
        self._failed = self._failed or "closed"

    def _check(self) -> None:
        if self._failed:
            raise LogError(f"object {self._name}: it takes nothing more ({self._failed})")
