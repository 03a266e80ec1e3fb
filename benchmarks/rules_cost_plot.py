"""The figure of benchmarks.rules_cost: quality over the bytes of rows that a way of synchronising sends."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import svg


def draw(rows: Sequence[Mapping[str, Any]], folder: Path, *, presets: Collection[str]) -> Path:
    """AUC by bytes, and true GAUC lost by how many times fewer they are. Returns: the file, one SVG.

    Args: presets: the ways that are rule presets; they are filled dots, the others hollow.
    """
    path = folder / "rules_cost.svg"
    with svg(path, panels=2, width=11.5, height=4.2) as (by_bytes, by_ratio):
        for row in rows:
            filled = {} if row["way"] in presets else {"markerfacecolor": "none"}
            for panel, x, y, error in (
                (by_bytes, row["row_mb"], row["auc"], row["auc_95"] or 0.0),
                (by_ratio, row["fewer"], 1e3 * row["true_lost"], 1e3 * (row["true_95"] or 0.0)),
            ):
                panel.errorbar(
                    x, y, yerr=error, marker="o", markersize=4, capsize=2, label=row["way"], **filled
                )
        by_bytes.set_xscale("log", base=2)
        by_bytes.set_xlabel("rows sent, MB", fontsize=8)
        by_bytes.set_ylabel("AUC (bars: paired 95 % interval of what is lost)", fontsize=8)
        by_ratio.axhline(0.5, color="#888888", linewidth=0.8, linestyle="--")
        by_ratio.axvline(13.0, color="#888888", linewidth=0.8, linestyle="--")
        by_ratio.set_xscale("log", base=2)
        by_ratio.set_xlabel("times fewer bytes of rows than every touched row", fontsize=8)
        by_ratio.set_ylabel("GAUC lost (against true probabilities), thousandths", fontsize=8)
        by_ratio.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    return path
