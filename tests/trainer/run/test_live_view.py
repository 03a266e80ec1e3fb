"""What is shown, rendered to a console that records it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import msgspec
from rich.console import Console

from trainer.config import Config
from trainer.run.freshness import Histogram
from trainer.run.live_view import View, final_lines, final_screen, plain_line, render
from trainer.run.observe import Observation
from trainer.run.summary import Check, Ending, Summary, summarize


def recorded(**options: object) -> Console:
    return Console(file=io.StringIO(), record=True, width=150, **options)  # type: ignore[arg-type]


def summary_of(config: Config, observation: Observation, ending: Ending) -> Summary:
    return summarize(config, observation, ending, overall=Histogram(), steady=Histogram())


def test_live_display_shows_every_part(observation: Observation) -> None:
    console = recorded()
    console.print(render(observation, phase="training"))
    text = console.export_text()
    for part in (
        "training  12 s",
        "trained 990",
        "2,500/s",
        "lag 64",
        "dead letters 10",
        "0.7100 (0.8100)",
        "0.6200 (-)",
        "90 / 100",
        "expired 10, score 50",
        "probability 5",
        "full 2, delta 6",
        "update_limit 100",
        "replica-1",
        "1.7",
        "340 ms",
        "freshness p50 420 ms p99 910 ms",
    ):
        assert part in text, part


def test_display_of_nothing_yet_is_drawn_as_well() -> None:
    console = recorded()
    console.print(render(Observation(t_s=0.0), phase="starting broker"))
    assert "starting broker" in console.export_text()


def test_plain_line_is_one_line_with_the_numbers_that_matter(observation: Observation) -> None:
    assert plain_line(observation) == (
        "    12 s  stopped  trained 990 of 1,000  2,500/s  lag 64  AUC 0.6700  rows 100/120  evicted 61"
        "  version 1.7  replicas 1.7 1.7  freshness p50 420 ms p99 910 ms"
    )


def test_more_trained_than_confirmed_is_not_shown_as_counted_twice(observation: Observation) -> None:
    """The producer's count is of what the broker confirmed, and runs behind."""
    assert observation.producer is not None
    observation.producer.impressions_produced = 900
    assert "trained 990 of 990 " in plain_line(observation)
    console = recorded()
    console.print(render(observation, phase="training"))
    assert "produced 990 " in console.export_text()


def test_positive_tasks_auc_is_told_by_domain_beside_the_best_possible(
    small_config: Config, observation: Observation, ending: Ending
) -> None:
    lines = final_lines(summary_of(small_config, observation, ending), report=Path("r")).splitlines()
    assert lines[0].endswith("10 dead letters, 250/s inside its steps")
    assert lines[1] == "AUC of click: slide 0.7100 (best possible 0.8100), discovery 0.6800"
    assert lines[2] == "AUC, mean of all: 0.6700 (best possible 0.8050)"


def test_many_domains_do_not_fill_the_screen(
    small_config: Config, observation: Observation, ending: Ending
) -> None:
    assert observation.trainer is not None
    observation.trainer.auc = {f"tab_{number}": {"click": 0.5} for number in range(9)}
    lines = final_lines(summary_of(small_config, observation, ending), report=Path("r")).splitlines()
    assert lines[1].endswith("tab_5 0.5000, and 3 more in summary.json")


def test_plain_view_writes_no_control_codes_and_not_every_look(observation: Observation) -> None:
    out = io.StringIO()
    with View(Console(file=out, force_terminal=False), live=False) as view:
        view.phase("training")
        for t_s in (1.0, 2.0, 3.0, 6.5):
            view.show(replace(observation, t_s=t_s), phase="training")
    lines = out.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["training", "1", "6"]
    assert "\x1b" not in out.getvalue()


def test_live_view_draws_in_place(observation: Observation) -> None:
    out = io.StringIO()
    with View(Console(file=out, force_terminal=True, width=150), live=True) as view:
        view.show(observation, phase="training")
        view.show(observation, phase="draining")
    assert "draining" in out.getvalue()
    assert "\x1b[" in out.getvalue()


def test_final_screen_says_what_failed_and_where_the_report_is(
    small_config: Config, observation: Observation, ending: Ending
) -> None:
    summary = summary_of(small_config, observation, ending)
    bad = Check(name="replicas agree", passed=False, detail="replica-1 [differs]")
    summary = msgspec.structs.replace(summary, checks=[*summary.checks, bad])
    console = recorded()
    console.print(final_screen(summary, report=Path("/somewhere/report.html")))
    screen = console.export_text()
    lines = final_lines(summary, report=Path("/somewhere/report.html"))
    for text in (screen, lines):
        assert "990 trained of 1,000 produced, 10 dead letters" in text
        assert "expired 11, score 50" in text
        assert "replica-1 [differs]" in text  # not taken for markup
        assert text.count("FAILED") == 1
        assert "/somewhere/report.html" in text
    assert "replicas agree: FAILED, replica-1 [differs]" in lines.splitlines()
