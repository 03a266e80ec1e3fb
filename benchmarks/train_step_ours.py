"""Freshet as a contestant of benchmarks.train_step: the parts of its loop, with everything on.

Ids are mapped, admitted, scored and evicted, reused rows reset, changed rows recorded, predictions judged, a
version goes to a real shard process in every turn, and checkpoints are measured beside it. Left out: Kafka.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from benchmarks.train_step_stream import START_S, popular_keys
from feature_eviction import owner_of
from param_server.client import ParamServerClients
from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.metrics import QualityWindow
from trainer.publisher import Phase, Publisher
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions

FILL_BLOCK = 1 << 17


class Ours:
    """One rank of a training run, driven step by step."""

    def __init__(self, config: Config, *, rows: int, ranks: Ranks, directory: Path, compiled: bool) -> None:
        config = replace(config, model=replace(config.model, compile=compiled))
        self.config = config
        self.recommender = Recommender(config, ranks=ranks)
        self._ranks = ranks
        self._window = QualityWindow(
            domains=config.schema.domains,
            tasks=config.schema.task_names,
            window=config.train.metrics_window // ranks.world_size,
        )
        self._progress = Progress()
        self._checkpoints = Checkpoints(directory / "checkpoints", config=config, ranks=ranks)
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
        """Every slot taken, as it is after a while: from here on a new id costs an eviction."""
        keys_S = popular_keys(self.recommender.layout, rows)
        keys_S = keys_S[owner_of(keys_S, num_owners=self._ranks.world_size) == self._ranks.rank]
        for shard in self.recommender.shards.values():
            shard.rows.rows_CD.uniform_(-0.01, 0.01)
            for start in range(0, len(keys_S), FILL_BLOCK):
                keys_N = keys_S[start : start + FILL_BLOCK]
                counts_N = np.ones(len(keys_N), np.int32)
                mapped = shard.ids.map(keys_N, shows_N=counts_N, positives_N=counts_N * 0, now_s=START_S)
                shard.ids.release(mapped.batch)

    def step(self, impressions: Impressions) -> None:
        """As the training loop does: agree, train, judge, let the publisher move."""
        flags = self._flags(int(impressions.event_time_ms_N.max()) // 1000)
        scores_NT = self.recommender.train(impressions, now_s=flags[2])
        self._window.add(
            scores_NT,
            labels_NT=impressions.labels_NT,
            known_NT=impressions.known_NT,
            domain_N=impressions.domain_N,
            users_N=impressions.user_ids_N,
        )
        self._progress.step += 1
        self.publisher.produced.add(impressions.produced_ms_N)
        self.publisher.advance(all_done=flags[0], any_failed=flags[1], now_ms=_now_ms())

    def _flags(self, now_s: int) -> tuple[bool, bool, int]:
        """(all ranks' publishers done, any failed, newest event time), in the loop's two messages."""
        publisher = self.publisher
        sums = self._ranks.sum(np.array([not publisher.job_done, publisher.job_failed], np.int64))
        newest = self._ranks.max(np.array([now_s], np.int64))
        return bool(sums[0] == 0), bool(sums[1] > 0), int(newest[0])

    def begin_turn(self) -> None:
        """A turn is one publishing interval, and its version begins with it."""
        self._begin(full=False)

    def _begin(self, *, full: bool) -> None:
        assert self.publisher.phase is Phase.IDLE
        self.publisher.begin(full=full, now_ms=_now_ms(), watermark_ms=START_S * 1000, positions=[])

    def end_turn(self) -> None:
        """The version that the turn began is durable: none of its work is left to another's turn."""
        self.publisher.finish(lambda: self._flags(0)[:2], now_ms=_now_ms)
        if self.publisher.totals.failed:
            raise RuntimeError("a version was not published: the figures would not hold its cost")

    def checkpoint_stall_s(self) -> float:
        """How long training stands still for one checkpoint."""
        self._progress.step += 1
        self._ranks.barrier()
        began_s = time.perf_counter()
        self._checkpoints.save(self.recommender, window=self._window, progress=self._progress, positions=[])
        return time.perf_counter() - began_s

    def close(self) -> None:
        self.publisher.close()
        self._client.close()
        self._checkpoints.close()


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
