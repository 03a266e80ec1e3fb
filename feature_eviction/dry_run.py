"""What would a policy evict from this stream? The table alone, without a model, and a picture of it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from feature_eviction.event_file import Events
from feature_eviction.id_table import IdTable
from feature_eviction.keys import deduplicate
from feature_eviction.layout import EVICTED_REASONS
from feature_eviction.policy import TablePolicy

CALL_IDS = 1024
FORGOTTEN_IDS_MAX = 5_000_000
"""Keys that left and are remembered, to see which come back."""


class Point(NamedTuple):
    """The table after one piece of the stream; counts since the beginning."""

    now_s: int
    sightings: int
    hits: int
    """Sightings whose id had a row."""
    re_entries: int
    """Admissions of ids that had a row before."""
    rows: int
    evicted: dict[str, int]
    refused: dict[str, int]


class DryRun(NamedTuple):
    table: IdTable
    points: list[Point]


def dry_run(policy: TablePolicy, pieces: Iterable[Events]) -> DryRun:
    """Feed the stream in calls of CALL_IDS sightings, each released at once; one point a piece."""
    table = IdTable(policy)
    gone: set[int] = set()
    points: list[Point] = []
    sightings = hits = re_entries = 0
    for piece in pieces:
        now_s = 0
        for start in range(0, len(piece.keys_N), CALL_IDS):
            part = slice(start, start + CALL_IDS)
            unique = deduplicate(piece.keys_N[part], piece.positives_N[part])
            now_s = int(piece.times_s_N[part].max())
            held_U = table.lookup(unique.keys_U) >= 0
            result = table.map(
                unique.keys_U, shows_N=unique.shows_U, positives_N=unique.positives_U, now_s=now_s
            )
            table.release(result.batch)
            sightings += int(unique.shows_U.sum())
            hits += int(unique.shows_U[held_U].sum())
            # First those that left: an expired row's id may come back in the very call.
            if len(gone) < FORGOTTEN_IDS_MAX:
                gone.update(result.evicted_keys_K.tolist())
            returned = gone.intersection(result.new_keys_M.tolist())
            re_entries += len(returned)
            gone -= returned
        counters = table.counters()
        points.append(
            Point(
                now_s=now_s,
                sightings=sightings,
                hits=hits,
                re_entries=re_entries,
                rows=counters.rows,
                evicted=counters.evicted,
                refused=counters.refused,
            )
        )
    return DryRun(table, points)


def plot(run: DryRun, path: Path) -> None:
    """Rows and hit rate above, evictions by reason and re-entries below, over event time. SVG or PNG."""
    matplotlib.rcParams["svg.hashsalt"] = "freshet"
    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    hours = np.array([point.now_s - run.points[0].now_s for point in run.points]) / 3600
    above.plot(hours, [point.rows for point in run.points], label="rows held")
    above.axhline(run.table.policy.num_slots, linestyle=":", color="grey", label="slots")
    above.set_ylabel("rows")
    above.set_ylim(bottom=0)
    rates = above.twinx()
    rates.plot(hours, [point.hits / max(1, point.sightings) for point in run.points], color="tab:green")
    rates.set_ylabel("hit rate so far", color="tab:green")
    rates.set_ylim(0, 1)
    above.legend(loc="lower right")
    reasons = [reason for reason in EVICTED_REASONS if run.points[-1].evicted[reason]]
    if reasons:
        below.stackplot(
            hours, [[point.evicted[reason] for point in run.points] for reason in reasons], labels=reasons
        )
    below.plot(hours, [point.re_entries for point in run.points], color="black", label="came back")
    below.set_xlabel("hours of event time")
    below.set_ylabel("rows evicted so far")
    below.legend(loc="upper left")
    figure.savefig(path)
