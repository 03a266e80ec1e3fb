"""The table: printed with rich, written as Markdown, LaTeX and CSV.

All four show the same cells: the mean over seeds, the best of a column in bold, and a mark where the paired
test tells a row from the column's reference.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table
from rich.text import Text

from trainer.compare.statistics import CONFIDENCE, SIGNIFICANT_P
from trainer.compare.summary import ALL_DOMAINS, MEAN, Column, Row, Summary

BEST, ABOVE, BELOW = "^", "*", "-"
"""Marks of plain text; bold alone would be lost in a file."""
NOT_DEFINED = "n/a"
MODEL_WIDTH = 20
WIDTH = 120
"""Of the printed table; on a narrower terminal its lines wrap, but no figure is cut."""
TITLES = {"gauc": "GAUC", "auc": "AUC", "expected_gauc": "expected GAUC"}


@dataclass(frozen=True, slots=True)
class Shown:
    """One cell."""

    text: str
    is_best: bool
    mark: str
    """ABOVE, BELOW or nothing."""


@dataclass(frozen=True, slots=True)
class Section:
    """The rows of one domain and metric; a cell for each task and one for their mean."""

    title: str
    lines: list[tuple[Row, list[Shown]]]


def legend(summary: Summary, *, reference: str) -> str:
    expected = " expected GAUC: against the true probabilities." if "expected_gauc" in summary.metrics else ""
    return (
        f"{BEST} best of the column (bold). {ABOVE} above, {BELOW} below {reference} with p < "
        f"{SIGNIFICANT_P}\n(paired t-test over seeds, not corrected for the number of cells). us: processor "
        f"time to train one\nimpression with all tasks, median.{expected}"
    )


def sections(summary: Summary) -> Iterator[Section]:
    """Domain by domain, GAUC first; the means of all domains last."""
    for domain in (*summary.domains, *([ALL_DOMAINS] if len(summary.domains) > 1 else [])):
        for metric in summary.metrics:
            columns = [
                Column(domain, task, metric) if domain != ALL_DOMAINS or task == MEAN else None
                for task in (*summary.tasks, MEAN)
            ]
            lines = [
                (row, [_shown(summary, row, one) if one else Shown("", False, "") for one in columns])
                for row in summary.rows
            ]
            where = "all domains" if domain == ALL_DOMAINS else domain
            yield Section(f"{where}, {TITLES[metric]}", lines)


def _shown(summary: Summary, row: Row, column: Column) -> Shown:
    found = row.means.get(column)
    if found is None:
        return Shown(NOT_DEFINED, False, "")
    difference = row.differences.get(column)
    mark = ""
    # A baseline below the best one is no news.
    if difference is not None and difference.is_significant and not row.is_baseline:
        mark = ABOVE if difference.mean > 0 else BELOW
    return Shown(f"{found.mean:.4f}", summary.best.get(column) == row.name, mark)


def _cost(row: Row) -> str:
    return "" if row.cost_us is None else f"{row.cost_us:.0f}"


def print_table(summary: Summary, *, console: Console) -> None:
    """One table, a block of rows for each domain and metric."""
    table = Table(title=None, show_lines=False, pad_edge=False)
    # A title may take two lines.
    table.add_column("model", max_width=MODEL_WIDTH)
    for name in (*summary.tasks, MEAN, "us"):
        table.add_column(name, justify="right", no_wrap=True)
    for section in sections(summary):
        table.add_row(Text(section.title, style="italic"))
        for row, cells in section.lines:
            texts = [
                Text(
                    cell.text + (BEST if cell.is_best else "") + cell.mark,
                    style="bold" if cell.is_best else "",
                )
                for cell in cells
            ]
            table.add_row(row.name, *texts, _cost(row))
        table.add_section()
    console.print(table)


def to_text(summary: Summary) -> str:
    """The printed table as plain text."""
    file = io.StringIO()
    print_table(summary, console=Console(file=file, width=WIDTH, no_color=True))
    return file.getvalue()


def to_markdown(summary: Summary) -> str:
    parts = []
    names = [*summary.tasks, MEAN]
    for section in sections(summary):
        parts.append(f"### {section.title}\n")
        parts.append("| model | " + " | ".join(names) + " | µs |")
        parts.append("|---|" + "---|" * (len(names) + 1))
        for row, cells in section.lines:
            texts = [(f"**{c.text}**" if c.is_best else c.text) + _escaped(c.mark) for c in cells]
            parts.append(f"| {row.name} | " + " | ".join(texts) + f" | {_cost(row)} |")
        parts.append("")
    return "\n".join(parts)


def _escaped(mark: str) -> str:
    return f"\\{mark}" if mark == ABOVE else mark


def to_latex(summary: Summary) -> str:
    """One tabular for booktabs, a block of rows for each domain and metric."""
    names = [_tex(name) for name in (*summary.tasks, MEAN)]
    lines = [
        f"\\begin{{tabular}}{{l{'r' * (len(names) + 1)}}}",
        "\\toprule",
        f"model & {' & '.join(names)} & $\\mu$s \\\\",
    ]
    for section in sections(summary):
        width = len(names) + 2
        lines += ["\\midrule", f"\\multicolumn{{{width}}}{{l}}{{\\emph{{{_tex(section.title)}}}}} \\\\"]
        for row, cells in section.lines:
            texts = []
            for cell in cells:
                text = f"\\textbf{{{cell.text}}}" if cell.is_best else cell.text
                texts.append(text + (f"$^{{{cell.mark}}}$" if cell.mark else ""))
            lines.append(f"{_tex(row.name)} & {' & '.join(texts)} & {_cost(row)} \\\\")
    return "\n".join([*lines, "\\bottomrule", "\\end{tabular}"]) + "\n"


def _tex(text: str) -> str:
    return "".join(f"\\{char}" if char in "_&%#$" else char for char in text)


CSV_COLUMNS = (
    *("model", "domain", "task", "metric", "mean", "half_width_95", "seeds", "best"),
    *("reference", "difference", "difference_half_width_95", "p", "cost_us", "parameters", "by_seed"),
)


def to_csv(summary: Summary) -> str:
    """One line a model and column, with everything; by_seed is `seed=value` with spaces between."""
    file = io.StringIO()
    writer = csv.DictWriter(file, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for metric in summary.metrics:
        for column in summary.columns(metric):
            for row in summary.rows:
                writer.writerow(_csv_line(summary, row, column))
    return file.getvalue()


def _csv_line(summary: Summary, row: Row, column: Column) -> dict[str, object]:
    found, difference = row.means.get(column), row.differences.get(column)
    line: dict[str, object] = {"model": row.name, **column._asdict(), "parameters": row.parameters}
    line["cost_us"] = "" if row.cost_us is None else f"{row.cost_us:.2f}"
    if found is not None:
        line |= {
            "mean": f"{found.mean:.6f}",
            "half_width_95": _number(found.half_width),
            "seeds": found.seeds,
            "best": int(summary.best.get(column) == row.name),
            "by_seed": " ".join(f"{seed}={value:.6f}" for seed, value in sorted(row.by_seed[column].items())),
        }
    if difference is not None:
        line |= {
            "reference": summary.references[column],
            "difference": f"{difference.mean:.6f}",
            "difference_half_width_95": _number(difference.half_width),
            "p": "" if difference.p is None else f"{difference.p:.4g}",
        }
    return line


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


assert CONFIDENCE == 0.95, "the names of CSV columns say 95"
