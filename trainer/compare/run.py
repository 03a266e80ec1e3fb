"""One run: a model trained from nothing by batch or online mode, and judged.

Shapes: N impressions of the data, M of a slice, T tasks.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt

from trainer.collectives import Ranks
from trainer.compare.dataset import Dataset, Rows
from trainer.compare.evaluation import Cell, choosing_auc, evaluate
from trainer.compare.plan import TRUTH, RunSpec, config_of
from trainer.recommender import Recommender

RESULT_FORMAT = 1
DECIDING = (
    *("trainer/model/*.py", "trainer/recommender.py", "trainer/tables.py", "trainer/features.py"),
    *("trainer/id_routing.py", "trainer/collectives.py", "trainer/row_init.py", "trainer/row_adam.py"),
    *("trainer/finite.py", "trainer/task_scaling.py", "trainer/metrics.py"),
    *("trainer/stream/columns.py", "trainer/stream/slicing.py"),
    *("trainer/compare/run.py", "trainer/compare/dataset.py", "trainer/compare/protocol.py"),
    *("trainer/compare/evaluation.py", "trainer/compare/expected.py", "feature_eviction/*.py"),
)
"""Configuration, data and models from outside have digests of their own."""
Scores = npt.NDArray[np.float32]
Progress = Callable[[int], None]
"""Told how many impressions have been trained since the last call."""


class RunResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a run found; one JSON file."""

    format: int = RESULT_FORMAT
    name: str
    run_hash: str
    """RunSpec.hash() of what was trained."""
    code: str
    """code_digest() of the program that trained it."""
    data_digest: str
    cells: list[Cell]
    """Over the test day; online: over validation and test days."""
    validation: list[float | None]
    """choosing_auc of the validation day after each epoch; empty in online mode."""
    best_epoch: int
    num_trained: int
    cost_us: float
    """Processor time of a training step over its impressions, median of all steps; 0 without any."""
    parameters: int
    """Of the dense model."""
    cpu_s: float
    wall_s: float


def run(spec: RunSpec, data: Dataset, *, ranks: Ranks, progress: Progress) -> RunResult:
    """Train and judge. Raises: DataError, ConfigError; ValueError if a prediction is not finite."""
    if spec.variant.model == TRUTH:
        return _truth(spec, data)
    start_s, start_cpu_s = time.monotonic(), time.process_time()
    training = _Training(spec, data, ranks=ranks, progress=progress)
    online = spec.settings.mode == "online"
    cells, validation, best_epoch = training.online() if online else training.batch()
    training.check_nothing_left()
    return RunResult(
        name=spec.name,
        run_hash=spec.hash(),
        code=code_digest(),
        data_digest=spec.facts.digest,
        cells=cells,
        validation=validation,
        best_epoch=best_epoch,
        num_trained=training.num_trained,
        cost_us=float(np.median(training.costs_us)) if training.costs_us else 0.0,
        parameters=training.num_parameters(),
        cpu_s=time.process_time() - start_cpu_s,
        wall_s=time.monotonic() - start_s,
    )


def judged_slices(spec: RunSpec) -> tuple[str, ...]:
    """Online nothing is chosen by the validation day, so it judges as well."""
    return ("validation", "test") if spec.settings.mode == "online" else ("test",)


@cache
def code_digest() -> str:
    """Of this program's files that decide a result."""
    return digest_of_code(Path(__file__).parent.parent.parent)


def digest_of_code(root: Path) -> str:
    """Of the files that decide what a model learns and how it is judged. Args: root: holds the packages."""
    digest = hashlib.sha256()
    for pattern in DECIDING:
        for file in sorted(root.glob(pattern)):
            digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class _Training:
    """The model of one run, and what it costs."""

    def __init__(self, spec: RunSpec, data: Dataset, *, ranks: Ranks, progress: Progress) -> None:
        self.config = config_of(spec)
        self.recommender = Recommender(self.config, ranks=ranks)
        self.costs_us: list[float] = []
        self.num_trained = 0
        self._spec, self._data, self._progress = spec, data, progress
        self._batch_size = spec.settings.batch_size
        self._task: int | None = None
        if spec.task is not None:
            # The data has all tasks of the preset, in its order.
            from trainer.compare.settings import base_config

            self._task = base_config(spec.settings, seed=spec.seed).schema.task_names.index(spec.task)
        self._domain = None if spec.domain is None else spec.facts.domains.index(spec.domain)
        self._newest_s = 0

    def batch(self) -> tuple[list[Cell], list[float | None], int]:
        """Shuffled epochs over the training days; judged where the validation day is best."""
        rows_M = self._rows("train")
        validation: list[float | None] = []
        best: tuple[float, int, list[Cell]] | None = None
        for epoch in range(self._spec.settings.epochs):
            # The same order for every model.
            rng = np.random.default_rng([self._spec.seed, 3, epoch])
            order_M = rng.permutation(rows_M)
            for start in range(0, len(order_M), self._batch_size):
                self._step(order_M[start : start + self._batch_size])
            found = choosing_auc(self._judge(self._rows("validation")))
            validation.append(found)
            quality = float("-inf") if found is None else found
            if best is None or quality > best[0]:
                best = quality, epoch + 1, self._judge(self._rows("test"))
        assert best is not None
        return best[2], validation, best[1]

    def online(self) -> tuple[list[Cell], list[float | None], int]:
        """Each impression is predicted, then trained, in the order of events."""
        rows_M = np.sort(np.concatenate([self._rows(name) for name in ("train", "validation", "test")]))
        scores = [self._no_scores()] + [
            self._step(rows_M[start : start + self._batch_size])
            for start in range(0, len(rows_M), self._batch_size)
        ]
        judged_N = np.zeros(len(self._data.slice_N), np.bool_)
        for name in judged_slices(self._spec):
            judged_N[self._rows(name)] = True
        judged_M = judged_N[rows_M]
        return self._cells(rows_M[judged_M], np.concatenate(scores)[judged_M]), [], 1

    def num_parameters(self) -> int:
        """Of the dense model; of one trained by domain, of this domain's network alone."""
        num = sum(one.numel() for one in self.recommender.dense.parameters())
        return num if self._domain is None else num // len(self._spec.facts.domains)

    def check_nothing_left(self) -> None:
        """Whatever leaves a table would be a difference between runs that is not the models'."""
        for name, shard in self.recommender.shards.items():
            counters = shard.ids.counters()
            lost = sum(counters.evicted.values()) + sum(counters.refused.values())
            assert not lost, f"table '{name}': {lost} rows evicted or refused, though it has room for all"

    def _rows(self, name: str) -> Rows:
        return self._data.rows(name, domain=self._domain)

    def _step(self, rows_B: Rows) -> Scores:
        """Predict, then learn. Returns: float32 [B, T]."""
        impressions = self._data.take(rows_B, task=self._task)
        # Shuffled batches hold all days; the tables' clock only ever goes on.
        self._newest_s = max(self._newest_s, int(impressions.event_time_ms_N.max()) // 1000)
        start_s = time.process_time()
        scores_BT = self.recommender.train(impressions, now_s=self._newest_s)
        self.costs_us.append((time.process_time() - start_s) * 1e6 / len(impressions))
        self.num_trained += len(impressions)
        self._progress(len(impressions))
        return scores_BT

    def _judge(self, rows_M: Rows) -> list[Cell]:
        parts = [self._no_scores()]
        for start in range(0, len(rows_M), self._batch_size):
            rows_B = rows_M[start : start + self._batch_size]
            parts.append(self.recommender.predict(self._data.take(rows_B, task=self._task)))
        return self._cells(rows_M, np.concatenate(parts))

    def _no_scores(self) -> Scores:
        """Of a slice without impressions: a model of one domain may have none."""
        return np.zeros((0, len(self.config.schema.tasks)), np.float32)

    def _cells(self, rows_M: Rows, scores_MT: Scores) -> list[Cell]:
        cells = _cells_of(self._spec, self._data, rows_M, scores_MT, task=self._task)
        return [cell for cell in cells if self._spec.domain in (None, cell.domain)]


def _cells_of(
    spec: RunSpec, data: Dataset, rows_M: Rows, scores_MT: Scores, *, task: int | None
) -> list[Cell]:
    impressions = data.take(rows_M, task=task)
    truth_MT = None if data.truth_NT is None else data.truth_NT[rows_M]
    if truth_MT is not None and task is not None:
        truth_MT = truth_MT[:, [task]]
    return evaluate(
        scores_MT,
        labels_NT=impressions.labels_NT,
        known_NT=impressions.known_NT,
        domain_N=impressions.domain_N,
        users_N=impressions.user_ids_N,
        domains=spec.facts.domains,
        tasks=config_of(spec).schema.task_names,
        truth_NT=truth_MT,
    )


def _truth(spec: RunSpec, data: Dataset) -> RunResult:
    """How the true probabilities rank the labels that were drawn with them."""
    assert data.truth_NT is not None
    rows_M = np.concatenate([data.rows(name) for name in judged_slices(spec)])
    cells = _cells_of(spec, data, rows_M, data.truth_NT[rows_M], task=None)
    return RunResult(
        name=spec.name,
        run_hash=spec.hash(),
        code=code_digest(),
        data_digest=spec.facts.digest,
        cells=cells,
        validation=[],
        best_epoch=0,
        num_trained=0,
        cost_us=0.0,
        parameters=0,
        cpu_s=0.0,
        wall_s=0.0,
    )
