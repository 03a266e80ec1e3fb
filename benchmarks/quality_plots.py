"""The figures of benchmarks.eviction_quality: AUC and re-entries against the size of the table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.figures import svg

STYLES = {
    "kraken": ("#c1272d", "o"),
    "kraken_count2": ("#f4a582", "h"),
    "kraken_decay50": ("#8b0000", "p"),
    "show_click": ("#e08214", "s"),
    "lru": ("#2166ac", "^"),
    "lfu": ("#1b7837", "v"),
    "distance_lfu": ("#762a83", "D"),
    "ttl_only": ("#8c510a", "P"),
    "random": ("#888888", "x"),
    "hashed": ("#111111", "*"),
    "foresight": ("#5ab4ac", "d"),
}
MEASURES = {
    "auc": "AUC, predict-then-train",
    "re_entries": "ids that left and came back",
}


def draw(rows: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One SVG a measure, one panel a stream. Returns: the files."""
    streams = list(dict.fromkeys(row["stream"] for row in rows))
    files = []
    for measure, label in MEASURES.items():
        path = folder / f"eviction_quality_{measure}.svg"
        with svg(path, panels=len(streams), width=3.1 * len(streams), height=3.4) as panels:
            for panel, stream in zip(panels, streams, strict=True):
                for policy, (colour, marker) in STYLES.items():
                    own = [row for row in rows if row["stream"] == stream and row["policy"] == policy]
                    if not own or (measure == "re_entries" and policy == "hashed"):
                        continue
                    panel.errorbar(
                        [100 * row["share"] for row in own],
                        [row[measure] for row in own],
                        yerr=[row["auc_95"] or 0.0 for row in own] if measure == "auc" else None,
                        color=colour,
                        marker=marker,
                        markersize=4,
                        linewidth=1.2,
                        capsize=2,
                        label=policy,
                    )
                panel.set_title(stream, fontsize=9)
                panel.set_xlabel("table, % of distinct ids", fontsize=8)
            panels[0].set_ylabel(label, fontsize=8)
            panels[-1].legend(fontsize=7)
        files.append(path)
    return files
