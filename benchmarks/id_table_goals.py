"""The goals of benchmarks.id_table beside what was measured, in words; the worst misses first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LOOKUP_MIN = 20.0
"""Million ids a second, at the first size measured."""
TO_NATIVE_MIN = 0.8
TO_MCH_MIN = 10.0
P999_TO_P50_MAX = 3.0
BYTES_PER_ID_MAX = 24.0
LARGE_TO_SMALL_COST_MAX = 2.0
"""An id at 50M rows against one at 1M."""

LOOKUPS = ("lookup_zipf", "lookup_uniform")
"""Of ids that are held; the goal does not speak of the others."""
MAPS = ("map_hit", "map_new5", "map_new20")
CLOCKS = {"call_ms": "by the clock on the wall", "call_cpu_ms": "by the thread's own time"}
"""The second leaves out the moments in which other processes had the core."""
WORST_SHOWN = 4

Rows = Sequence[Mapping[str, Any]]


def goals(rows: Rows, sizes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Args: rows as printed; sizes: the facts of each table size, the smallest first."""
    small, large = sizes[0]["table_rows"], sizes[-1]["table_rows"]
    lookups = {
        f"{row['case']} beside {row['peer']}": row["ours"]
        for row in rows
        if row["case"] in LOOKUPS and row["table_rows"] == small
    }
    maps = [row for row in rows if row["case"] in MAPS]
    to_native = {_place(row): row["ratio"] for row in maps if row["peer"] == "native"}
    to_mch = {f"{_place(row)} {row['peer']}": row["ratio"] for row in maps if row["peer"].startswith("mch")}
    tails = {
        f"{one['table_rows']:,} rows, {name}": one[key]["ours"]["call_p999_ms"]
        / one[key]["ours"]["call_p50_ms"]
        for one in sizes
        for key, name in CLOCKS.items()
        if key in one
    }
    num_bytes = {f"{one['table_rows']:,} rows": one["bytes_per_id"].get("ours", 0.0) for one in sizes}
    return [
        _at_least(f"lookup at {small:,} rows, M ids/s", lookups, LOOKUP_MIN),
        _at_least("map to the C++ table", to_native, TO_NATIVE_MIN),
        _at_least("map to MCH", to_mch, TO_MCH_MIN),
        _at_most("p99.9 of a call to its median", tails, P999_TO_P50_MAX),
        _at_most("bytes an id", num_bytes, BYTES_PER_ID_MAX),
        _at_most(
            f"cost at {large:,} rows to {small:,}", _cost_ratios(rows, small, large), LARGE_TO_SMALL_COST_MAX
        ),
    ]


def _place(row: Mapping[str, Any]) -> str:
    return f"{_case(row)} {row['table_rows'] / 1e6:g}M"


def _case(row: Mapping[str, Any]) -> str:
    """A lookup's name has its stream in it already."""
    return row["case"] if row["case"].startswith("lookup") else f"{row['case']} {row['stream']}"


def _cost_ratios(rows: Rows, small: int, large: int) -> dict[str, float]:
    """By case and stream, from the pairs with the C++ table; that table's own ratio beside it in the name."""
    if small == large:
        return {}
    of_native = {
        (row["case"], row["stream"], row["table_rows"]): row
        for row in rows
        if row["peer"] == "native" and row["case"] in (*LOOKUPS, "lookup_all_new", *MAPS)
    }
    ratios = {}
    for (case, stream, size), at_large in of_native.items():
        at_small = of_native.get((case, stream, small))
        if size == large and at_small:
            native = at_small["theirs"] / at_large["theirs"]
            ratios[f"{_case(at_large)} (C++ {native:.1f})"] = at_small["ours"] / at_large["ours"]
    return ratios


def _at_least(goal: str, found: Mapping[str, float], limit: float) -> str:
    return _line(
        f"{goal} >= {limit:g}",
        found,
        [name for name in sorted(found, key=found.__getitem__) if found[name] < limit],
    )


def _at_most(goal: str, found: Mapping[str, float], limit: float) -> str:
    worst_first = sorted(found, key=found.__getitem__, reverse=True)
    return _line(f"{goal} <= {limit:g}", found, [name for name in worst_first if found[name] > limit])


def _line(goal: str, found: Mapping[str, float], missed: Sequence[str]) -> str:
    if not found:
        return f"GOAL {goal}: not measured in this run"
    if not missed:
        return f"GOAL {goal}: met, {min(found.values()):.3g} to {max(found.values()):.3g}"
    shown = "; ".join(f"{name}: {found[name]:.3g}" for name in missed[:WORST_SHOWN])
    return f"GOAL {goal}: missed {len(missed)} of {len(found)}: {shown}"
