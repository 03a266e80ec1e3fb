"""The charts of a report, each drawn as one self-contained SVG.

Lines and text that carry no meaning by colour take the page's own colour (currentColor), so a chart
reads on a light and on a dark page; the meaningful colours were chosen to stand out on both.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from trainer.run.freshness import Histogram
from trainer.run.observe import Observation
from trainer.run.status import Quality, TrainerStatus, VersionTrace

_INK = "#010203"
"""Stands for currentColor while matplotlib draws; it knows no such colour."""
_COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#14b8a6", "#eab308", "#ec4899")
_DOMAINS_SHOWN = 6
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.titlesize": 10,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "path.simplify": True,
}


@dataclass(frozen=True, kw_only=True)
class ChartData:
    """Everything the charts are drawn from."""

    history: Sequence[Observation]
    full_versions: Sequence[VersionTrace]
    delta_versions: Sequence[VersionTrace]
    best_possible_auc: Quality
    freshness: Histogram
    started_ms: int
    """Unix milliseconds at t = 0 of the history."""

    @property
    def trained(self) -> list[tuple[float, TrainerStatus]]:
        return [(o.t_s, o.trainer) for o in self.history if o.trainer is not None]


def quality_chart(data: ChartData) -> str:
    """AUC over impressions trained: one panel a task, one line a domain, best possible dashed."""
    statuses = [status for _, status in data.trained if status.auc]
    last: Quality = statuses[-1].auc if statuses else {}
    domains = [name for name, tasks in last.items() if any(v is not None for v in tasks.values())]
    domains = domains[:_DOMAINS_SHOWN]
    tasks = list(dict.fromkeys(task for domain in domains for task in last[domain])) or ["no task yet"]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flatten()
    for panel, task in zip(panels, tasks, strict=False):
        panel.set_title(task)
        for colour, domain in zip(_COLOURS, domains, strict=False):
            values = [status.auc.get(domain, {}).get(task) for status in statuses]
            points = [
                (s.impressions_trained, v) for s, v in zip(statuses, values, strict=True) if v is not None
            ]
            panel.plot(*_columns(points), color=colour, label=domain, linewidth=1.4)
            best = data.best_possible_auc.get(domain, {}).get(task)
            if best is not None:
                panel.axhline(best, color=colour, linestyle="--", linewidth=0.9)
    for panel in panels[len(tasks) :]:
        panel.set_axis_off()
    for panel in panels[max(0, len(tasks) - columns) : len(tasks)]:
        panel.set_xlabel("impressions trained")
    if domains:
        panels[0].legend(fontsize=8)
    return _svg(figure, "quality")


def throughput_chart(data: ChartData) -> str:
    figure, (rate, lag) = _panels(2)
    times = [t for t, _ in data.trained]
    rate.plot(times, [s.samples_per_s for _, s in data.trained], color=_COLOURS[0])
    rate.set_ylabel("impressions/s")
    rate.set_ylim(bottom=0)
    lag.plot(times, [s.lag_impressions for _, s in data.trained], color=_COLOURS[1])
    lag.set_ylabel("lag, impressions")
    lag.set_ylim(bottom=0)
    return _svg(figure, "throughput")


def fill_chart(data: ChartData) -> str:
    """Bytes of each table as a share of its budget, and its rows."""
    figure, (share, rows) = _panels(2)
    for colour, name in zip(_COLOURS, _table_names(data), strict=False):
        found = [(t, table) for t, s in data.trained for table in s.tables if table.name == name]
        times = [t for t, _ in found]
        share.plot(times, [b.bytes / max(1, b.bytes_limit) for _, b in found], color=colour, label=name)
        rows.plot(times, [b.rows for _, b in found], color=colour, label=f"{name} rows")
        rows.plot(
            times, [b.capacity for _, b in found], color=colour, linestyle="--", label=f"{name} capacity"
        )
    share.axhline(1.0, color=_INK, linestyle="--", linewidth=0.9)
    share.set_ylabel("bytes / budget")
    rows.set_ylabel("rows")
    _legend(share, rows)
    return _svg(figure, "fill")


def evictions_chart(data: ChartData) -> str:
    figure, (panel,) = _panels(1)
    totals = []
    for t_s, status in data.trained:
        total: dict[str, int] = {}
        for table in status.tables:
            for reason, number in table.evicted.items():
                total[reason] = total.get(reason, 0) + number
        totals.append((t_s, total))
    reasons = sorted({reason for _, total in totals for reason in total})
    for colour, reason in zip(_COLOURS, reasons, strict=False):
        points = [(t, total.get(reason, 0)) for t, total in totals]
        panel.plot(*_columns(points), color=colour, label=reason)
    panel.set_ylabel("rows evicted so far")
    _legend(panel)
    return _svg(figure, "evictions")


def freshness_chart(data: ChartData) -> str:
    """p50 and p99 as the run went on, and the distribution over all impressions."""
    figure, (course, shares) = _panels(2)
    for colour, name in ((_COLOURS[0], "p50"), (_COLOURS[1], "p99")):
        values = [(o.t_s, getattr(o, f"freshness_{name}_ms")) for o in data.history]
        points = [(t, max(1, v)) for t, v in values if v is not None]
        course.plot(*_columns(points), color=colour, label=name)
    course.set_yscale("log")
    _plain_numbers(course.yaxis)
    course.set_ylabel("ms, stream to replica")
    points = [(max(1, value), share) for value, share in data.freshness.shares()]
    shares.step(*_columns(points), where="post", color=_COLOURS[0])
    shares.set_xscale("log")
    _plain_numbers(shares.xaxis)
    shares.set_xlabel("ms, stream to replica")
    shares.set_ylabel("share of impressions")
    _legend(course)
    return _svg(figure, "freshness")


def versions_chart(data: ChartData) -> str:
    figure, (sizes, total) = _panels(2)
    kinds = (("full", data.full_versions), ("delta", data.delta_versions))
    for colour, (kind, traces) in zip(_COLOURS, kinds, strict=False):
        points = [((v.committed_ms - data.started_ms) / 1000, max(1, v.num_bytes)) for v in traces]
        sizes.plot(*_columns(points), ".", color=colour, markersize=3, label=kind)
    sizes.set_yscale("log")
    _plain_numbers(sizes.yaxis)
    sizes.set_ylabel("bytes of a version")
    times = [t for t, _ in data.trained]
    total.plot(times, [s.bytes_pushed / 1e6 for _, s in data.trained], color=_COLOURS[2])
    total.set_ylabel("MB pushed so far")
    _legend(sizes)
    return _svg(figure, "versions")


CHARTS: tuple[tuple[str, str, Callable[[ChartData], str]], ...] = (
    ("quality", "Quality: AUC by task and domain; dashed is the best possible", quality_chart),
    ("throughput", "Training pace and lag", throughput_chart),
    ("fill", "Table fill against its budget", fill_chart),
    ("evictions", "Evictions by reason", evictions_chart),
    ("freshness", "Freshness: from entering the stream to visible at a replica", freshness_chart),
    ("versions", "Versions and their bytes", versions_chart),
)
"""(anchor, heading, drawing function), in the report's order."""


def draw(data: ChartData) -> list[tuple[str, str, str]]:
    """Returns: (anchor, heading, SVG) of each chart."""
    with mpl.rc_context(_STYLE):
        return [(anchor, heading, make(data)) for anchor, heading, make in CHARTS]


def _panels(count: int) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(10.2, 2.8), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False)[0]
    for panel in panels:
        panel.set_xlabel("s since the start")
    return figure, panels


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _plain_numbers(axis: Any) -> None:
    """400 in place of 4 × 10^2; between the powers of ten only where there are few of them."""
    axis.set_major_formatter(LogFormatter())
    axis.set_minor_formatter(LogFormatter(minor_thresholds=(1.2, 0.5)))


def _legend(*panels: Any) -> None:
    for panel in panels:
        if panel.get_legend_handles_labels()[1]:
            panel.legend(fontsize=8)


def _table_names(data: ChartData) -> list[str]:
    return list(dict.fromkeys(table.name for _, status in data.trained for table in status.tables))


def _svg(figure: Figure, anchor: str) -> str:
    """The figure without XML prolog, metadata and namespace addresses, which HTML does not need."""
    file = io.StringIO()
    # The salt keeps ids of one chart from meaning another's shapes on the same page.
    with mpl.rc_context({"svg.hashsalt": anchor}):
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", text)
    return text.replace(_INK, "currentColor")
