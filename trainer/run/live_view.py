"""What an operator sees while a run goes on, and at its end."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from trainer.run.observe import Observation
from trainer.run.status import Quality, TableStatus, TrainerStatus
from trainer.run.summary import ReplicaSummary, Summary

_DOMAINS_SHOWN = 6
_PLAIN_EVERY_S = 5.0


class View:
    """A display that is redrawn in place, or a plain line now and then where there is no terminal."""

    def __init__(self, console: Console, *, live: bool) -> None:
        self._console = console
        # No refresh thread: the supervisor's own loop draws.
        self._live = Live(console=console, auto_refresh=False, transient=True) if live else None
        self._next_line_s = 0.0

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, text: str) -> None:
        """Say what the run does now; a line of its own where there is no live display."""
        self._next_line_s = 0.0
        if self._live is None:
            self._console.print(text, highlight=False, soft_wrap=True, markup=False)

    def show(self, observation: Observation, *, phase: str) -> None:
        if self._live is not None:
            self._live.update(render(observation, phase=phase), refresh=True)
        elif observation.trainer is not None and observation.t_s >= self._next_line_s:
            self._next_line_s = observation.t_s + _PLAIN_EVERY_S
            self._console.print(plain_line(observation), highlight=False, soft_wrap=True, markup=False)


def plain_line(observation: Observation) -> str:
    """One line of progress without any markup."""
    trainer = observation.trainer or TrainerStatus(state="starting")
    produced = _produced(observation, trainer)
    rows, capacity = _rows(trainer.tables)
    held = " ".join(str(state.version or "-") for state in observation.replicas.values()) or "-"
    return (
        f"{observation.t_s:6.0f} s  {trainer.state}  trained {trainer.impressions_trained:,} of {produced:,}"
        f"  {trainer.samples_per_s:,.0f}/s  lag {trainer.lag_impressions:,}"
        f"  AUC {_number(_mean(trainer.auc))}  rows {rows:,}/{capacity:,}"
        f"  evicted {sum(_evicted(trainer.tables).values()):,}"
        f"  version {trainer.version or '-'}  replicas {held}"
        f"  freshness p50 {_ms(observation.freshness_p50_ms)} p99 {_ms(observation.freshness_p99_ms)}"
    )


def render(observation: Observation, *, phase: str) -> RenderableType:
    """The live display as one renderable."""
    trainer = observation.trainer or TrainerStatus(state="starting")
    top = Text.assemble(
        ("Freshet  ", "bold"), (phase, "cyan"), f"  {observation.t_s:.0f} s", style="", end="\n"
    )
    return Group(
        top,
        _flow(observation, trainer),
        _quality(trainer, observation),
        _table_fill(trainer.tables),
        _replicas(observation),
    )


def final_screen(summary: Summary, *, report: Path) -> RenderableType:
    """The main numbers, each check, and where the report is."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in final_numbers(summary):
        table.add_row(name, Text(value))
    for check in summary.checks:
        mark = Text("ok  " if check.passed else "FAILED  ", style="green" if check.passed else "bold red")
        table.add_row(check.name, Text.assemble(mark, check.detail))
    table.add_row("report", Text(str(report)))
    return table


def final_lines(summary: Summary, *, report: Path) -> str:
    """The same as plain text, one line each, whatever the width."""
    lines = [f"{name}: {value}" for name, value in final_numbers(summary)]
    lines += [
        f"{check.name}: {'ok' if check.passed else 'FAILED'}, {check.detail}" for check in summary.checks
    ]
    return "\n".join([*lines, f"report: {report}"]) + "\n"


def final_numbers(summary: Summary) -> list[tuple[str, str]]:
    """(name, value) lines that the terminal and the report share."""
    table, versions = summary.table, summary.versions
    freshness, steady = summary.freshness_ms, summary.freshness_steady_ms
    return [
        (
            "impressions",
            f"{summary.impressions_trained:,} trained of {summary.impressions_produced:,} produced, "
            f"{summary.dead_letters:,} dead letters, {summary.samples_per_s:,.0f}/s inside its steps",
        ),
        (f"AUC of {summary.positive_task}", _by_domain(summary)),
        (
            "AUC, mean of all",
            f"{_number(_mean(summary.auc))} (best possible {_number(_mean(summary.best_possible_auc))})",
        ),
        (
            "GAUC, mean of all",
            f"{_number(_mean(summary.gauc))} (best possible {_number(_mean(summary.best_possible_gauc))})",
        ),
        (
            "table",
            f"{table.rows:,} of {table.capacity:,} rows, {table.bytes:,} of {table.bytes_limit:,} bytes, "
            f"{table.admitted:,} admitted, "
            f"evicted {_counts(table.evicted)}, refused {_counts(table.refused)}",
        ),
        (
            "versions",
            f"{versions.published:,} ({versions.full:,} full, {versions.delta:,} delta), "
            f"last {summary.version or 'none'}, {summary.bytes_pushed:,} bytes",
        ),
        (
            "rows",
            f"{summary.rows_changed:,} changed, {summary.rows_pushed:,} pushed, "
            f"held back {_counts(summary.rows_held_back)}",
        ),
        (
            "freshness",
            f"p50 {_ms(freshness.p50)}, p99 {_ms(freshness.p99)}; after the start "
            f"p50 {_ms(steady.p50)}, p99 {_ms(steady.p99)}",
        ),
        *((replica.name, _verified(replica)) for replica in summary.replicas),
    ]


def _flow(observation: Observation, trainer: TrainerStatus) -> RenderableType:
    produced = _produced(observation, trainer)
    dead = sum(trainer.dead_letters.values())
    grid = Table.grid(padding=(0, 3))
    grid.add_row(
        f"produced {produced:,}",
        f"trained {trainer.impressions_trained:,}",
        f"{trainer.samples_per_s:,.0f}/s",
        f"lag {trainer.lag_impressions:,}",
        f"dead letters {dead:,}",
    )
    grid.add_row(
        f"version {trainer.version or '-'}",
        f"full {trainer.versions_full:,}, delta {trainer.versions_delta:,}",
        f"{trainer.bytes_pushed / 1e6:,.1f} MB pushed",
        f"held back {_counts(trainer.rows_held_back)}",
        f"freshness p50 {_ms(observation.freshness_p50_ms)} p99 {_ms(observation.freshness_p99_ms)}",
    )
    return grid


def _quality(trainer: TrainerStatus, observation: Observation) -> RenderableType:
    best = observation.producer.best_possible_auc if observation.producer else {}
    domains = [domain for domain, tasks in trainer.auc.items() if any(v is not None for v in tasks.values())]
    shown = domains[:_DOMAINS_SHOWN]
    title = "AUC (best possible)" + (f", {len(shown)} of {len(domains)} domains" if shown != domains else "")
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("task")
    for domain in shown:
        table.add_column(domain, justify="right")
    for task in dict.fromkeys(task for domain in shown for task in trainer.auc[domain]):
        cells = [
            f"{_number(trainer.auc[domain].get(task))} ({_number(best.get(domain, {}).get(task))})"
            for domain in shown
        ]
        table.add_row(task, *cells)
    return table


def _table_fill(tables: Sequence[TableStatus]) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("table", "rows", "fill", "bytes", "admitted", "evicted", "refused"):
        table.add_column(name, justify="left" if name in ("table", "evicted", "refused") else "right")
    for status in tables:
        table.add_row(
            status.name,
            f"{status.rows:,} / {status.capacity:,}",
            f"{status.rows / max(1, status.capacity):.0%}",
            f"{status.bytes:,} / {status.bytes_limit:,}",
            f"{status.admitted:,}",
            _counts(status.evicted),
            _counts(status.refused),
        )
    return table


def _replicas(observation: Observation) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("replica", "version", "age", "rows", "ready"):
        table.add_column(name)
    for name, state in observation.replicas.items():
        age = _ms(state.age_ms if state.age_ms >= 0 else None)
        ready = "yes" if state.ready else "no"
        table.add_row(name, str(state.version or "-"), age, f"{state.num_rows:,}", ready)
    return table


def _produced(observation: Observation, trainer: TrainerStatus) -> int:
    """The producer counts what the broker has confirmed; what the trainer has, was produced as well."""
    confirmed = observation.producer.impressions_produced if observation.producer else 0
    return max(confirmed, trainer.impressions_trained)


def _by_domain(summary: Summary) -> str:
    """The positive task's AUC in each domain that has one, with the best possible where it is known."""
    task = summary.positive_task
    parts = []
    for domain, tasks in summary.auc.items():
        value, best = tasks.get(task), summary.best_possible_auc.get(domain, {}).get(task)
        if value is not None:
            parts.append(f"{domain} {value:.4f}" + ("" if best is None else f" (best possible {best:.4f})"))
    more = len(parts) - _DOMAINS_SHOWN
    if more > 0:
        parts[_DOMAINS_SHOWN:] = [f"and {more} more in summary.json"]
    return ", ".join(parts) or "-"


def _rows(tables: Iterable[TableStatus]) -> tuple[int, int]:
    rows = [(table.rows, table.capacity) for table in tables]
    return sum(row for row, _ in rows), sum(capacity for _, capacity in rows)


def _evicted(tables: Iterable[TableStatus]) -> Counter[str]:
    total: Counter[str] = Counter()
    for table in tables:
        total.update(table.evicted)
    return total


def _mean(quality: Quality) -> float | None:
    values = [value for tasks in quality.values() for value in tasks.values() if value is not None]
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ms(value: int | None) -> str:
    return "-" if value is None else f"{value:,} ms"


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{reason} {number:,}" for reason, number in sorted(counts.items()) if number) or "0"


def _verified(replica: ReplicaSummary) -> str:
    version, difference = replica.version or "none", replica.max_abs_diff
    if not replica.predictions_checked:
        return f"version {version}, nothing compared"
    largest = "not a number" if difference is None else f"{difference:.3g}"
    return f"version {version}, {replica.predictions_checked:,} predictions, largest difference {largest}"
