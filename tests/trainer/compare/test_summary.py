"""What the table shows and the goals say, from cells whose values are known."""

from __future__ import annotations

import csv
import io
import re

import numpy as np
import pytest
from scipy import stats

from trainer.compare import table
from trainer.compare.evaluation import Cell
from trainer.compare.goals import ablation_lines, goal_lines
from trainer.compare.plan import TRUTH, RunSpec, Variant
from trainer.compare.plot import draw
from trainer.compare.run import RunResult
from trainer.compare.summary import ALL_DOMAINS, MEAN, Column, summarise

DOMAINS, TASKS = ("discovery", "slide"), ("click", "like")
SEEDS = (1, 2, 3)
NOISE = {1: 0.0, 2: 0.02, 3: -0.01}
"""Of a seed, the same for all models."""


def _cell(domain, task, value, **counts):
    known = {"impressions": 100, "positives": 10, "users": 20, "users_one_class": 4, **counts}
    auc = None if value is None else value + 0.1
    return Cell(domain=domain, task=task, auc=auc, gauc=value, **known)


def _result(name, cells, *, cost_us=10.0, num_trained=1000):
    return RunResult(
        name=name, run_hash="", code="", data_digest="", cells=cells, validation=[], best_epoch=1,
        num_trained=num_trained, cost_us=cost_us, parameters=100, cpu_s=1.0, wall_s=1.0,
    )  # fmt: skip


def _run(make_specs, model, seed, cells, *, task=None, domain=None, **facts):
    from msgspec.structs import replace

    spec: RunSpec = make_specs()[0]
    spec = replace(spec, variant=Variant(name=model, model=model), seed=seed, task=task, domain=domain)
    return spec, None if cells is None else _result(spec.name, cells, **facts)


def _runs(make_specs, level):
    """Args: level: model → GAUC, the same in every cell but for the seed's noise."""
    return [
        _run(make_specs, model, seed, [_cell(d, t, value + NOISE[seed]) for d in DOMAINS for t in TASKS])
        for model, value in level.items()
        for seed in SEEDS
    ]


@pytest.fixture
def won(make_specs):
    """pepnet is ahead of mmoe by about 0.02 everywhere; little noise of its own."""
    runs = _runs(make_specs, {"shared_bottom": 0.60, "mmoe": 0.61})
    for seed, more in zip(SEEDS, (0.019, 0.020, 0.022), strict=True):
        value = 0.61 + NOISE[seed] + more
        runs.append(_run(make_specs, "pepnet", seed, [_cell(d, t, value) for d in DOMAINS for t in TASKS]))
    runs.append(_run(make_specs, TRUTH, 1, [_cell(d, t, 0.8) for d in DOMAINS for t in TASKS]))
    return summarise(runs, domains=DOMAINS, tasks=TASKS)


def test_means_best_and_differences_are_those_of_the_cells(won):
    pepnet = won.row("pepnet")
    column = Column("slide", "click", "gauc")
    values = [0.61 + NOISE[seed] + more for seed, more in zip(SEEDS, (0.019, 0.02, 0.022), strict=True)]
    assert pepnet.means[column].mean == pytest.approx(np.mean(values))
    assert won.references[column] == "mmoe"
    assert won.best[column] == "pepnet"
    difference = pepnet.differences[column]
    assert difference.mean == pytest.approx(np.mean([0.019, 0.020, 0.022]))
    assert difference.p == pytest.approx(stats.ttest_1samp([0.019, 0.020, 0.022], 0).pvalue)
    for domain in (*DOMAINS, ALL_DOMAINS):
        assert pepnet.means[Column(domain, MEAN, "gauc")].mean == pytest.approx(np.mean(values))
    assert not won.row("mmoe").differences


def test_goals_met_are_said_to_be_met(won):
    lines = goal_lines(won)
    assert lines[0] == "baselines compared with: 2 (shared_bottom, mmoe)"
    (discovery,) = [line for line in lines if line.startswith("GOAL mean GAUC in discovery")]
    assert "best baseline mmoe 0.6133: +0.0203 ± 0.0038" in discovery
    assert discovery.endswith("goal +0.0095 with p < 0.05: met")
    assert "above the best baseline in 4 of 4" in lines[-1]
    assert "goal 4: met" in lines[-1]


def test_goals_missed_are_said_to_be_missed_and_by_how_much(make_specs):
    summary = summarise(_runs(make_specs, {"mmoe": 0.61, "pepnet": 0.615}), domains=DOMAINS, tasks=TASKS)
    lines = goal_lines(summary)
    assert any("slide" in line and line.endswith("missed, by 0.0074") for line in lines)
    worse = summarise(_runs(make_specs, {"mmoe": 0.61, "pepnet": 0.60}), domains=DOMAINS, tasks=TASKS)
    cells = goal_lines(worse)[-1]
    assert "in 0 of 4" in cells
    assert "missed; not above in discovery/click -0.0100 (mmoe)" in cells


def test_one_seed_proves_nothing(make_specs):
    runs = [run for run in _runs(make_specs, {"mmoe": 0.61, "pepnet": 0.7}) if run[0].seed == 1]
    lines = goal_lines(summarise(runs, domains=DOMAINS, tasks=TASKS))
    assert any("no test with one seed" in line and "missed, significance unknown" in line for line in lines)


def test_a_win_of_one_seed_is_not_waved_through_where_none_is_expected(make_specs):
    runs = [run for run in _runs(make_specs, {"mmoe": 0.60, "pepnet": 0.75}) if run[0].seed == 1]
    lines = goal_lines(summarise(runs, domains=DOMAINS, tasks=TASKS), aim="no_win")
    goals = [line for line in lines if line.startswith("GOAL")]
    assert len(goals) == 2
    assert all("goal no gain with p < 0.05: missed" in line for line in goals)


def test_a_baseline_that_failed_in_the_harder_seeds_is_not_the_best(make_specs):
    """Only seed 3 is left of ple; mmoe is above it there."""
    levels = {"mmoe": {1: 0.60, 2: 0.60, 3: 0.70}, "ple": {3: 0.69}}
    levels["pepnet"] = {1: 0.62, 2: 0.621, 3: 0.722}
    runs = [
        _run(make_specs, name, seed, [_cell(d, t, by_seed.get(seed)) for d in DOMAINS for t in TASKS])
        for name, by_seed in levels.items()
        for seed in by_seed
    ]
    found = summarise(runs, domains=DOMAINS, tasks=TASKS)
    column = Column("slide", "click", "gauc")
    assert (found.references[column], found.best[column]) == ("mmoe", "pepnet")
    assert found.row("pepnet").differences[column].pairs == 3


def test_rows_without_a_common_seed_are_not_decided(make_specs):
    runs = [
        _run(make_specs, name, seed, [_cell(d, t, 0.6) for d in DOMAINS for t in TASKS])
        for name, seed in (("mmoe", 1), ("pepnet", 2))
    ]
    lines = goal_lines(summarise(runs, domains=DOMAINS, tasks=TASKS))
    assert "GOAL mean GAUC in slide: not decided, pepnet and mmoe share no seed" in lines


def test_a_model_of_a_domain_without_training_impressions_is_said_to_be_untrained(make_specs):
    runs = [
        _run(make_specs, "specific_all", 1, [_cell(domain, t, 0.6) for t in TASKS], domain=domain,
             num_trained=num, cost_us=5.0 if num else 0.0)
        for domain, num in zip(DOMAINS, (1000, 0), strict=True)
    ]  # fmt: skip
    found = summarise(runs, domains=DOMAINS, tasks=TASKS)
    note = "specific_all, seed 1: no impressions of slide to train on, it is judged untrained there"
    assert note in found.notes
    assert found.row("specific_all").cost_us == pytest.approx(5.0, rel=0.01)


def test_where_no_win_is_expected_a_win_is_a_miss(won):
    assert any(line.endswith("goal no gain with p < 0.05: missed") for line in goal_lines(won, aim="no_win"))
    assert any(
        line.endswith("goal not below with p < 0.05: met") for line in goal_lines(won, aim="not_below")
    )


def test_ablations_are_held_against_the_whole_model(make_specs):
    runs = _runs(make_specs, {"pepnet": 0.62, "shared_bottom": 0.60, "mmoe": 0.63})
    summary = summarise(runs, domains=DOMAINS, tasks=TASKS, reference="pepnet")
    lines = ablation_lines(summary, must_lose=["shared_bottom", "mmoe", "ple"])
    assert re.match(r"GOAL ablation shared_bottom loses mean GAUC: -0\.0200 .*: met$", lines[0])
    assert lines[1].endswith("missed")
    assert lines[2] == "GOAL ablation ple loses: not decided, it was not run"


def test_runs_of_single_tasks_make_one_model_and_their_costs_add_up(make_specs):
    runs = [
        _run(
            make_specs, "deepfm", 1, [_cell(domain, task, 0.6) for domain in DOMAINS], task=task, cost_us=cost
        )
        for task, cost in (("click", 5.0), ("like", 7.0))
    ]
    row = summarise(runs, domains=DOMAINS, tasks=TASKS).row("deepfm")
    assert row.cost_us == 12.0
    assert row.parameters == 200
    assert {column.task for column in row.means} == {"click", "like", MEAN}


def test_a_model_of_each_domain_costs_what_one_of_them_does(make_specs):
    runs = [
        _run(
            make_specs, "specific_all", 1, [_cell(domain, task, 0.6) for task in TASKS],
            domain=domain, cost_us=cost, num_trained=num,
        )
        for domain, cost, num in (("discovery", 10.0, 3000), ("slide", 20.0, 1000))
    ]  # fmt: skip
    assert summarise(runs, domains=DOMAINS, tasks=TASKS).row("specific_all").cost_us == 12.5


def test_a_seed_with_a_failed_run_is_left_out_and_named(make_specs):
    runs = _runs(make_specs, {"mmoe": 0.61, "pepnet": 0.62})
    runs[3] = (runs[3][0], None)
    summary = summarise(runs, domains=DOMAINS, tasks=TASKS)
    assert summary.row("pepnet").means[Column("slide", "click", "gauc")].seeds == 2
    assert "pepnet, seed 1: left out, since 1 of its 1 runs failed: pepnet-seed1" in summary.notes


def test_what_is_not_defined_is_said_and_not_zero(make_specs):
    runs = [
        _run(make_specs, "mmoe", seed, [
            _cell("discovery", "click", 0.6), _cell("slide", "click", 0.7),
            _cell("discovery", "like", None, positives=0), _cell("slide", "like", 0.5),
        ])
        for seed in SEEDS
    ]  # fmt: skip
    summary = summarise(runs, domains=DOMAINS, tasks=TASKS)
    row = summary.row("mmoe")
    assert Column("discovery", "like", "gauc") not in row.means
    assert row.means[Column("discovery", MEAN, "gauc")].mean == pytest.approx(0.6)
    assert summary.notes[0].startswith("discovery/like: no positives in the slice")
    assert summary.notes[0].endswith("(seeds 1, 2, 3)")
    assert "skipped, 48 of 240" in summary.notes[-1]
    assert table.NOT_DEFINED in table.to_text(summary)


def test_the_printed_table_marks_the_best_and_what_is_significant(won):
    text = table.to_text(won)
    (line,) = [line for line in text.split("discovery, GAUC")[1].split("\n") if "pepnet" in line][:1]
    assert line.count("0.6337^*") == 3
    assert all(len(line) <= table.WIDTH for line in text.split("\n"))
    assert "**0.6337**\\*" in table.to_markdown(won)
    assert "\\textbf{0.6337}$^{*}$" in table.to_latex(won)
    assert "shared\\_bottom" in table.to_latex(won)


def test_nothing_of_the_whole_table_is_cut(make_specs):
    """The domains and tasks of the synthetic stream, and the longest names of models."""
    domains = ("discovery", "featured_video", "slide")
    tasks = ("like", "follow", "forward", "hate", "click", "effective_view")
    cells = [_cell(domain, task, 0.6, expected_gauc=0.6) for domain in domains for task in tasks]
    runs = [_run(make_specs, model, 1, cells) for model in (TRUTH, "towers 128-100-64", "pepnet")]
    text = table.to_text(summarise(runs, domains=domains, tasks=tasks))
    assert "…" not in text
    assert "effective_view" in text
    assert max(map(len, text.split("\n"))) <= table.WIDTH


def test_csv_holds_every_cell_and_seed(won):
    lines = list(csv.DictReader(io.StringIO(table.to_csv(won))))
    columns = [*won.columns("gauc"), *won.columns("auc")]
    assert len(lines) == len(columns) * len(won.rows)
    (line,) = [
        line
        for line in lines
        if (line["model"], line["domain"], line["task"], line["metric"])
        == ("pepnet", "slide", "like", "gauc")
    ]
    assert line["by_seed"] == "1=0.629000 2=0.650000 3=0.622000"
    assert (line["reference"], line["best"], line["seeds"]) == ("mmoe", "1", "3")
    assert float(line["difference"]) == pytest.approx(0.020333, abs=1e-6)


def test_the_plot_names_every_model_and_domain(won, tmp_path):
    draw(won, tmp_path / "a.svg")
    draw(won, tmp_path / "b.svg")
    svg = (tmp_path / "a.svg").read_text()
    assert all(name in svg for name in (*DOMAINS, "pepnet", "mmoe", "shared_bottom", TRUTH))
    assert svg == (tmp_path / "b.svg").read_text()
