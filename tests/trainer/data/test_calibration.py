"""`python -m trainer calibration`: streams have Table 1's rates and overlaps, and conflict as planted."""

from __future__ import annotations

import json
from functools import cache

import numpy as np
import pytest
from msgspec.structs import replace

from trainer.__main__ import main
from trainer.config import preset
from trainer.data import table1
from trainer.data.calibration import Calibration, as_json, measure
from trainer.data.calibration_report import report
from trainer.data.synthetic import SyntheticStream

# Rates hang on few popular users and items where a population is small.
SMALL = {"quickstart": (200_000, 0.06), "seesaw": (100_000, 0.08), "one_domain": (60_000, 0.08)}


@cache
def measured(name: str) -> Calibration:
    return measure(replace(preset(name), impressions=SMALL[name][0]))


@pytest.mark.parametrize("name", SMALL)
def test_shares_and_rates_are_those_of_table_1(name):
    found = measured(name)
    np.testing.assert_allclose(found.shares_D, found.table_shares_D, atol=0.01)
    np.testing.assert_allclose(found.rates_DT, found.table_rates_DT, rtol=SMALL[name][1])


def test_a_stream_of_one_domain_is_held_against_that_domain():
    found = measured("one_domain")
    assert found.domains == ("featured_video",)
    np.testing.assert_array_equal(found.table_rates_DT, table1.RATES_DT[1:2])
    np.testing.assert_array_equal(found.table_shares_D, [1.0])
    assert found.user_overlaps == found.item_overlaps == {}


@pytest.mark.parametrize("name", ["quickstart", "seesaw"])
@pytest.mark.parametrize("kind", ["user", "item"])
def test_overlaps_are_those_of_table_1(kind, name):
    found = measured(name)
    overlaps = found.user_overlaps if kind == "user" else found.item_overlaps
    table = table1.USER_OVERLAPS if kind == "user" else table1.ITEM_OVERLAPS
    assert overlaps.keys() == table.keys()
    for pair, share in table.items():
        assert overlaps[pair] == pytest.approx(share, abs=0.005), pair


def test_overlaps_of_what_was_shown_are_counted_from_the_stream():
    config = replace(preset("seesaw"), impressions=3_000)
    found = measure(config)
    shown: dict[int, set[int]] = {0: set(), 1: set(), 2: set()}
    for impressions, _ in SyntheticStream(config).batches(1_000):
        ids = impressions.sparse["item_id"].ids_L
        for domain, one in zip(impressions.domain_N.tolist(), ids.tolist(), strict=True):
            shown[domain].add(one)
    assert found.shown_item_overlaps.keys() == found.item_overlaps.keys()
    for (a, b), share in found.shown_item_overlaps.items():
        assert share == pytest.approx(len(shown[a] & shown[b]) / len(shown[a]))
        # A short stream meets each domain's popular part, and not the whole of what both have.
        assert share < found.item_overlaps[a, b]


def test_a_domain_that_showed_nothing_has_no_overlap():
    found = measure(replace(preset("seesaw"), impressions=1))
    assert any(np.isnan(share) for share in found.shown_user_overlaps.values())
    assert None in as_json(found)["shown_user_overlaps"].values()
    assert "none shown" in report(found)


def test_the_best_possible_auc_of_click_leaves_room_to_learn():
    click = table1.TASKS.index("click")
    assert (measured("quickstart").best_auc_DT[:, click] > 0.78).all()
    assert (measured("quickstart").best_auc_DT[:, click] < 0.87).all()


def test_the_stream_shows_more_ids_than_the_quickstart_table_can_hold():
    num_distinct = measured("quickstart").num_distinct
    assert 60_000 <= num_distinct["item_id"] <= 100_000
    assert num_distinct["user_id"] < 5_000


def test_domains_and_tasks_conflict_in_seesaw_more_than_in_quickstart():
    """The options are what the calibration measures, up to the spread of taste weights and item age."""
    seesaw, quickstart = measured("seesaw"), measured("quickstart")
    apart_DD = ~np.eye(3, dtype=bool)
    assert (seesaw.domain_correlation_DD[apart_DD] < quickstart.domain_correlation_DD[apart_DD] - 0.2).all()
    click = table1.TASKS.index("click")
    others_T = [index for index, task in enumerate(table1.TASKS) if task not in ("click", "hate")]
    with_click_T = seesaw.task_correlation_TT[click, others_T]
    assert (with_click_T < 0.9 * quickstart.task_correlation_TT[click, others_T]).all()
    np.testing.assert_allclose(np.diag(seesaw.task_correlation_TT), 1.0, rtol=1e-6)
    np.testing.assert_allclose(np.diag(seesaw.domain_correlation_DD), 1.0, rtol=1e-6)


def test_conflict_of_one_domain_with_itself_is_none():
    np.testing.assert_allclose(measured("one_domain").domain_correlation_DD, [[1.0]], rtol=1e-6)


def test_the_report_sets_every_task_beside_the_table():
    text = report(measured("quickstart"))
    for index, task in enumerate(table1.TASKS):
        assert any(
            line.startswith(task) and f"/ {100 * table1.RATES_DT[2, index]:.2f} %" in line
            for line in text.splitlines()
        ), task
    assert "discovery in slide: 7.89 / 7.89 % (" in text


def test_a_quality_without_positives_is_said_to_be_undefined_not_zero():
    found = measure(replace(preset("one_domain"), impressions=100))
    hate = table1.TASKS.index("hate")
    assert found.positives_DT[0, hate] == 0
    assert np.isnan(found.best_auc_DT[0, hate])
    assert as_json(found)["best_auc"]["featured_video"]["hate"] is None
    assert "not defined" in report(found)


def test_the_command_prints_the_same_json_for_the_same_seed(capsys):
    printed = []
    for seed in ("3", "3", "4"):
        assert (
            main(["calibration", "--preset", "seesaw", "--impressions", "5000", "--seed", seed, "--json"])
            == 0
        )
        printed.append(capsys.readouterr().out)
    assert printed[0] == printed[1]
    assert printed[0] != printed[2]
    found = json.loads(printed[0])
    assert found["impressions"] == 5_000
    assert found["table_rates"]["slide"]["like"] == 0.0282
    assert found["table_user_overlaps"]["discovery in featured_video"] == 0.9211
    assert 0.5 < found["best_gauc"]["slide"]["click"] < 1
    assert found["task_correlations"]["click"]["click"] == pytest.approx(1)


def test_the_command_prints_a_table_and_names_an_unknown_preset(capsys):
    assert main(["calibration", "--preset", "one_domain", "--impressions", "5000"]) == 0
    assert "Best possible GAUC" in capsys.readouterr().out
    assert main(["calibration", "--preset", "sesaw"]) == 1
    assert "unknown preset 'sesaw' (did you mean 'seesaw'?)" in capsys.readouterr().err
    assert main(["calibration", "--preset", "kuairand"]) == 1
    assert "the synthetic stream has no" in capsys.readouterr().err
