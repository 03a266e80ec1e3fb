"""The report of a run: one HTML page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from trainer.run.charts import ChartData, draw
from trainer.run.live_view import final_numbers
from trainer.run.status import Quality
from trainer.run.summary import Summary

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --line: #d5dae0;
        --good: #15803d; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --paper: #15181c; --line: #3a4048; --good: #4ade80; --bad: #f87171; }
}
body { color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif;
       max-width: 66rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2.2rem; }
figure { margin: 0; overflow-x: auto; } figure svg { max-width: 100%; height: auto; color: var(--ink); }
table { border-collapse: collapse; } .wide { overflow-x: auto; }
th, td { text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--line);
         vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.good { color: var(--good); } .bad { color: var(--bad); font-weight: 600; }
"""


def render_report(summary: Summary, data: ChartData) -> str:
    """The whole page; every text from outside is escaped."""
    charts = [
        f'<h2 id="{anchor}">{escape(heading)}</h2>\n<figure>{svg}</figure>'
        for anchor, heading, svg in draw(data)
    ]
    passed = all(check.passed for check in summary.checks)
    verdict = '<span class="good">all checks passed</span>' if passed else '<span class="bad">failed</span>'
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Freshet run: {escape(summary.preset)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Freshet run: {escape(summary.preset)}, {verdict}</h1>",
        f"<p>Started {escape(summary.started_at)}, {summary.duration_s:.1f} s, on {escape(summary.machine)}. "
        f"Seed {summary.seed}, configuration {escape(summary.config_hash)}.</p>",
        '<h2 id="checks">Checks</h2>',
        _checks(summary),
        *charts,
        '<h2 id="quality-by-domain">Quality by domain and task</h2>',
        "<p>AUC and GAUC over the newest impressions; in brackets the best possible.</p>",
        _quality(summary),
        '<h2 id="numbers">Numbers</h2>',
        _rows([*final_numbers(summary), *_counters(summary)]),
        "</body></html>",
    ]
    return "\n".join(parts) + "\n"


def _checks(summary: Summary) -> str:
    rows = [
        f'<tr><td>{escape(check.name)}</td><td class="{"good" if check.passed else "bad"}">'
        f"{'ok' if check.passed else 'failed'}</td><td>{escape(check.detail)}</td></tr>"
        for check in summary.checks
    ]
    return '<div class="wide"><table>' + "".join(rows) + "</table></div>"


def _quality(summary: Summary) -> str:
    tasks = list(dict.fromkeys(task for by_task in summary.auc.values() for task in by_task))
    head = "".join(f'<th class="number">{escape(task)}</th>' for task in tasks)
    rows = [f"<tr><th>domain</th><th></th>{head}</tr>"]
    for name, values, best in (
        ("AUC", summary.auc, summary.best_possible_auc),
        ("GAUC", summary.gauc, summary.best_possible_gauc),
    ):
        rows += [_quality_row(domain, name, tasks, (values, best)) for domain in summary.auc]
    return '<div class="wide"><table>' + "".join(rows) + "</table></div>"


def _quality_row(domain: str, name: str, tasks: Sequence[str], qualities: tuple[Quality, Quality]) -> str:
    cells = []
    for task in tasks:
        value, best = (quality.get(domain, {}).get(task) for quality in qualities)
        text = ("-" if value is None else f"{value:.4f}") + ("" if best is None else f" ({best:.4f})")
        cells.append(f'<td class="number">{text}</td>')
    return f"<tr><td>{escape(domain)}</td><td>{name}</td>{''.join(cells)}</tr>"


def _counters(summary: Summary) -> Iterable[tuple[str, str]]:
    """Every reason with its counter on a line of its own, as the terminal has no room for them."""
    for title, counts in (
        ("evicted", summary.table.evicted),
        ("refused", summary.table.refused),
        ("held back", summary.rows_held_back),
        ("dead letters", summary.dead_letter_reasons),
    ):
        for reason, number in sorted(counts.items()):
            yield f"{title}: {reason}", f"{number:,}"


def _rows(rows: Iterable[tuple[str, str]]) -> str:
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="wide"><table>{body}</table></div>'
