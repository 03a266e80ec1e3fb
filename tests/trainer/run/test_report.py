"""The report: complete, self-contained, escaped, and drawn also when there is nothing to draw."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser

import msgspec
import pytest

from trainer.config import Config
from trainer.run.charts import CHARTS, ChartData, draw
from trainer.run.freshness import Histogram
from trainer.run.observe import Observation
from trainer.run.report import render_report
from trainer.run.status import TrainerStatus, VersionTrace
from trainer.run.summary import Check, Ending, Summary, summarize


@pytest.fixture
def data(observation: Observation, trainer_status: TrainerStatus, traces: list[VersionTrace]) -> ChartData:
    freshness = Histogram()
    for value in range(100, 1000, 7):
        freshness.add(value, 3)
    earlier = msgspec.structs.replace(trainer_status, impressions_trained=500)
    return ChartData(
        history=[Observation(t_s=0.0), replace(observation, t_s=6.0, trainer=earlier), observation],
        full_versions=traces[:1],
        delta_versions=traces[1:],
        best_possible_auc=observation.producer.best_possible_auc if observation.producer else {},
        freshness=freshness,
        started_ms=0,
    )


@pytest.fixture
def summary(small_config: Config, observation: Observation, ending: Ending) -> Summary:
    return summarize(small_config, observation, ending, overall=Histogram(), steady=Histogram())


class Outline(HTMLParser):
    """Collects tags that are open at the end, and every attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_report_holds_every_chart_and_every_number(summary: Summary, data: ChartData) -> None:
    page = render_report(summary, data)
    outline = Outline()
    outline.feed(page)
    assert outline.open == []
    assert page.count("<svg") == len(CHARTS) == 6
    for anchor, heading, _ in CHARTS:
        assert f'id="{anchor}"' in page
        assert heading in outline.text
    for text in ("click", "like", "slide", "discovery", "dim16", "score", "expired", "p99", "full", "delta"):
        assert f"\n{text}\n" in outline.text, text
    assert "0.7100 (0.8100)" in outline.text
    assert "990 trained of 1,000 produced" in outline.text
    assert "evicted: expired\n11\n" in outline.text
    assert "all checks passed" in outline.text


def test_report_needs_nothing_from_outside(summary: Summary, data: ChartData) -> None:
    page = render_report(summary, data)
    assert "http:" not in page
    assert "https:" not in page
    assert "<script" not in page
    assert "@import" not in page
    outline = Outline()
    outline.feed(page)
    links = [value for name, value in outline.attributes if name in ("src", "href", "xlink:href")]
    assert links, "the charts' markers refer to shapes on the same page"
    assert all(value.startswith("#") for value in links)
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", page))


def test_every_reference_of_a_chart_is_to_a_shape_of_that_chart(data: ChartData) -> None:
    for anchor, _, svg in draw(data):
        ids = set(re.findall(r'\bid="([^"]*)"', svg))
        used = set(re.findall(r'href="#([^"]*)"', svg)) | set(re.findall(r"url\(#([^)]*)\)", svg))
        assert used
        assert used <= ids, anchor


def test_charts_take_the_pages_own_colour(data: ChartData) -> None:
    for anchor, _, svg in draw(data):
        assert "currentColor" in svg, anchor
        assert "#010203" not in svg, anchor
        assert "#000000" not in svg, anchor
        assert "#ffffff" not in svg, anchor


def test_same_data_draws_the_same_charts(data: ChartData) -> None:
    assert draw(data) == draw(data)


def test_run_without_any_data_still_has_a_report(summary: Summary) -> None:
    empty = ChartData(
        history=[],
        full_versions=[],
        delta_versions=[],
        best_possible_auc={},
        freshness=Histogram(),
        started_ms=0,
    )
    assert render_report(summary, empty).count("<svg") == len(CHARTS)


def test_text_from_outside_is_escaped(summary: Summary, data: ChartData) -> None:
    bad = Check(name="ran to its end", passed=False, detail="shard: <script>alert(1)</script> & more")
    page = render_report(msgspec.structs.replace(summary, checks=[bad]), data)
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp; more" in page
    assert "all checks passed" not in page
