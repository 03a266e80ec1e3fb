"""Turns the state of a run into the status that other processes read."""

from __future__ import annotations

import time
from collections import deque

import msgspec

from param_server.client import decode_tensors, encode_tensors
from trainer.checkpoint import Progress
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.metrics import QualityWindow, joint_qualities
from trainer.publish.publisher import Publisher
from trainer.recommender import Recommender
from trainer.run.status import Quality, RunState, TableStatus, TrainerStatus
from trainer.stream.source import KafkaSource

RATE_WINDOW_S = 5.0
REPORTS_PER_QUALITY = 10
"""Quality takes tenths of a second. Every rank counts reports alike, so all take part in the same."""


class _RankStatus(msgspec.Struct, kw_only=True):
    """What the ranks have each for themselves."""

    tables: list[TableStatus]
    dead_letters: dict[str, int]
    lag_impressions: int
    ids_folded: int
    rows_pending: int


class StatusReporter:
    """Collects counters and metric windows of all ranks."""

    def __init__(self, config: Config, *, ranks: Ranks) -> None:
        self._config = config
        self._ranks = ranks
        self._steps: deque[tuple[float, int]] = deque(maxlen=4096)
        self._busy_s = 0.0
        self._num_impressions = 0
        self._quality: tuple[Quality, Quality] = ({}, {})
        self._num_reports = 0

    def count_step(self, num_impressions: int, *, started_s: float, ended_s: float) -> None:
        self._steps.append((ended_s, num_impressions))
        self._busy_s += ended_s - started_s
        self._num_impressions += num_impressions

    def report(
        self,
        state: RunState,
        *,
        recommender: Recommender,
        source: KafkaSource,
        publisher: Publisher | None,
        progress: Progress,
        window: QualityWindow,
        now_ms: int,
    ) -> TrainerStatus:
        """Collective; the answer is complete on rank 0."""
        mine = _RankStatus(
            tables=[table_status(recommender, name) for name in recommender.shards],
            dead_letters=progress.dead_letters,
            lag_impressions=source.lag_impressions(),
            ids_folded=recommender.num_folded,
            rows_pending=sum(shard.changed.num_pending for shard in recommender.shards.values()),
        )
        gathered = self._ranks.gather_bytes(msgspec.json.encode(mine))
        every = [msgspec.json.decode(data, type=_RankStatus) for data in gathered]
        if state == "stopped" or self._num_reports % REPORTS_PER_QUALITY == 0:
            self._quality = self._joint_quality(window)
        self._num_reports += 1
        status = TrainerStatus(
            state=state,
            generation=progress.generation,
            step=progress.step,
            impressions_trained=progress.impressions_trained,
            dead_letters=sum_by_key([one.dead_letters for one in every]),
            lag_impressions=sum(one.lag_impressions for one in every),
            ids_folded=sum(one.ids_folded for one in every),
            samples_per_s=self._samples_per_s(),
            auc=self._quality[0],
            gauc=self._quality[1],
            tables=[sum_tables(list(shards)) for shards in zip(*(one.tables for one in every), strict=True)],
            event_time_ms=progress.event_time_s * 1000,
            impressions_since_start=self._num_impressions,
            training_s=self._busy_s,
        )
        if publisher is not None:
            status.rows_pending = sum(one.rows_pending for one in every)
            tell_of_publishing(status, publisher, now_ms=now_ms)
        return status

    def _joint_quality(self, window: QualityWindow) -> tuple[Quality, Quality]:
        """Over all ranks' impressions; complete on rank 0. Collective."""
        gathered = self._ranks.gather_bytes(encode_tensors(window.columns(), metadata={}))
        if self._ranks.rank != 0:
            return {}, {}
        return joint_qualities(
            [decode_tensors(data, where="metric window")[0] for data in gathered],
            domains=self._config.schema.domains,
            tasks=self._config.schema.task_names,
        )

    def _samples_per_s(self) -> float:
        """Impressions trained in the last few seconds, by the wall."""
        while self._steps and time.monotonic() - self._steps[0][0] > RATE_WINDOW_S:
            self._steps.popleft()
        if len(self._steps) < 2:
            return 0.0
        span_s = self._steps[-1][0] - self._steps[0][0]
        num = sum(count for _, count in self._steps) - self._steps[0][1]
        return num / span_s if span_s > 0 else 0.0


def tell_of_publishing(status: TrainerStatus, publisher: Publisher, *, now_ms: int) -> None:
    """What rank 0's publisher did, and what keeps it."""
    totals = publisher.totals
    status.version = totals.head
    status.versions_full, status.versions_delta = totals.full, totals.delta
    status.versions_failed, status.versions_held = totals.failed, totals.held
    status.rows_changed, status.rows_pushed = totals.rows_changed, totals.rows_pushed
    status.rows_held_back = dict(totals.held_back)
    status.bytes_pushed = totals.bytes_pushed
    status.pending_age_ms = publisher.backlog.age_ms(now_ms=now_ms)
    status.last_ack_age_s = publisher.backlog.ack_age_s(now_ms=now_ms)
    status.held_because = publisher.held_because


def table_status(recommender: Recommender, name: str) -> TableStatus:
    """This rank's shard of a table."""
    shard = recommender.shards[name]
    counters = shard.ids.counters()
    return TableStatus(
        name=name,
        rows=shard.ids.num_rows,
        capacity=shard.slots_per_rank,
        bytes=shard.bytes_used,
        bytes_limit=shard.config.bytes_limit,
        admitted=counters.admitted,
        evicted=dict(counters.evicted),
        refused=dict(counters.refused),
    )


def sum_tables(shards: list[TableStatus]) -> TableStatus:
    return TableStatus(
        name=shards[0].name,
        rows=sum(shard.rows for shard in shards),
        capacity=sum(shard.capacity for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        bytes_limit=shards[0].bytes_limit,
        admitted=sum(shard.admitted for shard in shards),
        evicted=sum_by_key([shard.evicted for shard in shards]),
        refused=sum_by_key([shard.refused for shard in shards]),
    )


def sum_by_key(counts: list[dict[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for one in counts:
        for key, num in one.items():
            total[key] = total.get(key, 0) + num
    return total
