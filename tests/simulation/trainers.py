"""Trainers: rows that change, and the publishing of what changed in the publisher's phases.

The changed set and the rules are the real ones; training is random rows in few slots, so that ids are evicted
and come back. A trainer that was replaced and does not know it goes on: a zombie.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from feature_eviction import TableRows
from param_server.errors import FencedError, ParamServerError, UnavailableError
from param_server.manifest import BlobRef, Manifest, Version, blob_ref
from param_server.row_blobs import split_by_shard
from param_server.rules_config import RulesConfig
from param_server.shard import Shard
from param_server.staged_blobs import ArrivedBlob
from proto.row_segment import RowSegment, encode
from tests.simulation.kernel import Kernel, Process, SimulatedCrashError, Steps, ViolationError
from tests.simulation.models import SCHEMA_HASH, dense_blob, shared_blobs
from tests.simulation.network import Network
from tests.simulation.oracle import Content, Oracle, Proposal
from tests.simulation.shards import ShardProcess
from tests.simulation.universe import DIM, TABLE, Keys, index_of
from trainer.publish.changed_rows import ChangedRows, Clocks, Taken

NO_KEY = -1
NO_IDS = np.zeros(0, np.int64)
RETRIES_MAX = 2


@dataclass(frozen=True, slots=True)
class TrainerOptions:
    num_slots: int
    rules: RulesConfig
    full_every: int
    publish_ms: int
    num_ranks: int
    """Each rank's rows are blobs of their own."""
    has_model: bool


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """What a restart begins with."""

    keys_C: Keys
    rows_CD: Any
    generation: int

    @classmethod
    def first(cls, num_slots: int) -> Checkpoint:
        return cls(np.full(num_slots, NO_KEY, np.int64), np.zeros((num_slots, DIM), np.float32), 0)


@dataclass(slots=True)
class _Version:
    """On its way, from take to ack."""

    manifest: Manifest
    blobs: dict[int, list[ArrivedBlob]] = field(default_factory=dict)


class TrainerProcess(Process):
    """One life of a trainer; the next one is another object."""

    def __init__(
        self,
        kernel: Kernel,
        *,
        number: int,
        options: TrainerOptions,
        checkpoint: Checkpoint,
        shards: list[ShardProcess],
        network: Network,
        oracle: Oracle,
        changed_rows: type[ChangedRows] = ChangedRows,
    ) -> None:
        super().__init__(kernel, f"trainer-{number}")
        self.training = True
        self.crash_rate = 0.0
        """Of each numbered step of a publish."""
        self.final = False
        """The next version is full and the last."""
        self.finished = False
        self.checkpoint = checkpoint
        self.num_failed = 0
        self._options = options
        self._shards = shards
        self._network = network
        self._oracle = oracle
        self._keys_C = checkpoint.keys_C.copy()
        self._rows_CD = checkpoint.rows_CD.copy()
        self._slots = {int(key): slot for slot, key in enumerate(self._keys_C) if key != NO_KEY}
        self._free = [slot for slot, key in enumerate(self._keys_C) if key == NO_KEY]
        self._values = np.random.Generator(np.random.PCG64(kernel.random.getrandbits(64)))
        self._changed = changed_rows(options.num_slots)
        self._generation = checkpoint.generation
        self._head: Version | None = None
        self._must_reopen = True
        self._generation_is_open = False
        self._num_since_full: int | None = None
        self._bias = 0.0
        self._shared = shared_blobs(number)
        self._shared_sent = False
        """The log has the program and the signature."""

    def start(self) -> None:
        self.up = True
        self.kernel.note(f"{self.name} is up")
        self.spawn(self._train())
        self.spawn(self._publish_always())

    @property
    def content(self) -> Content:
        """The rows as they are now: what serving must become."""
        content = Content.empty(self._oracle.num_ids)
        present_U, rows_UD = content.present_U, content.rows_UD
        used_C = self._keys_C != NO_KEY
        at = index_of(self._keys_C[used_C])
        present_U[at], rows_UD[at] = True, self._rows_CD[used_C]
        return Content(present_U, rows_UD, self._bias if self._options.has_model else None)

    def save(self) -> None:
        self.checkpoint = Checkpoint(self._keys_C.copy(), self._rows_CD.copy(), self._generation)

    def _train(self) -> Steps:
        choose = self.kernel.random
        while self.training:
            num = choose.randint(1, 6)
            # Low ids often, high ids seldom, so that some rows wait for more updates and some leave.
            drawn = sorted({int(self._oracle.num_ids * choose.random() ** 2) for _ in range(num)})
            # An id may have taken the slot of one before it in the batch: distinct slots are touched once.
            slots_N = np.unique([self._slot_of(key) for key in self._oracle.keys_U[drawn].tolist()])
            self._rows_CD[slots_N] = self._values.standard_normal((len(slots_N), DIM), np.float32)
            self._changed.touch(slots_N)
            self._bias = float(self._values.standard_normal(dtype=np.float32))
            if choose.random() < 0.05:
                self._evict(int(slots_N[0]))
            yield choose.randint(20, 120)

    def _slot_of(self, key: int) -> int:
        slot = self._slots.get(key)
        if slot is None:
            if not self._free:
                self._evict(self.kernel.random.randrange(len(self._keys_C)))
            slot = self._slots[key] = self._free.pop()
            self._keys_C[slot] = key
        return slot

    def _evict(self, slot: int) -> None:
        key = int(self._keys_C[slot])
        self._changed.evict(np.array([key]), np.array([slot]))
        del self._slots[key]
        self._free.append(slot)
        self._keys_C[slot] = NO_KEY
        self._rows_CD[slot] = 0.0

    def _publish_always(self) -> Steps:
        """The loop of a trainer, as far as it publishes; a fenced one ends."""
        while not self.finished:
            try:
                if self._must_reopen:
                    yield from self._open(first=not self._generation_is_open)
                else:
                    yield from self._publish()
            except FencedError as error:
                self.kernel.note(f"{self.name} is over: {error}")
                self.end()
                return
            except ParamServerError as error:
                self.kernel.note(f"{self.name}: not published: {type(error).__name__}: {error}")
                if not self._generation_is_open:
                    self.end()  # it could not begin; its supervisor starts it again
                    return
                self._abandon()
            yield self.kernel.random.randint(1, 2 * self._options.publish_ms)

    def _open(self, *, first: bool) -> Steps:
        """A generation above all that was, unless a newer trainer is there."""
        if not first:
            state = yield from self._call(self._shards[0], lambda shard: shard.status(), what="status")
            if state.fenced_generation > self._generation and state.fenced_by != self.name:
                raise FencedError(f"generation {state.fenced_generation} has been opened")
        at_least = self._generation

        def open_at(shard: Shard) -> tuple[int, Version | None]:
            return shard.open_generation(at_least, writer=self.name)

        generation, head = yield from self._call(self._shards[0], open_at, what="open")
        for server in self._shards[1:]:
            yield from self._call(server, open_at, what="open")
        self._generation, self._head = generation, head
        self._must_reopen, self._generation_is_open = False, True
        self.kernel.note(f"{self.name} writes generation {generation} after {head}")

    def _publish(self) -> Steps:
        """The phases of a version; `_step` is where the process may end.

        1. take    the changed rows by the rules; nothing is cleared
        2. append  every shard makes its part durable
        3. commit  every shard but 0 prepares, shard 0 creates the manifest, the others take it over
        4. ack     what the version carried is cleared, and only that
        """
        self._step("before take")
        full = (
            self.final or self._num_since_full is None or self._num_since_full + 1 >= self._options.full_every
        )
        final = self.final
        taken = self._take(full=full)
        self._check_taken(taken)
        on_its_way = self._describe(taken)
        self._step("after take")
        for number, blobs in sorted(on_its_way.blobs.items()):
            yield from self._call(
                self._shards[number], lambda shard, blobs=blobs: shard.publish(blobs), what="publish"
            )
            self._step("after append")
        manifest = on_its_way.manifest
        yield from self._commit(manifest)
        self._step("before ack")
        self._oracle.note_acked(manifest.version)
        self._changed.ack(rules=self._options.rules, now_s=self.kernel.now_ms // 1000)
        self._head = manifest.version
        self._shared_sent = True
        self._num_since_full = 0 if full else (self._num_since_full or 0) + 1
        self.kernel.note(f"{self.name}: {manifest.version} is acknowledged")
        self._check_pending(manifest.version)
        self.finished = final
        self._step("after ack")

    def _commit(self, manifest: Manifest) -> Steps:
        places: dict[str, BlobRef] = {}
        for server in self._shards[1:]:
            blobs = yield from self._call(
                server, lambda shard: shard.prepare_part(manifest), what=f"prepare {manifest.version}"
            )
            places.update({blob.name: blob for blob in blobs})
        self._step("before commit")
        placed = _replaced(manifest, places)
        yield from self._call(
            self._shards[0], lambda shard: shard.commit(placed), what=f"commit {manifest.version}"
        )
        self._step("after commit")
        for server in self._shards[1:]:
            try:
                yield from self._call(
                    server, lambda shard: shard.commit(manifest), what=f"take over {manifest.version}"
                )
            except UnavailableError:
                continue  # it takes over by itself

    def _take(self, *, full: bool) -> Taken:
        if full:
            return self._changed.take_full(self._rows_of(np.flatnonzero(self._keys_C != NO_KEY)))
        now_s = self.kernel.now_ms // 1000
        clocks = Clocks(now_s=now_s, event_time_s=now_s)
        return self._changed.take(self._rows_of, rules=self._options.rules, clocks=clocks)

    def _rows_of(self, slots_N: npt.NDArray[np.int64]) -> TableRows:
        """What an id table knows of slots; scores and sightings are the id table's own business here."""
        num = len(slots_N)
        return TableRows(
            keys_N=self._keys_C[slots_N],
            slots_N=slots_N,
            scores_N=np.zeros(num, np.float32),
            last_seen_s_N=np.zeros(num, np.int64),
            updates_N=np.zeros(num, np.uint32),
        )

    def _describe(self, taken: Taken) -> _Version:
        """The version and its blobs, by rank and shard; the oracle learns what it is to contain."""
        sequence = 1
        if self._head is not None and self._head.generation == self._generation:
            sequence = self._head.sequence + 1
        version = Version(self._generation, sequence)
        rows_ND = self._rows_CD[taken.slots_N].copy()
        references: list[BlobRef] = []
        blobs: dict[int, list[ArrivedBlob]] = {}
        num_ranks = self._options.num_ranks
        for rank in range(num_ranks):
            mine_N, mine_M = taken.keys_N % num_ranks == rank, taken.deleted_keys_M % num_ranks == rank
            segment = RowSegment(TABLE, taken.keys_N[mine_N], rows_ND[mine_N], taken.deleted_keys_M[mine_M])
            for number, piece in split_by_shard(segment, num_shards=len(self._shards)):
                if not len(piece) and not len(piece.deleted_ids_M) and not taken.full:
                    continue
                data = encode(piece, row_format="float32")
                name = f"{TABLE}-rank{rank}-shard{number}"
                counts = {"num_rows": len(piece), "num_deletes": len(piece.deleted_ids_M)}
                references.append(blob_ref("rows", name, data, table=TABLE, shard=number, **counts))
                blobs.setdefault(number, []).append(ArrivedBlob(version, "rows", name, data))
        if self._options.has_model:
            self._add_model(version, references, blobs.setdefault(0, []))
        manifest = Manifest(
            version=version,
            parent=self._head,
            kind="full" if taken.full else "delta",
            blobs=tuple(references),
            schema_hash=SCHEMA_HASH,
            watermark_ms=self.kernel.now_ms,
            produced_ms_newest=self.kernel.now_ms,
            created_ms=self.kernel.now_ms,
        )
        said = self._bias if self._options.has_model else None
        self._oracle.propose(
            manifest, Proposal(taken.full, taken.keys_N, rows_ND, taken.deleted_keys_M, said)
        )
        return _Version(manifest, blobs)

    def _add_model(self, version: Version, references: list[BlobRef], blobs: list[ArrivedBlob]) -> None:
        """Every version names program and signature; only the first after a failure brings them."""
        sent = [dense_blob(self._bias)]
        if self._shared_sent:
            references += [reference for reference, _ in self._shared]
        else:
            sent += self._shared
        for reference, data in sent:
            references.append(reference)
            blobs.append(ArrivedBlob(version, reference.kind, reference.name, data))

    def _abandon(self) -> None:
        """Nobody knows what the server has kept: everything stays pending, and a full version comes next."""
        self._changed.abandon()
        self._must_reopen = True
        self._num_since_full = None
        self._shared_sent = False
        self.num_failed += 1

    def _call(self, server: ShardProcess, work: Callable[[Shard], Any], *, what: str) -> Steps:
        """One call and perhaps the same one again: all but `open` may be repeated with the same bytes."""
        for attempt in range(RETRIES_MAX + 1):
            try:
                return (yield self._network.call(self, server, server.handle(work), what=what))
            except UnavailableError:
                if what in ("open", "status") or attempt == RETRIES_MAX or self.kernel.chance(0.5):
                    raise
        raise AssertionError("unreachable")

    def _step(self, name: str) -> None:
        if self.kernel.chance(self.crash_rate):
            raise SimulatedCrashError(name)

    def _check_taken(self, taken: Taken) -> None:
        """Every changed row is sent or held back with a counted reason; the set is bounded."""
        held_back = sum(taken.held_back.values())
        if not taken.full and len(taken.keys_N) + held_back != taken.num_changed:
            raise ViolationError(
                f"{self.name}: {taken.num_changed} rows changed, {len(taken.keys_N)} go and {held_back} wait"
            )
        if self._changed.num_pending > self._options.num_slots + 2 * self._oracle.num_ids:
            raise ViolationError(f"{self.name}: {self._changed.num_pending} changes are pending")

    def _check_pending(self, version: Version) -> None:
        """What serving does not have as the trainer has it is pending, as a changed row or as a delete."""
        serving = self._oracle.contents[version]
        differing_U = self.content.differing_U(serving)
        pending_U = np.zeros(self._oracle.num_ids, np.bool_)
        slots = np.flatnonzero(self._changed._updates_C)
        pending_U[index_of(self._keys_C[slots])] = True
        deleted = [*self._changed._deleted_keys, *self._changed._deleted_since_take]
        pending_U[index_of(np.array(deleted, np.int64))] = True
        lost_U = differing_U & ~pending_U
        if lost_U.any():
            raise ViolationError(
                f"{self.name}: after version {version} was acknowledged, id {int(lost_U.argmax())} differs "
                "between trainer and serving and is not pending"
            )


def _replaced(manifest: Manifest, places: dict[str, BlobRef]) -> Manifest:
    import msgspec

    blobs = tuple(places.get(blob.name, blob) if blob.shard else blob for blob in manifest.blobs)
    return msgspec.structs.replace(manifest, blobs=blobs)
