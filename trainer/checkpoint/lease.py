"""One writer a checkpoint directory: a lease with a number that only grows.

Each run creates `lease/<generation>.json`, one above all there were; who creates it has it. A run that finds
a higher number than its own has been taken over: it must not commit any more. A pause between that look and
the commit cannot be closed by a store without transactions, so the generation is also part of every
checkpoint's name and a later lease's checkpoints count as newer: what a fenced run slips in is never
preferred to its successor's.

Where the store has locks (a local directory) the lock decides and a killed run's lease is free at once.
Elsewhere a lease that was not given back keeps others out until it is `lease_s` old, by the clocks of both.
"""

from __future__ import annotations

import os
import re
import socket
from typing import IO

import msgspec

from trainer.checkpoint.folders import parse_folder
from trainer.checkpoint.store import Store
from trainer.errors import CheckpointError, LeaseLostError

FOLDER = "lease"
_NAME = re.compile(r"([0-9]{6,9})\.json", re.ASCII)


class LeaseRecord(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a lease file says."""

    generation: int
    holder: str
    renewed_ms: int
    lease_s: int
    released: bool = False


class Lease:
    """Held from acquire_lease to release."""

    def __init__(self, store: Store, record: LeaseRecord, *, lock: IO[bytes] | None) -> None:
        self._store = store
        self._record = record
        self._lock = lock

    @property
    def generation(self) -> int:
        return self._record.generation

    def check(self) -> None:
        """Raises: LeaseLostError if another run has taken over."""
        newest = max(_generations(self._store), default=0)
        if newest > self.generation:
            raise LeaseLostError(
                f"{self._store.root}: another run has taken over with lease {newest}, this run's is "
                f"{self.generation}. This run saves no more and ends; the other goes on"
            )

    def renew(self, *, now_ms: int) -> None:
        """Raises: LeaseLostError if another run has taken over."""
        self.check()
        self._record.renewed_ms = now_ms
        self._store.write(_file_name(self.generation), msgspec.json.encode(self._record))

    def release(self, *, now_ms: int) -> None:
        """Let others in at once. Raises: LeaseLostError, StoreError; the lock is free in any case."""
        try:
            self._record.released = True
            self.renew(now_ms=now_ms)
        finally:
            if self._lock is not None:
                self._lock.close()


def acquire_lease(store: Store, *, lease_s: int, now_ms: int) -> Lease:
    """Become the one writer of a directory.

    Raises: CheckpointError if another run is it.
    """
    try:
        lock = store.lock()
    except BlockingIOError as error:
        raise CheckpointError(
            f"{store.root}: another trainer uses this checkpoint directory; stop it, or choose another"
        ) from error
    try:
        record = _claim(store, lease_s=lease_s, now_ms=now_ms)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    return Lease(store, record, lock=lock)


def _claim(store: Store, *, lease_s: int, now_ms: int) -> LeaseRecord:
    generations = _generations(store)
    newest = max(generations, default=0)
    if newest and not store.has_locks:
        _refuse_if_held(store, newest, now_ms=now_ms)
    # Checkpoints count too: should the lease folder be lost, a number is still never used twice.
    folders = [folder.lease for name in store.names() if (folder := parse_folder(name)) is not None]
    record = LeaseRecord(
        generation=max([newest, *folders]) + 1,
        holder=f"process {os.getpid()} on {socket.gethostname()}",
        renewed_ms=now_ms,
        lease_s=lease_s,
    )
    try:
        store.create(_file_name(record.generation), msgspec.json.encode(record))
    except FileExistsError as error:
        raise CheckpointError(
            f"{store.root}: another run took lease {record.generation} at the same moment; "
            "stop it, or choose another directory"
        ) from error
    for generation in generations:
        store.remove(_file_name(generation))
    return record


def _refuse_if_held(store: Store, generation: int, *, now_ms: int) -> None:
    name = _file_name(generation)
    try:
        record = msgspec.json.decode(store.read(name), type=LeaseRecord)
    except (FileNotFoundError, msgspec.MsgspecError) as error:
        raise CheckpointError(
            f"{store.root}/{name}: is no lease that can be read ({error}). If no run uses the directory, "
            "delete this file and start again"
        ) from error
    age_s = (now_ms - record.renewed_ms) / 1000
    if record.released or age_s >= record.lease_s:
        return
    raise CheckpointError(
        f"{store.root}: another trainer uses this checkpoint directory: {record.holder}, lease "
        f"{record.generation}, renewed {age_s:.0f} s ago. Stop it or choose another directory; if it is "
        f"dead, a start in {record.lease_s - age_s:.0f} s takes it over"
    )


def _generations(store: Store) -> list[int]:
    found = (_NAME.fullmatch(name) for name in store.names(FOLDER))
    return [int(match.group(1)) for match in found if match is not None]


def _file_name(generation: int) -> str:
    return f"{FOLDER}/{generation:06d}.json"
