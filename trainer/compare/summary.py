"""From the runs' cells to what the table shows: means over seeds by model and column, and how they compare.

A column is (domain, task, metric). Beside the tasks each domain has their mean, and all domains together have
the mean of that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from trainer.compare.evaluation import Cell, mean_of
from trainer.compare.plan import TRUTH, RunSpec, Variant
from trainer.compare.run import RunResult
from trainer.compare.statistics import Difference, Estimate, estimate, paired

METRICS = ("gauc", "auc", "expected_gauc")
MEAN = "mean"
ALL_DOMAINS = "all"

PEPNET = "pepnet"
PEPNET_FAMILY = ("pepnet", "epnet", "ppnet", "pepnet_mmoe", "epnet_mmoe", "ppnet_mmoe")
"""Models with a gate of PEPNet; every other one is a baseline."""


class Column(NamedTuple):
    domain: str
    task: str
    metric: str


BySeed = dict[int, float]


@dataclass(frozen=True, slots=True)
class Row:
    """One model or variant."""

    name: str
    is_baseline: bool
    by_seed: dict[Column, BySeed]
    """Where the metric is defined."""
    means: dict[Column, Estimate]
    differences: dict[Column, Difference]
    """To the column's reference; none for the reference itself."""
    cost_us: float | None
    """Processor time to train one impression with all its tasks, median over seeds."""
    parameters: int
    """Of all its dense models together."""


@dataclass(frozen=True, slots=True)
class Summary:
    """Everything that is shown."""

    domains: tuple[str, ...]
    tasks: tuple[str, ...]
    rows: list[Row]
    references: dict[Column, str]
    """What the column is compared with: the best baseline there, or the one row that was asked for."""
    best: dict[Column, str]
    notes: list[str] = field(default_factory=list)

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)

    def columns(self, metric: str) -> list[Column]:
        """Domain by domain, tasks and then their mean; the mean of all domains last."""
        columns = [Column(domain, task, metric) for domain in self.domains for task in (*self.tasks, MEAN)]
        return columns + ([Column(ALL_DOMAINS, MEAN, metric)] if len(self.domains) > 1 else [])

    @property
    def metrics(self) -> tuple[str, ...]:
        """Those that are defined anywhere."""
        found = {column.metric for row in self.rows for column in row.means}
        return tuple(metric for metric in METRICS if metric in found)


@dataclass(frozen=True, slots=True)
class _Trained:
    """One variant with one seed, its runs put together."""

    cells: list[Cell]
    cost_us: float
    parameters: int


def summarise(
    results: Sequence[tuple[RunSpec, RunResult | None]],
    *,
    domains: tuple[str, ...],
    tasks: tuple[str, ...],
    reference: str | None = None,
) -> Summary:
    """Args: results: every planned run, with None where it failed. reference: compare with this row; None =
    with the best baseline of each column."""
    variants = {spec.variant.name: spec.variant for spec, _ in results}
    by_variant, notes = _put_together(results)
    values = {name: _by_column(by_seed) for name, by_seed in by_variant.items()}
    means = {
        name: {column: estimate(list(by_seed.values())) for column, by_seed in columns.items()}
        for name, columns in values.items()
    }
    models = [name for name in means if variants[name].model != TRUTH]
    baselines = [reference] if reference else [name for name in models if is_baseline(variants[name])]
    references = _best(means, baselines)
    rows = []
    for name, columns in values.items():
        trained = by_variant[name].values()
        rows.append(
            Row(
                name=name,
                is_baseline=is_baseline(variants[name]),
                by_seed=columns,
                means=means[name],
                differences=_differences(name, values, references),
                cost_us=None
                if variants[name].model == TRUTH
                else float(np.median([one.cost_us for one in trained])),
                parameters=max(one.parameters for one in trained),
            )
        )
    notes += _cell_notes(by_variant)
    return Summary(domains, tasks, rows, references, _best(means, models), notes)


def is_baseline(variant: Variant) -> bool:
    return variant.model not in (TRUTH, *PEPNET_FAMILY)


def _put_together(
    results: Sequence[tuple[RunSpec, RunResult | None]],
) -> tuple[dict[str, dict[int, _Trained]], list[str]]:
    """Variant → seed → its runs; a seed one of whose runs is missing does not count."""
    parts: dict[tuple[str, int], list[tuple[RunSpec, RunResult | None]]] = {}
    for spec, result in results:
        parts.setdefault((spec.variant.name, spec.seed), []).append((spec, result))
    by_variant: dict[str, dict[int, _Trained]] = {}
    notes = []
    for (name, seed), runs in parts.items():
        lost = [spec.name for spec, result in runs if result is None]
        if lost:
            notes.append(
                f"{name}, seed {seed}: left out, since {len(lost)} of its {len(runs)} runs failed: {lost[0]}"
            )
            continue
        done = [(spec, result) for spec, result in runs if result is not None]
        notes += [
            f"{name}, seed {seed}: no impressions of {spec.domain} to train on, it is judged untrained there"
            for spec, result in done
            if spec.domain is not None and not result.num_trained
        ]
        by_variant.setdefault(name, {})[seed] = _Trained(
            cells=[cell for _, result in done for cell in result.cells],
            cost_us=_cost_us(done),
            parameters=sum(result.parameters for _, result in done),
        )
    return by_variant, notes


def _cost_us(runs: Sequence[tuple[RunSpec, RunResult]]) -> float:
    """Of one impression with all tasks: models of one task add up, of models of one domain one is trained."""
    costs = [result.cost_us for _, result in runs]
    if any(spec.domain is not None for spec, _ in runs):
        return float(np.average(costs, weights=[max(1, result.num_trained) for _, result in runs]))
    return float(sum(costs))


def _by_column(by_seed: Mapping[int, _Trained]) -> dict[Column, BySeed]:
    columns: dict[Column, BySeed] = {}
    for seed, trained in by_seed.items():
        for metric in METRICS:
            by_domain: dict[str, list[float | None]] = {}
            for cell in trained.cells:
                value: float | None = getattr(cell, metric)
                by_domain.setdefault(cell.domain, []).append(value)
                _put(columns, Column(cell.domain, cell.task, metric), seed, value)
            of_domains = {domain: mean_of(values) for domain, values in by_domain.items()}
            for domain, value in of_domains.items():
                _put(columns, Column(domain, MEAN, metric), seed, value)
            if len(of_domains) > 1:
                _put(columns, Column(ALL_DOMAINS, MEAN, metric), seed, mean_of(list(of_domains.values())))
    return columns


def _put(columns: dict[Column, BySeed], column: Column, seed: int, value: float | None) -> None:
    if value is not None:
        columns.setdefault(column, {})[seed] = value


def _best(means: Mapping[str, Mapping[Column, Estimate]], names: Sequence[str]) -> dict[Column, str]:
    """Of these rows the one with the highest mean, by column, among those that have the most seeds there.

    A row that failed in the harder seeds must not be called the best for its easier ones.
    """
    best: dict[Column, str] = {}
    for name in names:
        for column, found in means.get(name, {}).items():
            held = means[best[column]][column] if column in best else None
            if held is None or (found.seeds, found.mean) > (held.seeds, held.mean):
                best[column] = name
    return best


def _differences(
    name: str, values: Mapping[str, Mapping[Column, BySeed]], references: Mapping[Column, str]
) -> dict[Column, Difference]:
    differences = {}
    for column, by_seed in values[name].items():
        reference = references.get(column)
        if reference is None or reference == name:
            continue
        found = paired(by_seed, values[reference][column])
        if found is not None:
            differences[column] = found
    return differences


def _cell_notes(by_variant: Mapping[str, Mapping[int, _Trained]]) -> list[str]:
    """What the cells were counted on; the same for all variants, so one is asked."""
    if not by_variant:
        return []
    by_seed = next(iter(by_variant.values()))
    undefined: dict[str, list[int]] = {}
    users = one_class = 0
    for seed, trained in by_seed.items():
        for cell in trained.cells:
            users += cell.users
            one_class += cell.users_one_class
            if (why := cell.undefined()) is not None:
                undefined.setdefault(why, []).append(seed)
    notes = [f"{why} (seeds {', '.join(map(str, seeds))})" for why, seeds in undefined.items()]
    notes.append(
        f"GAUC: users with one class are skipped, {one_class:,} of {users:,} (user, domain, task, seed)"
    )
    return notes
