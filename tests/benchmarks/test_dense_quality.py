"""The quality benchmark pairs its forms by seed."""

from __future__ import annotations

import pytest

from benchmarks.dense_quality import summary


def test_differences_are_paired_by_seed():
    rows = summary({"plain": [0.6, 0.7], "float32": [0.61, 0.71], "bfloat16": [0.6, 0.68]})
    by_form = {row["form"]: row for row in rows}
    assert by_form["float32"]["minus_plain"] == pytest.approx(0.01)
    assert by_form["float32"]["interval"] == pytest.approx(0.0, abs=1e-9)
    assert by_form["bfloat16"]["minus_plain"] == pytest.approx(-0.01)
    assert by_form["bfloat16"]["interval"] > 0.01


@pytest.mark.slow
def test_every_form_is_judged(run_benchmark):
    record, _ = run_benchmark("dense_quality", "--seeds", "2", "--impressions", "3000")
    assert {row["form"] for row in record["rows"]} == {"plain", "float32", "bfloat16"}
    for row in record["rows"]:
        assert 0.4 < row["auc"] < 0.9, row
