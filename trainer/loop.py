"""The training loop of one rank: fetch, agree, train, judge, publish, checkpoint, stop.

Ranks decide everything together: before each step they exchange one small vector, so that stopping,
checkpointing and the phases of publishing happen at the same step everywhere. The loop reads the
clocks; everything below it takes the time as an argument.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import structlog

from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import FreshetError
from trainer.failpoints import reach
from trainer.ledger import Ledger
from trainer.metrics import QualityWindow
from trainer.publisher import Phase, Publisher
from trainer.recommender import Recommender
from trainer.run.status import RunState, write_status
from trainer.status_report import StatusReporter, sum_by_key
from trainer.stream.columns import Impressions
from trainer.stream.slicing import concat_impressions, empty_impressions, slice_impressions
from trainer.stream.source import KafkaSource
from trainer.verification import VERIFY_IMPRESSIONS, write_verification

log = structlog.get_logger()

STATUS_INTERVAL_S = 0.5


def now_ms() -> int:
    return time.time_ns() // 1_000_000


@dataclass(frozen=True, slots=True)
class LoopPaths:
    """Files through which a run talks with the trainer."""

    status: Path
    drain: Path
    """When this file appears, the trainer trains what the topic holds and ends."""
    verification: Path


@dataclass(slots=True)
class StopSwitch:
    """Set by signal handlers; read once a step."""

    requested: bool = False


@dataclass(frozen=True, slots=True)
class Agreement:
    """What the ranks agreed on before a step."""

    num_impressions: int
    event_time_s: int
    produced_ms_newest: int
    stop: bool
    drained: bool
    publish: bool
    checkpoint: bool
    report: bool
    publish_done: bool
    publish_failed: bool


@dataclass(slots=True)
class Timers:
    """When things were last done, on the monotonic clock; only rank 0's are asked."""

    publish_s: float = field(default_factory=time.monotonic)
    checkpoint_s: float = field(default_factory=time.monotonic)
    status_s: float = 0.0

    def due(self, last_s: float, interval_s: float) -> bool:
        return time.monotonic() - last_s >= interval_s


@dataclass(kw_only=True)
class TrainingLoop:
    """Owns the order of things; each part it drives owns its own state."""

    config: Config
    recommender: Recommender
    source: KafkaSource
    publisher: Publisher | None
    checkpoints: Checkpoints
    window: QualityWindow
    ledger: Ledger | None = None
    """Counts every impression applied, in a run that is checked."""
    progress: Progress
    ranks: Ranks
    paths: LoopPaths
    stop: StopSwitch
    _timers: Timers = field(default_factory=Timers, init=False)
    _recent: deque[Impressions] = field(default_factory=deque, init=False)
    """The newest impressions trained, for the verification at the end."""
    _end_offsets: dict[int, int] | None = field(default=None, init=False)
    """Where each partition ended when the drain was asked for."""

    def __post_init__(self) -> None:
        self._reporter = StatusReporter(self.config, ranks=self.ranks)

    def run(self) -> None:
        """Train until the stream is drained or a stop is asked for; then publish, save and report."""
        if self.publisher is not None:
            self._start_publish(full=True)
        self._report(state="training")
        wait_s = self.config.train.batch_wait_ms / 1000
        while True:
            batch = self.source.poll_batch(self.recommender.batch_rows, timeout_s=wait_s)
            reach("after_fetch")
            impressions = batch.impressions
            self.progress.dead_letters = sum_by_key([self.progress.dead_letters, batch.dead_letters])
            agreed = self._agree(impressions)
            if agreed.num_impressions:
                self._train(impressions, agreed)
            self._housekeeping(agreed)
            if agreed.stop or agreed.drained:
                break
        self._finish(drained=agreed.drained)

    def _agree(self, impressions: Impressions) -> Agreement:
        """Exchange what each rank has, wants and has finished. Collective."""
        publisher = self.publisher
        newest_ms = int(impressions.event_time_ms_N.max()) if len(impressions) else 0
        produced_ms = int(impressions.produced_ms_N.max()) if len(impressions) else 0
        first = self.ranks.rank == 0
        publish_due = (
            first
            and publisher is not None
            and publisher.phase is Phase.IDLE
            and self._timers.due(self._timers.publish_s, self.config.publish.interval_ms / 1000)
        )
        checkpoint_due = first and self._timers.due(
            self._timers.checkpoint_s, self.config.checkpoint.interval_s
        )
        # One message: sums in front, and "all ranks" is "no rank is not".
        sums = self.ranks.sum(
            np.array(
                [
                    len(impressions),
                    self.stop.requested,
                    not self._is_drained(),
                    publish_due,
                    checkpoint_due,
                    first and self._timers.due(self._timers.status_s, STATUS_INTERVAL_S),
                    publisher is not None and not publisher.job_done,
                    publisher is not None and publisher.job_failed,
                ],
                np.int64,
            )
        )
        progress = self.progress
        newest = self.ranks.max(
            np.array(
                [
                    max(newest_ms // 1000, progress.event_time_s),
                    max(produced_ms, progress.produced_ms_newest),
                ],
                np.int64,
            )
        )
        return Agreement(
            num_impressions=int(sums[0]),
            event_time_s=int(newest[0]),
            produced_ms_newest=int(newest[1]),
            stop=bool(sums[1] > 0),
            drained=bool(sums[2] == 0),
            publish=bool(sums[3] > 0),
            checkpoint=bool(sums[4] > 0),
            report=bool(sums[5] > 0),
            publish_done=bool(sums[6] == 0),
            publish_failed=bool(sums[7] > 0),
        )

    def _is_drained(self) -> bool:
        """A drain was asked for, and this rank has handed out all that its partitions held then."""
        if self._end_offsets is None:
            if not self.paths.drain.exists():
                return False
            self._end_offsets = self.source.end_offsets()
        return self.source.drained(self._end_offsets)

    def _train(self, impressions: Impressions, agreed: Agreement) -> None:
        progress = self.progress
        progress.event_time_s = agreed.event_time_s
        progress.produced_ms_newest = agreed.produced_ms_newest
        started_s = time.monotonic()
        scores_NT = self.recommender.train(impressions, now_s=agreed.event_time_s)
        self.window.add(
            scores_NT,
            labels_NT=impressions.labels_NT,
            known_NT=impressions.known_NT,
            domain_N=impressions.domain_N,
            users_N=impressions.user_ids_N,
        )
        if self.ledger is not None:
            self.ledger.add(impressions.request_ids_N)
        reach("after_step")
        progress.step += 1
        progress.impressions_trained += agreed.num_impressions
        self._reporter.count_step(agreed.num_impressions, ended_s=time.monotonic(), started_s=started_s)
        if self.publisher is not None:
            self.publisher.produced.add(impressions.produced_ms_N)
        self._remember(impressions)

    def _remember(self, impressions: Impressions) -> None:
        """Keep the newest impressions for the verification at the end."""
        if len(impressions):
            self._recent.append(impressions)
        while self._recent and sum(map(len, self._recent)) - len(self._recent[0]) >= VERIFY_IMPRESSIONS:
            self._recent.popleft()

    def _housekeeping(self, agreed: Agreement) -> None:
        """What is due between two steps; every rank comes here with the same agreement."""
        publisher = self.publisher
        if publisher is not None:
            publisher.advance(all_done=agreed.publish_done, any_failed=agreed.publish_failed, now_ms=now_ms())
            self.progress.generation = publisher.generation
            if agreed.publish and publisher.phase is Phase.IDLE:
                self._start_publish(full=False)
        if agreed.checkpoint:
            self._save_checkpoint()
        if agreed.report:
            self._report(state="draining" if self._end_offsets is not None else "training")

    def _start_publish(self, *, full: bool) -> None:
        assert self.publisher is not None
        self._timers.publish_s = time.monotonic()
        self.publisher.begin(
            full=full,
            now_ms=now_ms(),
            watermark_ms=self.progress.event_time_s * 1000,
            positions=list(self.source.positions()),
        )

    def _save_checkpoint(self) -> None:
        self._timers.checkpoint_s = time.monotonic()
        self.checkpoints.save(
            self.recommender,
            window=self.window,
            progress=self.progress,
            positions=list(self.source.positions()),
        )
        # Only now may a reader of the group's offsets believe that these impressions are safe.
        self.source.commit(self.source.positions())

    def _finish(self, *, drained: bool) -> None:
        """End with everything saved and published. Collective.

        1. A checkpoint: whatever happens to the rest, a later start goes on from here.
        2. The version on its way comes to its end.
        3. A last full version: whatever the rules held back reaches serving.
        4. After a drain: predictions for the newest impressions, for replicas to be held against.
        Raises: FreshetError if the last version could not be published.
        """
        self._report(state="draining")
        self._save_checkpoint()
        publisher = self.publisher
        published = publisher is None or self._publish_everything(publisher)
        if drained and publisher is not None and published:
            write_verification(
                self.recommender,
                recent=self._verification_impressions(),
                schema=self.config.schema,
                version=publisher.totals.head,
                path=self.paths.verification if self.ranks.rank == 0 else None,
            )
        self._report(state="stopped")
        log.info(
            "stopped",
            step=self.progress.step,
            impressions_trained=self.progress.impressions_trained,
            drained=drained,
            go_on="start again with the same run directory",
        )
        if not published:
            raise FreshetError(
                "the last version could not be published, so serving does not hold all that was trained. "
                "Nothing is lost: the state is saved, and the next start publishes it"
            )

    def _publish_everything(self, publisher: Publisher) -> bool:
        """The version on its way, then a last full one; a server that fails one is not asked again."""
        failed_before = publisher.totals.failed
        publisher.finish(self._publish_flags, now_ms=now_ms)
        # The second attempt only where the first was the way back into a new generation.
        for _ in range(2):
            if publisher.totals.failed > failed_before:
                return False
            reopening = publisher.must_reopen
            self._start_publish(full=True)
            publisher.finish(self._publish_flags, now_ms=now_ms)
            if not reopening:
                break
        return publisher.totals.failed == failed_before

    def _verification_impressions(self) -> list[Impressions]:
        """The newest impressions in pieces of a batch; the same number of pieces on every rank."""
        rows = self.recommender.batch_rows
        joined = concat_impressions(list(self._recent)) if self._recent else None
        num_pieces = -(-VERIFY_IMPRESSIONS // rows)
        empty = empty_impressions(self.config.schema)
        pieces = []
        for index in range(num_pieces):
            piece = (
                slice_impressions(joined, index * rows, (index + 1) * rows) if joined is not None else empty
            )
            pieces.append(piece)
        return pieces

    def _publish_flags(self) -> tuple[bool, bool]:
        assert self.publisher is not None
        sums = self.ranks.sum(np.array([not self.publisher.job_done, self.publisher.job_failed], np.int64))
        return sums[0] == 0, sums[1] > 0

    def _report(self, *, state: RunState) -> None:
        """Write rank 0's status file. Collective: tables are summed over ranks."""
        self._timers.status_s = time.monotonic()
        status = self._reporter.report(
            state,
            recommender=self.recommender,
            source=self.source,
            publisher=self.publisher,
            progress=self.progress,
            window=self.window,
        )
        if self.ranks.rank == 0:
            write_status(self.paths.status, status)
