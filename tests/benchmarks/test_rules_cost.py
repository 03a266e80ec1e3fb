"""The cost of the rules: serving that gets everything answers as the trainer does; what waits shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from benchmarks.rules_cost import FULL, START_S, WAYS, learn, summary, train
from benchmarks.rules_cost_serving import ForAll, Model, Serving, Way
from param_server.client import RulesConfig
from param_server.rules_config import RULES_PRESETS
from trainer.config import preset
from trainer.data.synthetic import EVENT_START_MS, SyntheticStream
from trainer.recommender import Recommender
from trainer.stream.slicing import slice_impressions


def test_serving_that_gets_every_row_answers_as_the_trainer_would(ranks):
    config = replace(preset("quickstart"), impressions=3_000)
    recommender = Recommender(config, ranks=ranks)
    ways = [
        Way(FULL, RulesConfig()),
        Way("int8", RulesConfig(), "int8"),
        Way("nothing", RulesConfig(min_updates=10**6)),
    ]
    servings = [Serving(way, recommender=recommender, config=config) for way in ways]
    for name, shard in recommender.shards.items():
        shard.changed = ForAll(shard.slots_per_rank, [one.records[name] for one in servings])
    model = Model.of(recommender, config)
    first, second, third = (part for part, _ in SyntheticStream(config).batches(1_000))
    for number, part in enumerate((first, second)):
        train(recommender, part, batch_size=256)
        model = model.with_dense(recommender)
        for serving in servings:
            serving.publish(model, now_s=START_S + number, event_time_s=EVENT_START_MS // 1_000)
    starts = range(0, len(third), recommender.batch_rows)
    pieces = [slice_impressions(third, start, start + recommender.batch_rows) for start in starts]
    wanted_NT = np.concatenate([recommender.predict(piece) for piece in pieces])
    full, int8, nothing = (serving.judge(third) for serving in servings)
    assert np.abs(full - wanted_NT).max() < 1e-6
    assert 0 < np.abs(int8 - wanted_NT).max() < 1e-2
    assert np.abs(nothing - wanted_NT).max() > 1e-3
    assert servings[0].row_bytes > 1.5 * servings[1].row_bytes
    assert servings[2].rows_sent == 0
    assert servings[2].held_back["few_updates"] > 0


def test_fewer_bytes_and_what_they_cost_are_paired_with_the_full_synchronisation():
    outcomes = [
        {
            FULL: {"gauc": 0.6, "true_gauc": 0.6, "auc": 0.7, "row_bytes": 1_400, "all_bytes": 2_400},
            "rules": {
                "gauc": 0.6 - lost,
                "true_gauc": 0.6 - lost,
                "auc": 0.7,
                "row_bytes": 100,
                "all_bytes": 1_100,
            },
        }
        for lost in (0.0001, 0.0003)
    ]
    full, rules = summary(outcomes)
    assert (full["fewer"], full["gauc_lost"]) == (1.0, 0.0)
    assert (rules["fewer"], rules["gauc_lost"], rules["meets"]) == (14.0, 0.0002, True)
    assert rules["fewer_all"] == pytest.approx(2_400 / 1_100, rel=1e-3)
    worse = [one | {"rules": one["rules"] | {"true_gauc": 0.59}} for one in outcomes]
    assert not summary(worse)[1]["meets"]


def test_every_preset_is_a_way_and_none_holds_all_rows_back(ranks):
    presets = {way.name for way in WAYS if way.rules in RULES_PRESETS.values()}
    assert presets >= {FULL, *RULES_PRESETS} - {"everything"}
    # Rules by when a row was seen need event time, which is years from the publishing clock.
    ways = [way for way in WAYS if way.name in (FULL, "paddle_ctr", "by_class_int8")]
    outcomes = learn(ways, seed=1, impressions=6_000, ranks=ranks)
    assert 0 < outcomes["paddle_ctr"]["rows"] < outcomes[FULL]["rows"]
    assert "unseen" not in outcomes["paddle_ctr"]["held_back"]
    assert 0 < outcomes["by_class_int8"]["rows"] < outcomes[FULL]["rows"]


@pytest.mark.slow
def test_a_longer_pass_sends_fewer_versions(ranks):
    ways = [Way(FULL, RulesConfig()), Way("every4", RulesConfig(), "float32", 4)]
    outcomes = learn(ways, seed=1, impressions=12_000, ranks=ranks)
    assert outcomes[FULL]["versions"] == 10
    assert outcomes["every4"]["versions"] == 3
    assert outcomes["every4"]["row_bytes"] < outcomes[FULL]["row_bytes"]


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_the_last_line_has_every_way_and_the_figure_is_drawn(run_benchmark, tmp_path: Path):
    arguments = ("--seeds", "1", "--impressions", "8000", "--ways", "int8", "pepnet")
    record, _ = run_benchmark("rules_cost", *arguments, "--plots", str(tmp_path))
    assert record["name"] == "rules_cost"
    rows = {row["way"]: row for row in record["rows"]}
    assert set(rows) == {FULL, "int8", "pepnet"}
    assert rows[FULL]["fewer"] == 1.0
    assert 1.5 < rows["int8"]["fewer"] < 2.3
    assert rows["pepnet"]["fewer"] > rows[FULL]["fewer"]
    assert rows["pepnet"]["auc"] == pytest.approx(rows[FULL]["auc"] - rows["pepnet"]["auc_lost"], abs=2e-5)
    assert all(0.4 < row["gauc"] < 1 for row in rows.values())
    assert (tmp_path / "rules_cost.svg").read_text().rstrip().endswith("</svg>")
