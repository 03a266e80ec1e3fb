"""The figure of benchmarks.rules_cost: true GAUC lost over how many times fewer bytes a way sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """One SVG. Returns: the file."""
    import matplotlib as mpl

    mpl.use("svg")
    # The same figures give the same file: no date, no random names.
    mpl.rcParams["svg.hashsalt"] = "rules_cost"
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    folder.mkdir(parents=True, exist_ok=True)
    figure, panel = pyplot.subplots(figsize=(7.0, 4.2))
    for row in rows:
        error = row["true_95"] or 0.0
        panel.errorbar(
            row["fewer"], 1e3 * row["true_lost"], yerr=1e3 * error, marker="o", markersize=4, capsize=2
        )
        panel.annotate(
            row["way"],
            (row["fewer"], 1e3 * row["true_lost"]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
        )
    panel.axhline(0.5, color="#888888", linewidth=0.8, linestyle="--")
    panel.axvline(13.0, color="#888888", linewidth=0.8, linestyle="--")
    panel.set_xscale("log", base=2)
    panel.set_xlabel("times fewer bytes of rows than every touched row, float32, every pass", fontsize=8)
    panel.set_ylabel("GAUC lost (against true probabilities), thousandths", fontsize=8)
    panel.tick_params(labelsize=7)
    panel.grid(alpha=0.3)
    figure.tight_layout()
    path = folder / "rules_cost.svg"
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
    return path
