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
from trainer.compare.summary import ALL_DOMAINS, MEAN, METRICS, Column, Row, Summary

BEST, ABOVE, BELOW = "^", "*", "-"
"""Marks of plain text; bold alone would be lost in a file."""
NOT_DEFINED = "n/a"
WIDTH = 100


@dataclass(frozen=True, slots=True)
class Shown:
    """One cell."""

    text: str
    is_best: bool
    mark: str
    """ABOVE, BELOW or nothing."""


@dataclass(frozen=True, slots=True)
class Section:
    """The rows of one domain and metric."""

    title: str
    columns: list[Column]
    lines: list[tuple[Row, list[Shown]]]


def legend(reference: str) -> str:
    return (
        f"{BEST} best of the column (bold). {ABOVE} above, {BELOW} below {reference} with p < {SIGNIFICANT_P} "
        "(paired t-test over seeds, not corrected for the number of cells). us: processor time to train one "
        "impression with all tasks, median."
    )


def sections(summary: Summary) -> Iterator[Section]:
    """Domain by domain, GAUC before AUC."""
    for domain in summary.domains:
        for metric in METRICS:
            columns = [column for column in summary.columns(metric) if column.domain == domain]
            if len(summary.domains) > 1:
                columns.append(Column(ALL_DOMAINS, MEAN, metric))
            lines = [(row, [_shown(summary, row, column) for column in columns]) for row in summary.rows]
            yield Section(f"{domain}, {metric.upper()}", columns, lines)


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


def _heading(column: Column) -> str:
    return "all domains" if column.domain == ALL_DOMAINS else column.task


def _cost(row: Row) -> str:
    return "" if row.cost_us is None else f"{row.cost_us:.0f}"


def print_table(summary: Summary, *, console: Console) -> None:
    """One table, a block of rows for each domain and metric."""
    table = Table(title=None, show_lines=False, pad_edge=False)
    first = True
    for section in sections(summary):
        if first:
            table.add_column("model", no_wrap=True)
            for column in section.columns:
                table.add_column(_heading(column), justify="right")
            table.add_column("us", justify="right")
            first = False
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
    for section in sections(summary):
        names = [_heading(column) for column in section.columns]
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
    lines: list[str] = []
    for section in sections(summary):
        if not lines:
            names = " & ".join(_tex(_heading(column)) for column in section.columns)
            lines += [
                f"\\begin{{tabular}}{{l{'r' * (len(section.columns) + 1)}}}",
                "\\toprule",
                f"model & {names} & $\\mu$s \\\\",
            ]
        width = len(section.columns) + 2
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
    for metric in METRICS:
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
