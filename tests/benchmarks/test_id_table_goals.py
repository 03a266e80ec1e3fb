"""The goals say plainly what was missed, and by which figure."""

from __future__ import annotations

from typing import Any

from benchmarks.id_table_goals import goals


def row(case: str, peer: str, ours: float, theirs: float, *, size: int = 1_000_000) -> dict[str, Any]:
    place = {"case": case, "stream": "zipf", "table_rows": size, "peer": peer}
    return {**place, "ours": ours, "theirs": theirs, "ratio": ours / theirs}


def size_facts(size: int, *, num_bytes: float, p999_ms: float) -> dict[str, Any]:
    calls = {"ours": {"call_p50_ms": 1.0, "call_p999_ms": p999_ms}}
    return {"table_rows": size, "bytes_per_id": {"ours": num_bytes}, "call_ms": calls}


def test_every_goal_is_met_by_figures_that_meet_it():
    rows = [
        row("lookup_zipf", "native", 30, 40),
        row("map_hit", "native", 9, 10),
        row("map_hit", "mch_lfu_1", 9, 0.5),
    ]
    rows.append(row("lookup_zipf", "native", 16, 30, size=50_000_000))
    sizes = [size_facts(s, num_bytes=23.9, p999_ms=2.9) for s in (1_000_000, 50_000_000)]
    lines = goals(rows, sizes)
    assert len(lines) == 6
    assert all(": met" in line for line in lines), lines


def test_every_goal_is_missed_by_figures_that_miss_it():
    rows = [
        row("lookup_zipf", "native", 19, 40),
        row("map_hit", "native", 7, 10),
        row("map_hit", "mch_lfu_10", 9, 1),
    ]
    rows.append(row("lookup_zipf", "native", 9, 30, size=50_000_000))
    sizes = [size_facts(s, num_bytes=44, p999_ms=3.1) for s in (1_000_000, 50_000_000)]
    lines = goals(rows, sizes)
    assert all("missed" in line for line in lines), lines
    assert "lookup_zipf beside native: 19" in lines[0]
    assert "map_hit zipf 1M: 0.7" in lines[1]


def test_what_a_run_did_not_measure_is_not_called_met():
    lines = goals(
        [row("lookup_zipf", "faiss", 30, 40)], [{"table_rows": 1_000_000, "bytes_per_id": {"ours": 20.0}}]
    )
    assert [line.split(": ")[-1] for line in lines[1:4]] == ["not measured in this run"] * 3
