"""Every benchmark ends with one JSON object that says what was measured, and names the peers it lacked."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest


def check_pairs(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        assert row["ours"] > 0, row
        assert row["theirs"] > 0, row
        # Each of the three is rounded to four digits.
        assert row["ratio"] == pytest.approx(row["ours"] / row["theirs"], rel=2e-3), row


def check_peers(record: dict[str, Any], output: str, wanted: set[str]) -> None:
    measured = {row["peer"] for row in record["rows"]}
    missing = wanted - measured
    skipped = {line.split()[1].rstrip(":") for line in output.splitlines() if line.startswith("SKIPPED")}
    assert missing <= skipped


@pytest.mark.slow
def test_id_table_reports_every_case_beside_every_peer_that_is_here(run_benchmark):
    peers = ("native", "mch_lfu_1", "mch_dlfu_10", "faiss", "dict")
    record, output = run_benchmark(
        "id_table", "--quick", "--rounds", "1", "--rows", "30000", "--peers", *peers
    )
    assert record["name"] == "id_table"
    assert record["machine"]
    assert record["date"]
    check_pairs(record["rows"])
    check_peers(record, output, set(peers))
    of_dict = {(row["case"], row["stream"]) for row in record["rows"] if row["peer"] == "dict"}
    maps = {(case, s) for case in ("map_hit", "map_new5", "map_new20") for s in ("zipf", "uniform")}
    assert maps <= of_dict
    assert {(f"lookup_{stream}", stream) for stream in ("zipf", "uniform", "all_new")} <= of_dict
    assert {("delete", "uniform"), ("load", "all_rows"), ("map_all_new", "all_new")} <= of_dict
    facts = record["facts"]
    assert facts["bytes_per_id"] >= 16
    ranks = facts["victim_rank"]
    assert 0 < ranks["mean"] < ranks["p99"] < ranks["worst"] < 0.2
    if any(row["peer"] == "native" for row in record["rows"]):
        assert 0 < facts["call_p50_ms"] <= facts["call_p99_ms"] <= facts["call_p999_ms"]


def test_row_store_reports_reads_and_writes_beside_every_peer_that_is_here(run_benchmark):
    record, output = run_benchmark("row_store", "--quick", "--rounds", "1", "--rows", "5000")
    assert record["name"] == "row_store"
    check_pairs(record["rows"])
    check_peers(record, output, {"take", "faiss", "lmdb", "rocksdict", "redis"})
    of_take = {(row["case"], row["dim"]) for row in record["rows"] if row["peer"] == "take"}
    assert of_take == {("get", 16), ("get", 40), ("upsert", 16), ("upsert", 40)}


@pytest.mark.slow
def test_eviction_quality_judges_every_policy_at_every_size(run_benchmark, tmp_path: Path):
    arguments = ("--quick", "--events", "3000", "--seeds", "2", "--plots", str(tmp_path))
    record, _ = run_benchmark("eviction_quality", *arguments)
    rows = [row for row in record["rows"] if row["stream"] == "steady_zipf"]
    assert {"kraken", "lru", "lfu", "random", "hashed", "foresight"} <= {row["policy"] for row in rows}
    assert {row["share"] for row in rows} == {0.1, 0.3, 0.6, 1.0}
    for row in rows:
        assert 0.4 < row["auc"] < 1.0, row
        if row["share"] == 1.0 and row["policy"] != "ttl_only":
            assert row["re_entries"] == 0, "nothing leaves a table with room for all"
    assert len(record["facts"]["lines"]) == 3
    for measure in ("auc", "re_entries"):
        drawn = (tmp_path / f"eviction_quality_{measure}.svg").read_text()
        assert drawn.rstrip().endswith("</svg>")


@pytest.mark.slow
def test_a_trace_with_columns_of_other_names_is_read(run_benchmark, tmp_path: Path):
    trace = tmp_path / "views.csv"
    with trace.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["at", "who", "what", "liked"])
        # Out of order; user and item names are not numbers.
        lines.writerows([[1_000 + (7 * i) % 500, f"u{i % 9}", f"v{i % 83}", i % 2] for i in range(500)])
    columns = ("--user", "who", "--item", "what", "--time", "at", "--label", "liked")
    record, _ = run_benchmark("eviction_quality", "--quick", "--seeds", "1", "--trace", str(trace), *columns)
    assert {row["stream"] for row in record["rows"]} == {"views"}
