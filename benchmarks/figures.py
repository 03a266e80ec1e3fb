"""The figures of the benchmarks: SVG files that are equal wherever the figures in them are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.served_quality import MEASURES

MEASURE_LABELS = {
    "auc": "AUC",
    "true_auc": "AUC by true probabilities",
    "gauc": "GAUC",
    "true_gauc": "GAUC by true probabilities",
}


@contextmanager
def svg(path: Path, *, panels: int, width: float, height: float) -> Iterator[list[Any]]:
    """The axes of one row of panels; the file is written at the end. Args: width, height: inches."""
    import matplotlib as mpl

    mpl.use("svg")
    # The same figures give the same file: no date, no random names.
    mpl.rcParams["svg.hashsalt"] = path.stem
    mpl.rcParams["svg.fonttype"] = "none"
    from matplotlib import pyplot

    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = pyplot.subplots(1, panels, figsize=(width, height), squeeze=False)
    try:
        yield list(axes[0])
        for panel in axes[0]:
            panel.tick_params(labelsize=7)
            panel.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(path, metadata={"Date": None})
    finally:
        pyplot.close(figure)


def draw_measures(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    place: str,
    places: Mapping[Any, str],
    label: str,
    line: str | None = None,
) -> Path:
    """A panel a measure: its value over places that are drawn evenly spaced, in the order of `places`.

    Args: place: the column that says where a row stands; places: its values and how each is written; line:
        the column whose values are a line each; None = one line. The bars are the paired 95 % intervals.
    Returns: the file.
    """
    order = list(places)
    measures = [measure for measure in MEASURE_LABELS if measure in rows[0]]
    with svg(path, panels=len(measures), width=3.4 * len(measures), height=3.4) as panels:
        for panel, measure in zip(panels, measures, strict=True):
            for name in dict.fromkeys(row[line] if line else "" for row in rows):
                own = [row for row in rows if not line or row[line] == name]
                panel.errorbar(
                    [order.index(row[place]) for row in own],
                    [row[measure] for row in own],
                    yerr=[row[f"{MEASURES[measure]}_95"] or 0.0 for row in own],
                    marker="o",
                    markersize=4,
                    linewidth=1.2,
                    capsize=2,
                    label=name,
                )
            panel.set_xticks(range(len(order)), list(places.values()))
            panel.set_title(MEASURE_LABELS[measure], fontsize=9)
            panel.set_xlabel(label, fontsize=8)
        if line:
            panels[-1].legend(fontsize=7)
    return path
