"""A measured stream as text: every figure beside Table 1's, and how far it is off."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from trainer.data.calibration import Calibration, Overlaps

NAME_WIDTH = 18
CELL_WIDTH = 28


def report(found: Calibration) -> str:
    """Cells are stream / Table 1 (deviation of the first from the second)."""
    lines = [
        f"Synthetic stream, preset {found.preset}, seed {found.seed}, {found.impressions} impressions.",
        "Its users, items and tastes are drawn at random; only rates, shares and overlaps imitate PEPNet's "
        "Table 1.",
        "",
        "Stream / Table 1 (deviation)",
        _row("", found.domains, width=CELL_WIDTH),
        _beside("impressions", found.shares_D, found.table_shares_D),
    ]
    lines += [
        _beside(task, found.rates_DT[:, index], found.table_rates_DT[:, index])
        for index, task in enumerate(found.tasks)
    ]
    for what, overlaps, shown, table in (
        ("Users", found.user_overlaps, found.shown_user_overlaps, found.table_user_overlaps),
        ("Items", found.item_overlaps, found.shown_item_overlaps, found.table_item_overlaps),
    ):
        lines += ["", *_overlap_lines(what, found.domains, overlaps, shown, table)]
    lines += ["", f"Largest deviation: {_largest(found)}"]
    for name, values_DT in (("AUC", found.best_auc_DT), ("GAUC", found.best_gauc_DT)):
        lines += ["", f"Best possible {name}: that of the true probability"]
        lines += _table(found.tasks, found.domains, values_DT.T, digits=4)
    lines += ["", "Positives to judge by"]
    lines += _table(found.tasks, found.domains, found.positives_DT.T, digits=0)
    lines += [
        "",
        "Seesaw: correlation of true logits over the items of a user, between tasks (1 = no conflict)",
    ]
    lines += _table(found.tasks, found.tasks, found.task_correlation_TT, digits=2)
    if len(found.domains) > 1:
        lines += ["", "and between domains"]
        lines += _table(found.domains, found.domains, found.domain_correlation_DD, digits=2)
    distinct = ", ".join(f"{name} {num}" for name, num in found.num_distinct.items())
    lines += ["", f"Distinct ids shown: {distinct}"]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _row(name: str, cells: tuple[str, ...] | list[str], *, width: int) -> str:
    return f"{name:{NAME_WIDTH}}" + "".join(f"{cell:>{width}}" for cell in cells)


def _beside(name: str, found_D: npt.NDArray[np.float64], table_D: npt.NDArray[np.float64]) -> str:
    cells = [
        f"{100 * value:.2f} / {100 * table:.2f} % ({value / table - 1:+.1%})"
        for value, table in zip(found_D, table_D, strict=True)
    ]
    return _row(name, cells, width=CELL_WIDTH)


def _overlap_lines(
    what: str, domains: tuple[str, ...], overlaps: Overlaps, shown: Overlaps, table: Overlaps
) -> list[str]:
    if not overlaps:
        return [f"{what}: one domain, nothing to overlap with"]
    return [f"{what} of one domain that another one has too: population / Table 1; of those shown"] + [
        f"{domains[a]} in {domains[b]}: {100 * share:.2f} / {100 * table[a, b]:.2f} % "
        f"({100 * (share - table[a, b]):+.2f} points); {_percent(shown[a, b])}"
        for (a, b), share in overlaps.items()
    ]


def _percent(share: float) -> str:
    return "none shown" if np.isnan(share) else f"{100 * share:.2f} %"


def _largest(found: Calibration) -> str:
    """The rate that is relatively furthest off, and the overlap that is by most points."""
    off_DT = np.abs(found.rates_DT / found.table_rates_DT - 1)
    domain, task = np.unravel_index(np.nanargmax(off_DT), off_DT.shape)
    text = f"rate of {found.tasks[task]} in {found.domains[domain]}, {off_DT[domain, task]:.1%} of it"
    points = [abs(share - found.table_user_overlaps[pair]) for pair, share in found.user_overlaps.items()]
    points += [abs(share - found.table_item_overlaps[pair]) for pair, share in found.item_overlaps.items()]
    return text + (f"; overlaps of the population, {100 * max(points):.2f} points" if points else "")


def _table(
    rows: tuple[str, ...], columns: tuple[str, ...], values: npt.NDArray[np.number], *, digits: int
) -> list[str]:
    width = 2 + max(len(name) for name in columns)
    lines = [_row("", columns, width=width)]
    for name, row in zip(rows, values, strict=True):
        cells = ["not defined" if np.isnan(value) else f"{value:.{digits}f}" for value in row]
        lines.append(_row(name, cells, width=width))
    return lines
