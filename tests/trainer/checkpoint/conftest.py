"""A recommender with its metric window, and each kind of store."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from trainer.checkpoint import Progress
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.metrics import QualityWindow
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions


class Run:
    """What a training loop owns."""

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.recommender = Recommender(config, ranks=ranks)
        self.window = QualityWindow(
            domains=config.schema.domains,
            tasks=config.schema.task_names,
            window=config.train.metrics_window,
        )
        self.parts = {"window": self.window}

    def train(self, batches: list[Impressions]) -> None:
        for batch in batches:
            scores = self.recommender.train(batch, now_s=int(batch.event_time_ms_N.max()) // 1000)
            self.window.add(
                scores,
                labels_NT=batch.labels_NT,
                known_NT=batch.known_NT,
                domain_N=batch.domain_N,
                users_N=batch.user_ids_N,
            )

    def assert_same(self, other: Run) -> None:
        for (name, mine), (_, theirs) in zip(
            self.recommender.dense.named_parameters(),
            other.recommender.dense.named_parameters(),
            strict=True,
        ):
            assert torch.equal(mine, theirs), name
        mine, theirs = self.recommender.shards["dim16"], other.recommender.shards["dim16"]
        rows, rows2 = mine.ids.rows(), theirs.ids.rows()
        for column, column2 in zip(rows, rows2, strict=True):
            np.testing.assert_array_equal(column, column2)
        assert torch.equal(mine.rows.rows_CD[rows.slots_N], theirs.rows.rows_CD[rows.slots_N])
        assert torch.equal(mine.rows.state_C[rows.slots_N], theirs.rows.state_C[rows.slots_N])
        assert self.window.qualities() == other.window.qualities()

    def assert_rows_moved_from(self, old: Run) -> None:
        """Every row of `old` is here, in whatever slot."""
        mine, theirs = self.recommender.shards["dim16"], old.recommender.shards["dim16"]
        rows = theirs.ids.rows()
        slots_N = mine.ids.lookup(rows.keys_N)
        assert (slots_N >= 0).all()
        assert torch.equal(mine.rows.rows_CD[slots_N], theirs.rows.rows_CD[rows.slots_N])
        assert torch.equal(mine.rows.state_C[slots_N], theirs.rows.state_C[rows.slots_N])


@pytest.fixture(scope="session")
def make_run(ranks: Ranks) -> Callable[[Config], Run]:
    def make(config: Config) -> Run:
        return Run(config, ranks)

    return make


@pytest.fixture
def make_progress() -> Callable[[int], Progress]:
    def make(step: int) -> Progress:
        return Progress(
            step=step,
            generation=3,
            published="3.17",
            impressions_trained=step * 64,
            event_time_s=9,
            dead_letters={"unknown_domain": 2},
        )

    return make


@pytest.fixture(params=["local", "memory"])
def store_root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An address that nothing lies at yet: what holds for one store holds for the other."""
    return str(tmp_path / "checkpoints") if request.param == "local" else f"memory://{uuid.uuid4().hex}/run"
