"""How the benchmarks measure and report: contestants in turns, medians, a table, and one line of JSON."""

from __future__ import annotations

import datetime
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Batch = TypeVar("Batch")
Seconds = npt.NDArray[np.float64]


def seconds_of(
    act: Callable[[Batch], object],
    batches: Sequence[Batch],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> list[float]:
    """The time of each call."""
    taken = []
    for batch in batches:
        start = clock()
        act(batch)
        taken.append(clock() - start)
    return taken


def in_turns(
    acts: Mapping[str, Callable[[Batch], object]],
    next_round: Callable[[], Sequence[Batch]],
    *,
    rounds: int,
    limit_s: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Seconds]:
    """Let all contestants do the same batches, round by round, so that a busy moment meets all of them.

    Args: next_round: makes a round's batches, outside of the clock; limit_s: no further round begins when
    all calls together have taken so long; clock: time.thread_time leaves out what other processes took.
    Returns: seconds float64 [rounds done, calls] by contestant; at least one round.
    """
    taken: dict[str, list[list[float]]] = {name: [] for name in acts}
    names = list(acts)
    total_s = 0.0
    for turn in range(rounds):
        if total_s > limit_s:
            break
        batches = next_round()
        # Who begins changes, since the first finds the batches cold.
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            taken[name].append(seconds_of(acts[name], batches, clock=clock))
            total_s += sum(taken[name][-1])
    return {name: np.array(rounds_of_one) for name, rounds_of_one in taken.items()}


def median_rate(seconds_RC: Seconds, *, per_call: int) -> float:
    """Million things a second: the median over the rounds."""
    return float(np.median(per_call * seconds_RC.shape[1] / seconds_RC.sum(axis=1)) / 1e6)


def call_times_ms(seconds_RC: Seconds) -> dict[str, float]:
    """p50, p99, p99.9 and the longest of all calls, in milliseconds."""
    ms = 1e3 * seconds_RC.ravel()
    p50, p99, p999 = np.percentile(ms, (50, 99, 99.9))
    return {
        "call_p50_ms": rounded(p50),
        "call_p99_ms": rounded(p99),
        "call_p999_ms": rounded(p999),
        "call_max_ms": rounded(ms.max()),
    }


def rounded(value: float) -> float:
    """Four significant digits: more would be noise."""
    return float(f"{float(value):.4g}")


def machine() -> str:
    """The processor, its cores and memory, and the versions that a figure depends on."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {os.cpu_count()} cores, {memory_gib:.0f} GiB, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, numpy {np.__version__}"
    )


def say(text: str) -> None:
    """A line for the reader, at once: these runs take minutes."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def say_skipped(peer: str, why: str) -> None:
    say(f"SKIPPED {peer}: {why}")


def say_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
    """Aligned columns; numbers to the right, an absent value as a dash."""
    cells = [[_cell(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]
    numeric = [
        all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns
    ]
    for line in [list(columns), *cells]:
        aligned = [
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(line, widths, numeric, strict=True)
        ]
        say("  ".join(aligned).rstrip())


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def say_json(name: str, *, rows: Sequence[Mapping[str, Any]], facts: Mapping[str, Any]) -> None:
    """The last line of every benchmark."""
    record = {
        "name": name,
        "machine": machine(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "rows": list(rows),
        "facts": dict(facts),
    }
    say(json.dumps(record))
