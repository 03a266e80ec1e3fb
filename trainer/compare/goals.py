"""What the comparison is held against: PEPNet's published gain, and that each ablation loses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from trainer.compare.statistics import SIGNIFICANT_P, Difference, paired
from trainer.compare.summary import ALL_DOMAINS, MEAN, PEPNET, Column, Row, Summary

GAINS = {"discovery": 0.0095, "featured_video": 0.0151, "slide": 0.0124}
"""Gain in mean GAUC over the best baseline, by domain (arXiv 2302.01115, Table 2)."""
CELLS_SHARE = 15 / 18


Aim = Literal["published_gain", "no_win", "not_below"]
"""What is expected of PEPNet: its published gain; no significant gain (a stream without what it is made for);
or to be at no baseline's heels beyond noise (a recording)."""


def goal_lines(summary: Summary, *, aim: Aim = "published_gain") -> list[str]:
    """One line a goal, each saying `met` or `missed` and by how much; nothing without PEPNet or baselines."""
    pepnet = summary.row(PEPNET)
    baselines = [row for row in summary.rows if row.is_baseline]
    if pepnet is None or not baselines:
        return []
    lines = [f"baselines compared with: {len(baselines)} ({', '.join(row.name for row in baselines)})"]
    for domain in summary.domains:
        column = Column(domain, MEAN, "gauc")
        best = summary.references.get(column)
        if best is None or column not in pepnet.means:
            lines.append(f"GOAL mean GAUC in {domain}: not decided, it is not defined in this data")
            continue
        difference = pepnet.differences.get(column)
        if difference is None:
            lines.append(f"GOAL mean GAUC in {domain}: not decided, pepnet and {best} share no seed")
            continue
        lines.append(
            f"GOAL mean GAUC in {domain}: pepnet {pepnet.means[column].mean:.4f}, best baseline {best} "
            f"{pepnet.means[column].mean - difference.mean:.4f}: {_said(difference)}; "
            f"{_verdict(difference, domain=domain, aim=aim)}"
        )
        expected = pepnet.differences.get(Column(domain, MEAN, "expected_gauc"))
        if expected is not None:
            against = summary.references[Column(domain, MEAN, "expected_gauc")]
            lines.append(f"  by the true probabilities, against {against}: {_said(expected)}")
        strict = _cell_by_cell(summary, pepnet, domain=domain)
        if strict is not None:
            lines.append(f"  against the best baseline of every single cell of {domain}: {_said(strict)}")
    lines.append(_cells_line(summary, pepnet, aim=aim))
    return lines


def _said(difference: Difference) -> str:
    within = "" if difference.half_width is None else f" ± {difference.half_width:.4f}"
    p = "no test with one seed" if difference.p is None else f"p = {difference.p:.3g}"
    return f"{difference.mean:+.4f}{within} ({p}, {difference.pairs} seeds)"


def _verdict(difference: Difference, *, domain: str, aim: Aim) -> str:
    if aim == "no_win":
        wins = difference.mean > 0 and (difference.is_significant or difference.p is None)
        return f"goal no gain with p < {SIGNIFICANT_P}: {'missed' if wins else 'met'}"
    if aim == "not_below":
        below = difference.mean < 0 and (difference.is_significant or difference.p is None)
        return f"goal not below with p < {SIGNIFICANT_P}: {'missed' if below else 'met'}"
    goal = GAINS.get(domain, 0.0)
    missed = []
    if difference.mean < goal:
        missed.append(f"by {goal - difference.mean:.4f}")
    if not difference.is_significant:
        missed.append("not significant" if difference.p is not None else "significance unknown")
    verdict = f"missed, {', '.join(missed)}" if missed else "met"
    return f"goal {goal:+.4f} with p < {SIGNIFICANT_P}: {verdict}"


def _cell_by_cell(summary: Summary, pepnet: Row, *, domain: str) -> Difference | None:
    """The mean over tasks of PEPNet's gain over whichever baseline is best at that task.

    The harder reading of the goal: the best of many baselines, chosen by the very figures that it is judged
    by, is better than any one of them is.
    """
    ours: dict[int, list[float]] = {}
    theirs: dict[int, list[float]] = {}
    for task in summary.tasks:
        column = Column(domain, task, "gauc")
        best = summary.row(summary.references.get(column, ""))
        if best is None:
            continue
        for seed in pepnet.by_seed.get(column, {}).keys() & best.by_seed[column].keys():
            ours.setdefault(seed, []).append(pepnet.by_seed[column][seed])
            theirs.setdefault(seed, []).append(best.by_seed[column][seed])
    return paired(*({seed: sum(v) / len(v) for seed, v in side.items()} for side in (ours, theirs)))


def _cells_line(summary: Summary, pepnet: Row, *, aim: Aim) -> str:
    decided = [
        (column, pepnet.differences[column])
        for column in summary.columns("gauc")
        if column.task != MEAN and column in pepnet.differences
    ]
    above = [column for column, difference in decided if difference.mean > 0]
    significant = [column for column, one in decided if one.mean > 0 and one.is_significant]
    below = [
        f"{column.domain}/{column.task} {difference.mean:+.4f} ({summary.references[column]})"
        for column, difference in decided
        if difference.mean <= 0
    ]
    num = len(summary.domains) * len(summary.tasks)
    least = -int(-CELLS_SHARE * num // 1)
    line = (
        f"pepnet's GAUC is above the best baseline in {len(above)} of {num} domain x task cells "
        f"({len(significant)} with p < {SIGNIFICANT_P})"
    )
    if aim == "published_gain":
        line = f"GOAL cells: {line}, goal {least}: {'met' if len(above) >= least else 'missed'}"
    return line + (f"; not above in {', '.join(below)}" if below else "")


def ablation_lines(summary: Summary, *, must_lose: Sequence[str]) -> list[str]:
    """Whether each ablation is below the whole model in mean GAUC over all domains."""
    lines = []
    domain = ALL_DOMAINS if len(summary.domains) > 1 else summary.domains[0]
    for name in must_lose:
        row = summary.row(name)
        difference = None if row is None else row.differences.get(Column(domain, MEAN, "gauc"))
        if difference is None:
            lines.append(f"GOAL ablation {name} loses: not decided, it was not run")
            continue
        verdict = "met" if difference.mean < 0 else "missed"
        if verdict == "met" and not difference.is_significant:
            verdict = "met in the mean, not significant"
        lines.append(f"GOAL ablation {name} loses mean GAUC: {_said(difference)}: {verdict}")
        assert row is not None
        expected = row.differences.get(Column(domain, MEAN, "expected_gauc"))
        if expected is not None:
            lines.append(f"  by the true probabilities: {_said(expected)}")
    return lines
