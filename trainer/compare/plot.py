"""The figure: mean GAUC of each model by domain, with its 95 % interval."""

from __future__ import annotations

from pathlib import Path

from trainer.compare.summary import MEAN, Column, Row, Summary

BASELINE, OURS, REFERENCE = "#2166ac", "#c1272d", "#888888"


def draw(summary: Summary, path: Path) -> None:
    """Write one SVG, a panel a domain; the same figures give the same file."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    domains = summary.domains
    rows = list(reversed(summary.rows))
    figure = Figure(figsize=(2.2 + 2.9 * len(domains), 1.0 + 0.26 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(domains), squeeze=False, sharey=True)[0]
    for panel, domain in zip(panels, domains, strict=True):
        column = Column(domain, MEAN, "gauc")
        for place, row in enumerate(rows):
            found = row.means.get(column)
            if found is not None:
                colour = _colour(row)
                panel.errorbar(
                    found.mean,
                    place,
                    xerr=found.half_width or 0.0,
                    fmt="o",
                    color=colour,
                    markersize=4,
                    capsize=2,
                )
        panel.set_title(domain, fontsize=9)
        panel.set_xlabel("mean GAUC of the tasks", fontsize=8)
        panel.tick_params(labelsize=7)
        panel.grid(alpha=0.3)
    panels[0].set_yticks(range(len(rows)), [row.name for row in rows])
    with mpl.rc_context({"svg.hashsalt": "compare", "svg.fonttype": "none"}):
        figure.savefig(path, format="svg", metadata={"Date": None})


def _colour(row: Row) -> str:
    if row.cost_us is None:
        return REFERENCE
    return BASELINE if row.is_baseline else OURS
