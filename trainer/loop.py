"""The training loop of one rank: fetch, agree, map, train, judge, publish, checkpoint, stop.

Ranks decide everything together (agreement.py), so that stopping, checkpointing and the phases of publishing
happen at the same step everywhere. While a batch is learned, one other thread maps the ids of the next one,
unless something is due in between: publishing, saving and reporting find no batch mapped ahead. The loop
reads the clocks; everything below it takes the time as an argument.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog

from trainer.agreement import Agreement, BatchFacts, Flags, agree_on_batch, agree_on_flags
from trainer.best_effort import BestEffort
from trainer.checkpoint import Checkpoints, Committed, Progress, SavePhase, StatePart
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import FreshetError
from trainer.failpoints import reach
from trainer.learning_rate import WarmUp
from trainer.ledger import Ledger
from trainer.metrics import QualityWindow
from trainer.publish.publishing import Moment, Publishing
from trainer.recommender import MappedBatch, Recommender
from trainer.run.status import RunState, TrainerStatus, write_status
from trainer.skipped import SkippedBatches
from trainer.source_opening import OpenSource, open_alike
from trainer.status_report import StatusReporter, sum_by_key
from trainer.stop_report import report_stop
from trainer.stream.columns import Position
from trainer.stream.slicing import empty_impressions
from trainer.stream.source import Batch, KafkaSource
from trainer.verification import RecentImpressions, write_verification

log = structlog.get_logger()

STATUS_INTERVAL_S = 0.5
SAY_INTERVAL_S = 10.0
"""Between two lines of the log that say how far it is."""


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class LoopPaths:
    """Files through which a run talks with the trainer."""

    status: Path
    drain: Path
    """When this file appears, the trainer trains what the topic holds and ends."""
    broken_off: Path
    """Where this file is there, a trainer that is told to stop saves its state and leaves at once."""
    verification: Path


@dataclass(slots=True)
class StopSwitch:
    """Set by signal handlers; read once a step."""

    requested: bool = False


@dataclass(slots=True)
class Timers:
    """When things were last done, on the monotonic clock; only rank 0's are asked."""

    checkpoint_s: float = field(default_factory=time.monotonic)
    status_s: float = 0.0
    said_s: float = field(default_factory=time.monotonic)

    def due(self, last_s: float, interval_s: float) -> bool:
        return time.monotonic() - last_s >= interval_s


@dataclass(frozen=True, slots=True)
class Fetched:
    """A step that is agreed on and whose ids are being mapped."""

    batch: Batch
    agreed: Agreement
    mapping: Future[MappedBatch] | None
    """None: no rank has an impression."""


@dataclass(kw_only=True)
class TrainingLoop:
    """Owns the order of things; each part it drives owns its own state."""

    config: Config
    recommender: Recommender
    open_source: OpenSource
    positions: list[Position]
    publishing: Publishing | None
    checkpoints: Checkpoints
    newest_checkpoint: str
    """The one that the run goes on from; empty = it begins."""
    window: QualityWindow
    ledger: Ledger | None
    """Counts every impression applied, in a run that is checked."""
    parts: dict[str, StatePart]
    """What a checkpoint holds beside the recommender: the window, and the ledger."""
    progress: Progress
    warm_up: WarmUp
    ranks: Ranks
    paths: LoopPaths
    stop: StopSwitch
    _timers: Timers = field(default_factory=Timers, init=False)
    _recent: RecentImpressions = field(default_factory=RecentImpressions, init=False)
    """For the verification at the end."""
    _end_offsets: dict[int, int] | None = field(default=None, init=False)
    """Where each partition ended when the drain was asked for."""
    _broken_off: bool = field(default=False, init=False)
    _newest: tuple[int, int] = field(default=(0, 0), init=False)
    """Event time (s) and production time (ms) of the newest impression agreed on."""

    def __post_init__(self) -> None:
        self._reporter = StatusReporter(self.config, ranks=self.ranks)
        self._skipped = SkippedBatches(self.config, progress=self.progress)
        self._status_file = BestEffort(self.paths.status)
        self._newest = (self.progress.event_time_s, self.progress.produced_ms_newest)
        self._mapper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="map")
        self.source = self._open_source(self.positions)
        if self.config.kafka.begin == "newest" and not self.newest_checkpoint:
            # Where it began is known to nobody else, and another start would begin further on.
            self._timers.checkpoint_s = -math.inf

    def _open_source(self, positions: Iterable[Position]) -> KafkaSource:
        """Collective. Raises: StreamError if the ranks do not see one topic with equally many partitions."""
        source = open_alike(
            self.open_source,
            positions,
            topic_id=self.progress.topic_id,
            topic=self.config.kafka.topic,
            ranks=self.ranks,
        )
        self.progress.topic_id = source.topic_id
        return source

    def close(self) -> None:
        """Let go of the broker and the mapping thread."""
        self._mapper.shutdown(wait=True)
        # Taking leave of a broker that has died takes as long as its timeouts; nothing depends on it.
        if not self._broken_off:
            self.source.close()

    def run(self) -> None:
        """Train until the stream is drained or a stop is asked for; then publish, save and report."""
        try:
            self._run()
        except BaseException as error:
            # What was read is ahead of what was trained: only the checkpoint tells where to go on.
            self._say_stop(f"{type(error).__name__}: {error}", positions=())
            raise
        reason = "a stop was asked for" if self.stop.requested else "the stream is drained"
        self._say_stop(reason, positions=self.source.positions())

    def _say_stop(self, reason: str, *, positions: Iterable[Position]) -> None:
        report_stop(reason, progress=self.progress, positions=positions, checkpoint=self.newest_checkpoint)

    def _run(self) -> None:
        if self.publishing is not None:
            self._publish(self.publishing, full=True)
        self._report(state="training")
        wait_s = self.config.train.batch_wait_ms / 1000
        following: Fetched | None = None
        while True:
            current = following if following is not None else self._fetch(wait_s=wait_s)
            following = None
            agreed = current.agreed
            if current.mapping is not None:
                mapped = current.mapping.result()
                if agreed.next_ready and not self._something_is_due(agreed):
                    following = self._fetch(wait_s=0.0)
                self._train(mapped, current)
            self._housekeeping(agreed)
            if agreed.ends:
                break
        self._finish(drained=agreed.drained)

    def _fetch(self, *, wait_s: float) -> Fetched:
        """Agree on the next step, take this rank's part of its batch and begin to map it. Collective."""
        source, strict = self.source, self.config.kafka.order == "strict"
        flags = self._agree_on_flags(wait_s=0.0)
        # The strict order needs every rank's part; in the loose one, nobody waits where a rank has its own.
        if wait_s and (flags.not_ready if strict else not flags.ready):
            flags = self._agree_on_flags(wait_s=wait_s)
        if strict and flags.not_ready:
            batch = Batch(empty_impressions(self.config.schema), spans=(), dead_letters={}, positions=())
        else:
            batch = source.poll_batch(0.0, end_offsets=self._end_offsets)
            self.progress.dead_letters = sum_by_key([self.progress.dead_letters, batch.dead_letters])
        reach("after_fetch")
        impressions = batch.impressions
        event_time_s, produced_ms = self._newest
        facts = BatchFacts(
            num_impressions=len(impressions),
            event_time_s=max(event_time_s, int(impressions.event_time_ms_N.max(initial=0)) // 1000),
            produced_ms_newest=max(produced_ms, int(impressions.produced_ms_N.max(initial=0))),
            next_ready=source.ready(end_offsets=self._end_offsets),
        )
        agreed = agree_on_batch(flags, facts, ranks=self.ranks)
        self._newest = (agreed.event_time_s, agreed.produced_ms_newest)
        mapping = None
        if agreed.num_impressions:
            mapping = self._mapper.submit(
                self.recommender.map, impressions, now_s=agreed.event_time_s, num_rows=agreed.num_rows
            )
        return Fetched(batch, agreed, mapping)

    def _agree_on_flags(self, *, wait_s: float) -> Flags:
        """Collective. Args: wait_s: how long a rank may wait for its part of a batch first."""
        ready = self.source.ready(timeout_s=wait_s, end_offsets=self._end_offsets)
        return agree_on_flags(self._flags(ready=ready), ranks=self.ranks)

    def _flags(self, *, ready: bool) -> Flags:
        """What this rank has and wants."""
        publishing, timers = self.publishing, self._timers
        first = self.ranks.rank == 0
        return Flags(
            ready=ready,
            not_ready=not ready,
            not_drained=not self._is_drained(),
            stop=self.stop.requested,
            publish_due=first and publishing is not None and publishing.due(now_s=time.monotonic()),
            checkpoint_due=first
            and self.checkpoints.phase is SavePhase.IDLE
            and timers.due(timers.checkpoint_s, self.config.checkpoint.interval_s),
            report_due=first and timers.due(timers.status_s, STATUS_INTERVAL_S),
            partitions_grew=self.source.partitions_grew,
            publish_unfinished=publishing is not None and not publishing.publisher.job_done,
            publish_failed=publishing is not None and publishing.publisher.job_failed,
            save_unfinished=not self.checkpoints.job_done,
            save_failed=self.checkpoints.job_failed,
        )

    def _something_is_due(self, agreed: Agreement) -> bool:
        """After this step the state is looked at, or a phase ends: nothing may be mapped ahead."""
        flags, publishing = agreed.flags, self.publishing
        return (
            agreed.ends
            or flags.publish_due
            or flags.checkpoint_due
            or flags.report_due
            or flags.partitions_grew
            or (publishing is not None and not publishing.idle and not flags.publish_unfinished)
            or (self.checkpoints.phase is not SavePhase.IDLE and not flags.save_unfinished)
        )

    def _is_drained(self) -> bool:
        """A drain was asked for, and this rank has handed out all that its partitions held then."""
        if self._end_offsets is None:
            if not self.paths.drain.exists():
                return False
            self._end_offsets = self.source.end_offsets()
        return self.source.drained(self._end_offsets)

    def _train(self, mapped: MappedBatch, fetched: Fetched) -> None:
        progress, impressions, agreed = self.progress, mapped.impressions, fetched.agreed
        progress.event_time_s = agreed.event_time_s
        progress.produced_ms_newest = agreed.produced_ms_newest
        started_s = time.monotonic()
        learned = self.recommender.learn(mapped, dense_rate_share=self.warm_up.share(progress.step))
        progress.step += 1
        if learned.not_finite:
            self._skipped.skip(
                fetched.batch,
                source=self.source,
                num_impressions=agreed.num_impressions,
                not_finite=learned.not_finite,
            )
            return
        self._skipped.learned(agreed.num_impressions)
        self.window.add(
            learned.probabilities_NT,
            labels_NT=impressions.labels_NT,
            known_NT=impressions.known_NT,
            domain_N=impressions.domain_N,
            users_N=impressions.user_ids_N,
        )
        if self.ledger is not None:
            self.ledger.add(impressions.request_ids_N)
        progress.impressions_trained += agreed.num_impressions
        self._reporter.count_step(agreed.num_impressions, ended_s=time.monotonic(), started_s=started_s)
        if self.publishing is not None:
            self.publishing.trained(impressions.produced_ms_N, now_ms=now_ms())
        self._recent.add(impressions)
        reach("after_step")

    def _housekeeping(self, agreed: Agreement) -> None:
        """What is due between two steps; every rank comes here with the same agreement."""
        flags, publishing = agreed.flags, self.publishing
        if publishing is not None:
            publishing.advance(
                all_done=not flags.publish_unfinished, any_failed=flags.publish_failed, now_ms=now_ms()
            )
            self.progress.generation = publishing.publisher.generation
            self.progress.published = publishing.publisher.totals.head or self.progress.published
            if flags.publish_due and publishing.idle:
                self._publish(publishing, full=False)
        self._saved(
            self.checkpoints.advance(all_done=not flags.save_unfinished, any_failed=flags.save_failed)
        )
        if flags.checkpoint_due and self.checkpoints.phase is SavePhase.IDLE:
            self._begin_checkpoint()
        if flags.partitions_grew and not agreed.ends:
            self._reopen_source()
        if flags.report_due:
            self._report(state="draining" if self._end_offsets is not None else "training")

    def _reopen_source(self) -> None:
        """Read on with the partitions that were added. Collective."""
        positions = self.source.positions()
        self.source.close()
        self.source = self._open_source(positions)
        log.info("partitions were added", partitions=[p.partition for p in self.source.positions()])

    def _publish(self, publishing: Publishing, *, full: bool) -> None:
        publishing.begin(self._moment(), full=full, now_s=time.monotonic())

    def _moment(self) -> Moment:
        return Moment(
            now_ms=now_ms(),
            watermark_ms=self.progress.event_time_s * 1000,
            positions=list(self.source.positions()),
        )

    def _begin_checkpoint(self) -> None:
        """Copy the state; it is written while training goes on."""
        self._timers.checkpoint_s = time.monotonic()
        self.checkpoints.begin(
            self.recommender,
            parts=self.parts,
            progress=self.progress,
            positions=list(self.source.positions()),
        )

    def _saved(self, committed: Committed | None) -> None:
        """Only now may a reader of the group's offsets believe that these impressions are safe."""
        if committed is not None:
            self.newest_checkpoint = committed.name
            self.source.commit(committed.positions)

    def _finish(self, *, drained: bool) -> None:
        """End with everything saved and published. Collective.

        1. A checkpoint: whatever happens to the rest, a later start goes on from here.
        2. The version on its way comes to its end.
        3. A last full version: whatever the rules held back reaches serving.
        4. After a drain: predictions for the newest impressions, for replicas to be held against.
        Of a run that is broken off, as shard or broker may have died, only the checkpoint is made.
        Raises: CheckpointError if the state could not be saved, FreshetError if the last version was not
            published.
        """
        self._report(state="draining")
        self._saved(
            self.checkpoints.save(
                self.recommender,
                parts=self.parts,
                progress=self.progress,
                positions=list(self.source.positions()),
            )
        )
        # Any rank that has seen the file speaks for all: the others may have looked too early.
        self._broken_off = bool(self.ranks.sum(np.array([self.paths.broken_off.exists()], np.int64))[0])
        if self._broken_off:
            self._report(state="stopped")
            log.warning("broken off: not published; serving gets what was trained from the next start")
            return
        publishing = self.publishing
        missing = "" if publishing is None else publishing.publish_everything(self._moment(), now_ms=now_ms)
        if drained and publishing is not None and not missing:
            write_verification(
                self.recommender,
                recent=self._recent.pieces(self.recommender.batch_rows, schema=self.config.schema),
                schema=self.config.schema,
                version=publishing.publisher.totals.head,
                path=self.paths.verification if self.ranks.rank == 0 else None,
            )
        self._report(state="stopped")
        if missing:
            raise FreshetError(missing)

    def _report(self, *, state: RunState) -> None:
        """Write rank 0's status file. Collective: tables are summed over ranks."""
        self._timers.status_s = time.monotonic()
        status = self._reporter.report(
            state,
            recommender=self.recommender,
            source=self.source,
            publisher=self.publishing.publisher if self.publishing is not None else None,
            progress=self.progress,
            window=self.window,
            now_ms=now_ms(),
        )
        if self.ranks.rank != 0:
            return
        self._status_file(lambda path: write_status(path, status))
        if self._timers.due(self._timers.said_s, SAY_INTERVAL_S):
            self._timers.said_s = time.monotonic()
            self._say_progress(status)

    @staticmethod
    def _say_progress(status: TrainerStatus) -> None:
        log.info(
            status.state,
            step=status.step,
            impressions_trained=status.impressions_trained,
            samples_per_s=round(status.samples_per_s),
            lag_impressions=status.lag_impressions,
            dead_letters=sum(status.dead_letters.values()),
            version=status.version,
        )
