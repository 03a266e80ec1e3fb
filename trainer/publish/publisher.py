"""Makes versions of what training changed: take, rules, append, ack.

A version goes through four phases, which all ranks pass at the same steps of training:

  1. take    every rank takes its changed rows by the rules and copies them; training goes on
  2. append  every rank's sender thread encodes and publishes its part; the server makes it durable
  3. commit  when all parts are there, rank 0 commits the manifest: now the version exists
  4. ack     every rank clears what the version carried, and only that

Failpoints `publish.before_take`, `publish.after_take`, ... stand around each of them.

A crash between any two phases repeats work and loses none: nothing is cleared before the ack. After a
failure nobody knows what the server has kept, not even whether it is the same log. The publisher then opens a
new generation and begins it with a full version: no version number ever means two contents. The same way it
goes on after a rollback, an operator's or its own.

While no version gets through, changes wait where they are, in columns over the table's slots
(changed_rows.py). When the server is back, one version brings the newest value of each row, however many
versions were due meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

import msgspec
import structlog

from param_server.client import (
    BlobRef,
    FencedError,
    GapError,
    Manifest,
    ParamServerClients,
    ParamServerError,
    Version,
    blob_ref,
    content_name,
    encode_tensors,
)
from trainer.best_effort import BestEffort
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.failpoints import reach
from trainer.publish.backlog import Backlog
from trainer.publish.changed_rows import Clocks
from trainer.publish.program import dense_weights
from trainer.publish.program_cache import program_of
from trainer.publish.serving_signature import signature_of
from trainer.publish.totals import PublishTotals
from trainer.publish.version_parts import (
    OnItsWay,
    PartReport,
    ProducedTimes,
    describe,
    encode_rows,
    take_rows,
    trace_of,
)
from trainer.recommender import Recommender
from trainer.run.status import VersionTrace, append_trace
from trainer.stream.columns import Position

log = structlog.get_logger()


class Phase(Enum):
    IDLE = "idle"
    REOPENING = "reopening"
    SENDING = "sending"
    COMMITTING = "committing"
    ROLLING_BACK = "rolling_back"


class Publisher:
    """One a rank; its calls are collective and are made at the same step by all ranks."""

    def __init__(
        self,
        recommender: Recommender,
        *,
        client: ParamServerClients,
        config: Config,
        ranks: Ranks,
        trace_path: Path,
        program_path: Path | None = None,
    ) -> None:
        """Args: program_path: where the exported program is kept from start to start; None = nowhere."""
        self._recommender = recommender
        self._client = client
        self._config = config
        self._ranks = ranks
        self._trace_file = BestEffort(trace_path)
        self._program_path = program_path
        self._sender = ThreadPoolExecutor(max_workers=1, thread_name_prefix="publish")
        self._job: Future[Any] | None = None
        self._on_its_way: OnItsWay | None = None
        self._shared: list[tuple[BlobRef, bytes]] = []
        self._shared_sent = False
        self._head: Version | None = None
        """The log's newest version, as far as this rank knows: at the start only rank 0 does."""
        self.must_reopen = False
        """After a failure: the next begin opens a new generation instead of a version."""
        self._num_since_full: int | None = None
        self._trace: VersionTrace | None = None
        self.generation = 0
        self.phase = Phase.IDLE
        self.produced = ProducedTimes()
        self.backlog = Backlog()
        self.totals = PublishTotals()
        self.held_because = ""
        """Why no version is begun, while the quality gate holds."""

    def open(self, *, at_least: int) -> int:
        """Fence older writers and get the generation to write with. Collective.

        Returns: the generation, the same on every rank.
        Raises: ParamServerError if the shard does not answer.
        """
        answer = b""
        if self._ranks.rank == 0:
            self.generation, self._head = self._client.open_generation(at_least)
            answer = msgspec.json.encode(self.generation)
            self._shared = self._program_and_signature()
        self.generation = msgspec.json.decode(self._ranks.gather_bytes(answer)[0], type=int)
        return self.generation

    def _reopen(self) -> None:
        """Rank 0, in the sender thread: a generation above all that was, unless a newer trainer is there."""
        self._client.check_not_fenced(self.generation)
        self.generation, self._head = self._client.open_generation(self.generation)

    def _roll_back(self, version: Version) -> None:
        """Rank 0, in the sender thread: serving gets an older version's content again, as a new version."""
        self._client.check_not_fenced(self.generation)
        made = self._client.rollback(version)
        log.warning("rolled back", to=str(version), by=str(made))

    @contextmanager
    def _fence_checked(self) -> Iterator[None]:
        """In the sender thread: a fence that no newer trainer set is a failure like any other.

        Recovery sets one when the log lost its newest versions. Rank 0 knows by which name it opened its
        generation; to the other ranks it is a failure in any case.
        """
        try:
            yield
        except FencedError as error:
            if self._ranks.rank == 0:
                self._client.check_not_fenced(self.generation)
            raise GapError(f"the log was repaired and takes this generation no more: {error}") from error

    def _program_and_signature(self) -> list[tuple[BlobRef, bytes]]:
        """What every version names and only the first one of a generation sends."""
        program = program_of(self._recommender, config=self._config, path=self._program_path)
        signature = signature_of(self._config.schema, self._recommender.layout)
        return [
            (blob_ref("program", content_name("program", program), program), program),
            (blob_ref("signature", content_name("signature", signature), signature), signature),
        ]

    @property
    def has_news(self) -> bool:
        """Training, or a failure, that no version has been taken for. The same on every rank."""
        return self.must_reopen or self._num_since_full is None or not self.backlog.empty

    @property
    def job_done(self) -> bool:
        """This rank has nothing left to do in the current phase."""
        return self._job is None or self._job.done()

    @property
    def job_failed(self) -> bool:
        return self._job is not None and self._job.done() and self._job.exception() is not None

    def begin(self, *, full: bool, now_ms: int, watermark_ms: int, positions: list[Position]) -> None:
        """Phase 1 and the start of phase 2; after a failure only the way back to it."""
        assert self.phase is Phase.IDLE
        if self.must_reopen:
            self._job = self._sender.submit(self._reopen) if self._ranks.rank == 0 else None
            self.phase = Phase.REOPENING
            return
        reach("publish.before_take")
        since_full = self._num_since_full
        full = full or since_full is None or since_full + 1 >= self._config.publish.full_every
        self._parts = [
            take_rows(
                shard,
                full=full,
                rules=self._config.publish.rules,
                clocks=Clocks(now_s=now_ms // 1000, event_time_s=watermark_ms // 1000),
                row_format=self._config.serving.row_format,
            )
            for shard in self._recommender.shards.values()
        ]
        self.backlog.take()
        sequence = 1
        if self._head is not None and self._head.generation == self.generation:
            sequence = self._head.sequence + 1
        self._on_its_way = OnItsWay(
            version=Version(self.generation, sequence),
            full=full,
            taken_ms=now_ms,
            watermark_ms=watermark_ms,
            positions=positions,
            produced_ms=self.produced.take(),
        )
        dense = (
            encode_tensors(dense_weights(self._recommender.dense), metadata={})
            if self._ranks.rank == 0
            else b""
        )
        reach("publish.after_take")
        self._job = self._sender.submit(self._append, dense)
        self.phase = Phase.SENDING

    def _append(self, dense: bytes) -> list[BlobRef]:
        """Phase 2, in the sender thread: encode and publish this rank's part."""
        assert self._on_its_way is not None
        blobs: list[tuple[BlobRef, bytes]] = []
        for rows in self._parts:
            blobs += encode_rows(
                rows,
                rank=self._ranks.rank,
                num_shards=self._client.num_shards,
                row_format=self._config.serving.row_format,
                bytes_max=self._config.publish.segment_bytes_max,
            )
        references = [reference for reference, _ in blobs]
        if self._ranks.rank == 0:
            reference = blob_ref("dense", "dense", dense)
            blobs.append((reference, dense))
            references += [reference, *(shared for shared, _ in self._shared)]
            if not self._shared_sent:
                blobs += self._shared
        reach("publish.before_append")
        if blobs:
            with self._fence_checked():
                self._client.publish(self._on_its_way.version, blobs)
        reach("publish.after_append")
        return references

    def commit(self, *, now_ms: int) -> None:
        """Phase 3: every part is at the server; rank 0 commits. Collective."""
        assert self.phase is Phase.SENDING
        assert self._job is not None
        assert self._on_its_way is not None
        taken = [part.taken for part in self._parts]
        held_back: dict[str, int] = {}
        for one in taken:
            for reason, num in one.held_back.items():
                held_back[reason] = held_back.get(reason, 0) + num
        report = PartReport(
            blobs=self._job.result(),
            positions=self._on_its_way.positions,
            produced_ms=self._on_its_way.produced_ms,
            produced_ms_newest=self.produced.newest_ms,
            num_rows=sum(len(one.keys_N) for one in taken),
            num_deletes=sum(len(one.deleted_keys_M) for one in taken),
            num_changed=sum(one.num_changed for one in taken),
            held_back=held_back,
        )
        gathered = self._ranks.gather_bytes(msgspec.json.encode(report))
        self._job = None
        if self._ranks.rank == 0:
            reports = [msgspec.json.decode(data, type=PartReport) for data in gathered]
            self._reports = reports
            self._trace = trace_of(self._on_its_way, reports, shared_sent=self._shared_sent)
            manifest = describe(
                self._on_its_way,
                reports,
                parent=self._head,
                schema_hash=self._config.schema.hash(),
                created_ms=now_ms,
            )
            self._job = self._sender.submit(self._commit, manifest)
        self.phase = Phase.COMMITTING

    def _commit(self, manifest: Manifest) -> list[BlobRef]:
        reach("publish.before_commit")
        with self._fence_checked():
            self._client.commit(manifest)
        reach("publish.after_commit")
        return []

    def ack(self, *, now_ms: int) -> Version:
        """Phase 4: the version is durable. Returns: which."""
        assert self.phase is Phase.COMMITTING
        assert self._on_its_way is not None
        reach("publish.before_ack")
        for shard in self._recommender.shards.values():
            shard.changed.ack(rules=self._config.publish.rules, now_s=now_ms // 1000)
        version = self._head = self._on_its_way.version
        self.backlog.ack(now_ms=now_ms)
        self._num_since_full = 0 if self._on_its_way.full else (self._num_since_full or 0) + 1
        self._shared_sent = True
        if self._ranks.rank == 0:
            self._count(now_ms=now_ms)
        self._settle()
        reach("publish.after_ack")
        return version

    def _count(self, *, now_ms: int) -> None:
        trace = self._trace
        assert trace is not None
        trace.committed_ms = now_ms
        self.totals.add(trace, self._reports)
        self._trace_file(lambda path: append_trace(path, trace))

    def hold(self, because: str, *, roll_back_to: Version | None) -> None:
        """The version that is due is not begun: all its changes stay pending. Collective.

        Args: roll_back_to: what serving is to get again meanwhile; None = it keeps what it has.
        """
        assert self.phase is Phase.IDLE
        if not self.held_because:
            log.warning("version held", because=because)
        self.held_because = because
        self.totals.held += 1
        if roll_back_to is not None:
            self._job = self._sender.submit(self._roll_back, roll_back_to) if self._ranks.rank == 0 else None
            self.phase = Phase.ROLLING_BACK

    def release(self) -> None:
        """The gate lets versions pass again."""
        if self.held_because:
            log.info("versions are published again", were_held_because=self.held_because)
        self.held_because = ""

    def abandon(self) -> None:
        """The phase failed somewhere: everything stays pending. Collective.

        Raises: FencedError if a newer trainer has taken over: this one must end.
        """
        error = self._job.exception() if self._job is not None else None
        if error is not None and (isinstance(error, FencedError) or not isinstance(error, ParamServerError)):
            raise error
        if error is not None:
            log.warning("version not published", phase=self.phase.value, error=str(error))
        if self.phase in (Phase.SENDING, Phase.COMMITTING):
            for shard in self._recommender.shards.values():
                shard.changed.abandon()
            assert self._on_its_way is not None
            self.produced.put_back(self._on_its_way.produced_ms)
            self.backlog.abandon()
        self.totals.failed += 1
        self._begin_anew()

    def _begin_anew(self) -> None:
        """What the log holds is not what this publisher did: the next version is a generation's full one."""
        self.must_reopen = True
        self._num_since_full = None
        self._shared_sent = False
        self._settle()

    def _reopened(self) -> None:
        """Every rank learns the new generation. Collective."""
        answer = msgspec.json.encode(self.generation)
        self.generation = msgspec.json.decode(self._ranks.gather_bytes(answer)[0], type=int)
        self.must_reopen = False
        self._settle()

    def _settle(self) -> None:
        self._job = None
        self._on_its_way = None
        self._parts = []
        self.phase = Phase.IDLE

    def advance(self, *, all_done: bool, any_failed: bool, now_ms: int) -> Version | None:
        """Move to the next phase if every rank can. Collective: all ranks pass the same flags.

        Returns: the version that became durable with this, if one did.
        """
        if self.phase is Phase.IDLE or not all_done:
            return None
        if any_failed:
            self.abandon()
        elif self.phase is Phase.REOPENING:
            self._reopened()
        elif self.phase is Phase.ROLLING_BACK:
            self._begin_anew()
        elif self.phase is Phase.SENDING:
            self.commit(now_ms=now_ms)
        else:
            return self.ack(now_ms=now_ms)
        return None

    def wait(self) -> None:
        """Block until this rank's part of the phase is done."""
        if self._job is not None:
            self._job.exception()

    def finish(self, flags: Callable[[], tuple[bool, bool]], *, now_ms: Callable[[], int]) -> Version | None:
        """Bring the version on its way to its end. Collective.

        Args: flags: (all ranks done, any rank failed), agreed between ranks.
        Returns: the version that became durable, if one did.
        """
        durable = None
        while self.phase is not Phase.IDLE:
            self.wait()
            all_done, any_failed = flags()
            durable = self.advance(all_done=all_done, any_failed=any_failed, now_ms=now_ms())
        return durable

    def close(self) -> None:
        self._sender.shutdown(wait=True)
