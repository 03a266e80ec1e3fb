"""The numbers a run ends with (`summary.json`), and the checks that decide its exit code."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import msgspec

from trainer.config import Config
from trainer.run.freshness import Histogram
from trainer.run.observe import Observation
from trainer.run.status import ProducerStatus, Quality, TableStatus, TrainerStatus

DIFFERENCE_MAX = {"float32": 1e-6, "float16": 1e-3, "int8": 5e-2}
"""Largest difference between a replica's prediction and the trainer's, by row format."""


class TableSummary(msgspec.Struct, frozen=True, kw_only=True):
    """Sums over the tables."""

    rows: int = 0
    capacity: int = 0
    bytes: int = 0
    bytes_limit: int = 0
    evicted: dict[str, int] = {}
    admitted: int = 0
    refused: dict[str, int] = {}


class VersionCounts(msgspec.Struct, frozen=True, kw_only=True):
    published: int = 0
    full: int = 0
    delta: int = 0


class ReplicaSummary(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str = ""
    """Empty: it held none, or did not answer."""
    predictions_checked: int = 0
    max_abs_diff: float | None = None
    """None: nothing was compared, or a prediction was not a number."""


class FreshnessSummary(msgspec.Struct, frozen=True, kw_only=True):
    """From entering the stream to being visible at a replica; None where nothing became visible."""

    p50: int | None = None
    p99: int | None = None
    impressions: int = 0
    """Summed over replicas."""


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One condition of exit code 0."""

    name: str
    passed: bool
    detail: str


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """`summary.json`; the keys up to config_hash are a contract."""

    impressions_produced: int
    impressions_trained: int
    dead_letters: int
    samples_per_s: float
    auc: Quality
    gauc: Quality
    best_possible_auc: Quality
    table: TableSummary
    versions: VersionCounts
    rows_changed: int
    rows_pushed: int
    rows_held_back: dict[str, int]
    bytes_pushed: int
    replicas: list[ReplicaSummary]
    freshness_ms: FreshnessSummary
    seed: int
    config_hash: str
    freshness_steady_ms: FreshnessSummary
    """Without the impressions produced in the first seconds, while code is still being compiled."""
    best_possible_gauc: Quality
    positive_task: str
    """The schema's: the one task whose quality is worth a line."""
    dead_letter_reasons: dict[str, int]
    preset: str
    version: str
    generation: int
    started_at: str
    duration_s: float
    machine: str
    ended: str
    """"completed", or why not."""
    checks: list[Check]


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """What the end of a run adds to its last observation."""

    ended: str
    produced_before: int = 0
    """By the runs that this one resumed."""
    impressions_wanted: int
    """Of this run's producer."""
    source_may_end: bool = False
    """It is a recording, which may hold fewer."""
    time_was_up: bool = False
    """The run itself stopped the producer."""
    owns_stream: bool = True
    """Nothing but this run's producer writes to the topic."""
    unclean: Sequence[str] = ()
    """One line for each child that ended badly."""
    replicas: Sequence[ReplicaSummary] = ()
    table_bytes_peak: Mapping[str, int] = {}
    """The most that was seen of each table."""
    started_at: str
    duration_s: float
    machine: str


def summarize(
    config: Config, last: Observation, ending: Ending, *, overall: Histogram, steady: Histogram
) -> Summary:
    """Put together the numbers and their checks; parts that no process reported are zero or empty."""
    trainer = last.trainer or TrainerStatus(state="starting")
    producer = last.producer or ProducerStatus(state="starting")
    produced = ending.produced_before + producer.impressions_produced
    table = _sum_tables(trainer.tables)
    published = trainer.versions_full + trainer.versions_delta
    return Summary(
        impressions_produced=produced,
        impressions_trained=trainer.impressions_trained,
        dead_letters=sum(trainer.dead_letters.values()),
        samples_per_s=_rate(trainer),
        auc=trainer.auc,
        gauc=trainer.gauc,
        best_possible_auc=producer.best_possible_auc,
        table=table,
        versions=VersionCounts(published=published, full=trainer.versions_full, delta=trainer.versions_delta),
        rows_changed=trainer.rows_changed,
        rows_pushed=trainer.rows_pushed,
        rows_held_back=trainer.rows_held_back,
        bytes_pushed=trainer.bytes_pushed,
        replicas=list(ending.replicas),
        freshness_ms=_freshness(overall),
        seed=config.seed,
        config_hash=config.hash(),
        freshness_steady_ms=_freshness(steady),
        best_possible_gauc=producer.best_possible_gauc,
        positive_task=config.schema.positive_task,
        dead_letter_reasons=trainer.dead_letters,
        preset=config.preset,
        version=trainer.version,
        generation=trainer.generation,
        started_at=ending.started_at,
        duration_s=round(ending.duration_s, 3),
        machine=ending.machine,
        ended=ending.ended,
        checks=checks(config, trainer, ending, producer=producer),
    )


def checks(
    config: Config, trainer: TrainerStatus, ending: Ending, *, producer: ProducerStatus
) -> list[Check]:
    """Everything that has to hold for exit code 0, in the order in which to read it."""
    produced = ending.produced_before + producer.impressions_produced
    return [
        Check(name="ran to its end", passed=ending.ended == "completed", detail=ending.ended),
        Check(
            name="processes ended cleanly",
            passed=not ending.unclean,
            detail="; ".join(ending.unclean) or "all of them",
        ),
        _check_produced(producer, ending),
        _check_counts(trainer, produced=produced, owns_stream=ending.owns_stream),
        _check_versions(config, trainer, ending.replicas),
        _check_predictions(config, ending.replicas),
        _check_bytes(trainer.tables, ending.table_bytes_peak),
    ]


def to_json(summary: Summary) -> bytes:
    return msgspec.json.format(msgspec.json.encode(summary), indent=2) + b"\n"


def _check_produced(producer: ProducerStatus, ending: Ending) -> Check:
    produced, wanted = producer.impressions_produced, ending.impressions_wanted
    has_all = produced >= wanted
    is_enough = has_all or (ending.source_may_end and not producer.told_to_stop)
    detail = f"{produced} of {wanted}"
    if ending.source_may_end and is_enough and not has_all:
        detail += ", all that the data holds"
    if ending.time_was_up:
        detail = f"{produced} until the time was up"
    elif not is_enough:
        detail += ": the producer ended early" + (", by a signal" if producer.told_to_stop else "")
    return Check(
        name="producer produced what was asked", passed=ending.time_was_up or is_enough, detail=detail
    )


def _check_counts(trainer: TrainerStatus, *, produced: int, owns_stream: bool) -> Check:
    dead = sum(trainer.dead_letters.values())
    trained, wanted = trainer.impressions_trained, produced - dead
    # Others may write to a topic that is not this run's own: then there can only be more.
    passed = trained == wanted if owns_stream else trained >= wanted
    detail = f"{trained} trained, {produced} produced, {dead} dead letters"
    if not passed:
        detail += f": {abs(trained - wanted)} too {'few' if trained < wanted else 'many'}"
    elif trained > wanted:
        detail += f"; {trained - wanted} more were others' in the topic, so at least its own were trained"
    return Check(name="every impression trained once", passed=passed, detail=detail)


def _check_versions(config: Config, trainer: TrainerStatus, replicas: Sequence[ReplicaSummary]) -> Check:
    wrong = [f"{replica.name} {replica.version or 'none'}" for replica in replicas]
    wrong = [
        text for text, replica in zip(wrong, replicas, strict=True) if replica.version != trainer.version
    ]
    missing = config.serving.num_replicas - len(replicas)
    if missing > 0:
        wrong.append(f"{missing} not asked")
    return Check(
        name="replicas hold the last version",
        passed=not wrong and bool(trainer.version),
        detail=f"last version {trainer.version or 'none'}"
        + (f", but {', '.join(wrong)}" if wrong else f", {len(replicas)} of {len(replicas)} replicas"),
    )


def _check_predictions(config: Config, replicas: Sequence[ReplicaSummary]) -> Check:
    limit = DIFFERENCE_MAX[config.serving.row_format]
    wrong = [
        f"{replica.name}: {_difference(replica)} over {replica.predictions_checked} predictions"
        for replica in replicas
        if not replica.predictions_checked or replica.max_abs_diff is None or replica.max_abs_diff > limit
    ]
    missing = config.serving.num_replicas - len(replicas)
    if missing > 0:
        wrong.append(f"{missing} not asked")
    worst = max((replica.max_abs_diff or 0.0 for replica in replicas), default=0.0)
    return Check(
        name="replicas predict what the trainer predicts",
        passed=not wrong,
        detail=f"allowed difference {limit:g} ({config.serving.row_format} rows), "
        + ("found " + ", ".join(wrong) if wrong else f"largest {worst:.3g}"),
    )


def _check_bytes(tables: Iterable[TableStatus], peaks: Mapping[str, int]) -> Check:
    most = [(table, max(table.bytes, peaks.get(table.name, 0))) for table in tables]
    over = [f"{t.name}: {used} of {t.bytes_limit} bytes" for t, used in most if used > t.bytes_limit]
    return Check(name="tables within their budget", passed=not over, detail=", ".join(over) or "each of them")


def _difference(replica: ReplicaSummary) -> str:
    return "no number" if replica.max_abs_diff is None else f"{replica.max_abs_diff:.3g}"


def _rate(trainer: TrainerStatus) -> float:
    if trainer.training_s <= 0:
        return trainer.samples_per_s
    return round(trainer.impressions_since_start / trainer.training_s, 1)


def _freshness(histogram: Histogram) -> FreshnessSummary:
    return FreshnessSummary(
        p50=histogram.quantile(0.5), p99=histogram.quantile(0.99), impressions=histogram.total
    )


def _sum_tables(tables: Sequence[TableStatus]) -> TableSummary:
    totals: dict[str, Any] = {
        name: sum(getattr(table, name) for table in tables)
        for name in ("rows", "capacity", "bytes", "bytes_limit", "admitted")
    }
    for name in ("evicted", "refused"):
        counted: Counter[str] = Counter()
        for table in tables:
            counted.update(getattr(table, name))
        totals[name] = dict(counted)
    return TableSummary(**totals)
