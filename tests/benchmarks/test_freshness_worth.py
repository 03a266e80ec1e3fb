"""What freshness is worth: the shortest interval answers as the trainer would, the longest stands still."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.freshness_worth import INTERVALS_S, JUDGED, JUDGED_OF, SLICE_S, Replicated, is_judged, learn


def of_interval(interval_s: int) -> Replicated:
    replicated = Replicated.__new__(Replicated)
    replicated._every = interval_s // SLICE_S
    return replicated


def test_judged_minutes_meet_every_age_of_every_interval():
    # Twice the least common multiple of the judged minutes and of the interval.
    for interval_s in INTERVALS_S.values():
        every = interval_s // SLICE_S
        if every <= JUDGED:
            continue
        ages = {number % every for number in range(2 * JUDGED_OF * every) if is_judged(number)}
        assert ages == set(range(every))


def test_a_synchronisation_is_left_out_only_where_the_next_comes_before_anyone_looks():
    for name, interval_s in INTERVALS_S.items():
        replicated = of_interval(interval_s)
        newest = 0
        for number in range(4_000):
            if replicated.due(number):
                newest = number
            if is_judged(number):
                wanted = number - number % (interval_s // SLICE_S) if interval_s else 0
                assert newest == wanted, name


@pytest.mark.slow
def test_one_training_run_is_judged_at_every_interval(ranks):
    outcomes = learn(seed=1, hours=0.2, warm_up=0.1, pace=5_760, ranks=ranks)
    assert set(outcomes) == set(INTERVALS_S)
    # Twelve minutes: nothing above five minutes is synchronised a second time.
    assert outcomes["never"] == outcomes["5 h"] == outcomes["30 min"]
    assert outcomes["10 s"] != outcomes["1 min"] != outcomes["5 min"] != outcomes["never"]
    assert all(0.3 < one["true_auc"] < 1 for one in outcomes.values())


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_last_line_has_every_interval_and_says_the_pace(run_benchmark, tmp_path: Path):
    arguments = ("--seeds", "1", "--hours", "0.2", "--warm-up", "0.1", "--pace", "5760")
    record, _ = run_benchmark("freshness_worth", *arguments, "--plots", str(tmp_path))
    assert record["name"] == "freshness_worth"
    assert [row["interval"] for row in record["rows"]] == list(INTERVALS_S)
    assert record["rows"][-1]["auc_lost"] == 0
    assert record["facts"]["impressions_per_h"] == 5_760
    assert (tmp_path / "freshness_worth.svg").read_text().rstrip().endswith("</svg>")
