"""Freshet as a contestant of benchmarks.train_step: the parts of its loop, with everything on.

While a batch is learned another thread maps the next one, by the loop's own rules for when it may not. Ids
are admitted, scored and evicted, reused rows reset, changed rows recorded, predictions judged and reported, a
version goes to a real shard process in every turn, and checkpoints are measured beside it. Left out: Kafka.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from benchmarks.train_step_stream import START_S, popular_keys
from feature_eviction import owner_of
from param_server.client import ParamServerClients, decode_tensors, encode_tensors
from trainer.agreement import Agreement, BatchFacts, Flags, agree_on_batch, agree_on_flags
from trainer.checkpoint import Checkpoints, Committed, Progress, SavePhase
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.loop import STATUS_INTERVAL_S
from trainer.metrics import QualityWindow, joint_qualities
from trainer.publish.publisher import Phase, Publisher
from trainer.recommender import MappedBatch, Recommender
from trainer.status_report import REPORTS_PER_QUALITY, table_status
from trainer.stream.columns import Impressions

FILL_BLOCK = 1 << 17


@dataclass(frozen=True, slots=True)
class _Fetched:
    agreed: Agreement
    mapping: Future[MappedBatch]


class Ours:
    """One rank of a training run, driven through some batches at a time."""

    def __init__(self, config: Config, *, rows: int, ranks: Ranks, directory: Path, compiled: bool) -> None:
        config = replace(config, model=replace(config.model, compile=compiled))
        self.config = config
        self.recommender = Recommender(config, ranks=ranks)
        self._ranks = ranks
        self.window = QualityWindow(
            domains=config.schema.domains,
            tasks=config.schema.task_names,
            window=config.train.metrics_window // ranks.world_size,
        )
        self._progress = Progress()
        self._checkpoints = Checkpoints(str(directory / "checkpoints"), config=config, ranks=ranks)
        self._mapper = ThreadPoolExecutor(max_workers=1, thread_name_prefix="map")
        self._trained_s = self._reported_s = 0.0
        """Seconds inside `run`; and how many of them had passed at the last report."""
        self._num_reports = 0
        self.committed: Committed | None = None
        """The newest checkpoint."""
        self._fill(rows)
        self._client = ParamServerClients(config.serving.shard_addresses, timeout_s=60)
        self.publisher = Publisher(
            self.recommender,
            client=self._client,
            config=config,
            ranks=ranks,
            trace_path=directory / "versions.jsonl",
        )
        self.publisher.open(at_least=0)
        # A new generation begins with everything; what the turns publish are changes.
        self._begin(full=True)
        self.end_turn()

    def _fill(self, rows: int) -> None:
        """Slots and metric windows are full, as after a while: a row for a new id costs an eviction."""
        keys_S = popular_keys(self.recommender.layout, rows)
        keys_S = keys_S[owner_of(keys_S, num_owners=self._ranks.world_size) == self._ranks.rank]
        for shard in self.recommender.shards.values():
            shard.rows.rows_CD.uniform_(-0.01, 0.01)
            for start in range(0, len(keys_S), FILL_BLOCK):
                keys_N = keys_S[start : start + FILL_BLOCK]
                # Twice, so that count admission lets them in.
                counts_N = np.full(len(keys_N), 2, np.int32)
                mapped = shard.ids.map(keys_N, shows_N=counts_N, positives_N=counts_N * 0, now_s=START_S)
                shard.ids.release(mapped.batch)
        schema, generator = self.config.schema, np.random.default_rng(self.config.seed)
        num, num_tasks = self.config.train.metrics_window * len(schema.domains), len(schema.tasks)
        self.window.add(
            generator.random((num, num_tasks), dtype=np.float32),
            labels_NT=(generator.random((num, num_tasks)) < 0.3).astype(np.float32),
            known_NT=np.ones((num, num_tasks), np.bool_),
            domain_N=np.arange(num) % len(schema.domains),
            users_N=generator.integers(0, num // 4, num),
        )

    def run(self, batches: Sequence[Impressions]) -> None:
        """As TrainingLoop does: the next batch is mapped beside this one, unless something is due."""
        following: _Fetched | None = None
        for index, batch in enumerate(batches):
            began_s = time.perf_counter()
            is_last = index + 1 == len(batches)
            current = following if following is not None else self._fetch(batch, next_ready=not is_last)
            following = None
            mapped, agreed = current.mapping.result(), current.agreed
            if agreed.next_ready and not self._something_is_due(agreed.flags):
                following = self._fetch(batches[index + 1], next_ready=index + 2 < len(batches))
            self._train(mapped, agreed)
            self._housekeeping(agreed.flags)
            self._trained_s += time.perf_counter() - began_s

    def _fetch(self, batch: Impressions, *, next_ready: bool) -> _Fetched:
        flags = agree_on_flags(self._flags(), ranks=self._ranks)
        facts = BatchFacts(
            num_impressions=len(batch),
            event_time_s=int(batch.event_time_ms_N.max()) // 1000,
            produced_ms_newest=int(batch.produced_ms_N.max()),
            next_ready=next_ready,
        )
        agreed = agree_on_batch(flags, facts, ranks=self._ranks)
        mapping = self._mapper.submit(
            self.recommender.map, batch, now_s=agreed.event_time_s, num_rows=agreed.num_rows
        )
        return _Fetched(agreed, mapping)

    def _flags(self) -> Flags:
        publisher, checkpoints = self.publisher, self._checkpoints
        report_due = self._trained_s - self._reported_s >= STATUS_INTERVAL_S
        return Flags(
            ready=True,
            not_ready=False,
            not_drained=True,
            stop=False,
            publish_due=False,
            checkpoint_due=False,
            report_due=self._ranks.rank == 0 and report_due,
            partitions_grew=False,
            publish_unfinished=not publisher.job_done,
            publish_failed=publisher.job_failed,
            save_unfinished=not checkpoints.job_done,
            save_failed=checkpoints.job_failed,
        )

    def _something_is_due(self, flags: Flags) -> bool:
        return (
            flags.report_due
            or (self.publisher.phase is not Phase.IDLE and not flags.publish_unfinished)
            or (self.saving and not flags.save_unfinished)
        )

    def _train(self, mapped: MappedBatch, agreed: Agreement) -> None:
        impressions = mapped.impressions
        scores_NT = self.recommender.learn(mapped).probabilities_NT
        self.window.add(
            scores_NT,
            labels_NT=impressions.labels_NT,
            known_NT=impressions.known_NT,
            domain_N=impressions.domain_N,
            users_N=impressions.user_ids_N,
        )
        self._progress.step += 1
        self._progress.impressions_trained += agreed.num_impressions
        self.publisher.produced.add(impressions.produced_ms_N)

    def _housekeeping(self, flags: Flags) -> None:
        self.publisher.advance(
            all_done=not flags.publish_unfinished, any_failed=flags.publish_failed, now_ms=_now_ms()
        )
        committed = self._checkpoints.advance(
            all_done=not flags.save_unfinished, any_failed=flags.save_failed
        )
        self.committed = committed if committed is not None else self.committed
        if flags.report_due:
            self.report()

    def report(self) -> None:
        """Counters, and every so often quality over the windows of all ranks."""
        self._reported_s = self._trained_s
        for name in self.recommender.shards:
            table_status(self.recommender, name)
        self._num_reports += 1
        if self._num_reports % REPORTS_PER_QUALITY:
            return
        gathered = self._ranks.gather_bytes(encode_tensors(self.window.columns(), metadata={}))
        if self._ranks.rank == 0:
            windows = [decode_tensors(data, where="metric window")[0] for data in gathered]
            schema = self.config.schema
            joint_qualities(windows, domains=schema.domains, tasks=schema.task_names)

    @property
    def steps_done(self) -> int:
        return self._progress.step

    def begin_turn(self) -> None:
        """A turn is one publishing interval, and its version begins with it."""
        self._begin(full=False)

    def _begin(self, *, full: bool) -> None:
        assert self.publisher.phase is Phase.IDLE
        self.publisher.begin(full=full, now_ms=_now_ms(), watermark_ms=START_S * 1000, positions=[])

    def end_turn(self) -> None:
        """The version that the turn began is durable: none of its work is left to another's turn."""
        self.publisher.finish(self._publish_flags, now_ms=_now_ms)
        if self.publisher.totals.failed:
            raise RuntimeError("a version was not published: the figures would not hold its cost")

    def _publish_flags(self) -> tuple[bool, bool]:
        flags = agree_on_flags(self._flags(), ranks=self._ranks)
        return not flags.publish_unfinished, flags.publish_failed

    @property
    def saving(self) -> bool:
        """A checkpoint is on its way; `run` brings it on."""
        return self._checkpoints.phase is not SavePhase.IDLE

    def begin_checkpoint(self) -> None:
        """Returns when training may go on."""
        self._checkpoints.begin(
            self.recommender, parts={"window": self.window}, progress=self._progress, positions=[]
        )

    def close(self) -> None:
        self._mapper.shutdown(wait=True)
        self.publisher.close()
        self._client.close()
        self._checkpoints.close()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
