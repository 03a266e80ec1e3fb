"""The benchmark of freshness: real processes, every phase timed, and the differences of its turns."""

from __future__ import annotations

import pytest

from benchmarks.freshness import KINDS, PHASES, predict_facts, predict_rows


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_versions_and_predictions_are_measured_through_real_processes(run_benchmark):
    arguments = ("--quick", "--parts", "version", "predict", "--rows", "3000", "--versions", "2")
    record, _ = run_benchmark("freshness", *arguments, "--turn-s", "1")
    assert record["name"] == "freshness"
    versions = {row["phase"]: row for row in record["rows"] if row["case"] == "version"}
    assert set(versions) == {"visible", *PHASES}
    for row in versions.values():
        assert 0 <= row["p50_ms"] <= row["p99_ms"], row
    assert versions["visible"]["p50_ms"] > versions["append"]["p50_ms"] > 0
    predictions = {row["phase"]: row for row in record["rows"] if row["case"] == "predict"}
    assert set(predictions) == set(KINDS)
    for row in predictions.values():
        assert row["requests"] == 100, row
        assert 0 < row["p50_ms"] <= row["p99_ms"] <= row["p999_ms"], row
    assert record["facts"]["predict"]["versions_switched"] >= 1


def test_the_difference_is_the_median_over_rounds_and_one_bad_round_does_not_decide_it():
    turn = [1.0] * 9
    taken = {
        "quiet": [[*turn, 10.0], [*turn, 10.0], [*turn, 10.0]],
        "pinned": [[*turn, 11.0], [*turn, 11.0], [*turn, 11.0]],
        "switching": [[*turn, 12.0], [*turn, 12.0], [*turn, 900.0]],
    }
    facts = predict_facts(taken, switched=3)
    assert facts["p999_more_than_quiet_ms"] == pytest.approx(2.0, abs=0.05)
    assert facts["p999_more_than_pinned_ms"] == pytest.approx(1.0, abs=0.05)
    rows = {row["phase"]: row for row in predict_rows(taken)}
    assert rows["switching"]["p999_ms"] > 800
    assert rows["switching"]["p999_of_turns_ms"] < 13
