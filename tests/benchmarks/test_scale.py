"""The arithmetic of large installations: its one hard step against drawing, and the document against it."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.scale import Load, Measured, distinct, main, plan

DOCS = Path(__file__).resolve().parents[2] / "docs"
DOCUMENT = (DOCS / "scale.md").read_text()


@pytest.mark.parametrize(("ids", "draws"), [(50, 20), (5_000, 20_000), (2_000_000, 300_000)])
def test_distinct_is_what_drawing_shows(ids: int, draws: int) -> None:
    weight = np.arange(1, ids + 1) ** -1.05
    rng = np.random.default_rng(1)
    shown = [
        len(np.unique(rng.choice(ids, draws, p=weight / weight.sum())))
        for _ in range(max(5, 20_000 // draws))
    ]
    assert distinct(draws, ids=ids, zipf=1.05) == pytest.approx(np.mean(shown), rel=0.01)


def test_the_document_shows_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    printed = dict(line.split() for line in lines)
    shown = dict(re.findall(r"^\| (\w+) \| ([\d.,]+) \|", DOCUMENT, re.MULTILINE))
    assert shown == printed
    assert set(json.loads(last)) == {"name", "load", *asdict(plan(Load(), Measured()))}


def test_rules_count_beside_int8_which_the_rows_are_in_already() -> None:
    benchmarks = (DOCS / "benchmarks.md").read_text()
    table = re.findall(r"^\| `(\w+)` \| ([\d.]+) \| [\d.]+ \|", benchmarks, re.MULTILINE)
    row_mb = {way: float(size) for way, size in table}
    measured, found = Measured(), plan(Load(), Measured())
    assert measured.fewer_bytes == pytest.approx(row_mb["full"] / row_mb["int8"], rel=0.01)
    assert measured.fewer_by_rules == pytest.approx(row_mb["int8"] / row_mb["by_class_int8"], rel=0.01)
    assert plan(Load(), replace(measured, fewer_by_rules=1.0)).senders_with_rules == found.senders
    assert found.senders_with_rules == pytest.approx(found.senders / measured.fewer_by_rules, abs=1)


def test_twice_the_load_takes_twice_as_much_where_it_is_proportional() -> None:
    one, two = plan(Load(), Measured()), plan(replace(Load(), replicas=2_000.0), Measured())
    assert two.fan_out_gbit_per_s == pytest.approx(2 * one.fan_out_gbit_per_s)
    more = plan(replace(Load(), ids=2e11), Measured())
    assert more.table_tib == pytest.approx(2 * one.table_tib)
    assert one.distinct_ids_rank_step < more.distinct_ids_rank_step < 20 * 1_024


def test_a_load_of_nothing_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--ids", "0"])
    assert "ids must be above 0, found 0.0" in capsys.readouterr().err
