"""One run: what it trains on, that it learns, and that it can be done again."""

from __future__ import annotations

from dataclasses import replace as replace_fields

import numpy as np
import pytest
from msgspec.structs import replace

from trainer.compare.dataset import load
from trainer.compare.evaluation import mean_of
from trainer.compare.plan import TRUTH, Variant, check_models, config_of, runs_of
from trainer.compare.protocol import SLICE_NAMES, Protocol
from trainer.compare.run import run
from trainer.compare.settings import Settings
from trainer.errors import ConfigError
from trainer.recommender import Recommender, slots_for


@pytest.fixture(scope="module")
def data(prepared):
    return load(prepared[0])


def _trained(monkeypatch):
    """The impressions that each batch brings, as the recommender sees them."""
    seen = []
    train = Recommender.train

    def watched(self, impressions, *, now_s, num_rows=None):
        seen.append(impressions)
        return train(self, impressions, now_s=now_s, num_rows=num_rows)

    monkeypatch.setattr(Recommender, "train", watched)
    return seen


def _ignore(_: int) -> None:
    """Nobody looks at the progress."""


def test_batch_mode_trains_on_the_training_days_alone_and_each_once_an_epoch(
    data, make_specs, settings, ranks, monkeypatch
):
    seen = _trained(monkeypatch)
    (spec,) = make_specs(settings=replace(settings, epochs=2))
    result = run(spec, data, ranks=ranks, progress=_ignore)
    request_ids = np.concatenate([batch.request_ids_N for batch in seen])
    expected = data.impressions.request_ids_N[data.rows("train")]
    first, second = np.split(request_ids, 2)
    assert sorted(first) == sorted(second) == sorted(expected)
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, expected)
    assert result.num_trained == 2 * len(expected)
    assert len(result.validation) == 2
    assert result.validation[result.best_epoch - 1] == max(result.validation)
    assert {cell.impressions for cell in result.cells} == {
        len(data.rows("test", domain=domain)) for domain in range(3)
    }


def test_online_mode_predicts_then_trains_the_whole_stream_in_order(
    data, make_specs, settings, ranks, monkeypatch
):
    seen = _trained(monkeypatch)
    (spec,) = make_specs(settings=replace(settings, mode="online"))
    result = run(spec, data, ranks=ranks, progress=_ignore)
    request_ids = np.concatenate([batch.request_ids_N for batch in seen])
    np.testing.assert_array_equal(request_ids, data.impressions.request_ids_N)
    judged = len(data.rows("validation")) + len(data.rows("test"))
    assert sum(cell.impressions for cell in result.cells) == judged * 6
    assert result.validation == []


def test_a_model_of_one_task_sees_that_task_alone(data, make_specs, ranks, monkeypatch):
    specs = make_specs("deepfm")
    assert [spec.task for spec in specs] == ["like", "follow", "forward", "hate", "click", "effective_view"]
    click = specs[4]
    seen = _trained(monkeypatch)
    result = run(click, data, ranks=ranks, progress=_ignore)
    assert all(batch.labels_NT.shape[1] == 1 for batch in seen)
    rate = np.concatenate([batch.labels_NT for batch in seen]).mean()
    assert rate == pytest.approx(data.impressions.labels_NT[data.rows("train"), 4].mean())
    assert [cell.task for cell in result.cells] == ["click"] * 3
    positives = data.impressions.labels_NT[data.rows("test"), 4].sum()
    assert sum(cell.positives for cell in result.cells) == positives


def test_a_model_of_one_domain_sees_that_domain_alone(data, make_specs, ranks, monkeypatch):
    specs = make_specs("specific_all")
    assert [spec.domain for spec in specs] == ["discovery", "featured_video", "slide"]
    seen = _trained(monkeypatch)
    result = run(specs[1], data, ranks=ranks, progress=_ignore)
    assert {int(domain) for batch in seen for domain in batch.domain_N} == {1}
    assert {cell.domain for cell in result.cells} == {"featured_video"}
    assert result.num_trained == len(data.rows("train", domain=1))


@pytest.mark.parametrize("mode", ["batch", "online"])
def test_a_domain_without_training_impressions_is_judged_untrained(data, make_specs, settings, ranks, mode):
    """Online there is then nothing of it at all."""
    keep_N = data.impressions.domain_N != 1
    if mode == "batch":
        keep_N |= data.slice_N != SLICE_NAMES["train"]
    rows = np.flatnonzero(keep_N)
    impressions = data.take(rows)
    ends = {name: np.cumsum(impressions.sparse[name].lengths_N, dtype=np.int64) for name in data.starts}
    without = replace_fields(
        data,
        impressions=impressions,
        slice_N=data.slice_N[rows],
        truth_NT=None,
        starts={name: np.concatenate([[0], ends_N]) for name, ends_N in ends.items()},
    )
    spec = make_specs("specific_all", settings=replace(settings, mode=mode))[1]
    result = run(spec, without, ranks=ranks, progress=_ignore)
    assert (result.num_trained, result.cost_us) == (0, 0.0)
    assert {cell.domain for cell in result.cells} == {spec.domain}
    assert all((cell.impressions > 0) == (mode == "batch") for cell in result.cells)


def test_a_run_done_again_finds_the_same(data, make_specs, ranks):
    (spec,) = make_specs("shared_bottom")
    first, second = (run(spec, data, ranks=ranks, progress=_ignore) for _ in range(2))
    assert first.cells == second.cells
    assert (first.validation, first.run_hash) == (second.validation, second.run_hash)


def test_a_model_learns_and_the_truth_is_better(tmp_path, ranks):
    """5,000 clicks are enough to be far from chance; nothing that was learned beats the truth."""
    from trainer.compare.dataset import prepare

    settings = Settings(impressions=20_000, epochs=1, batch_size=128, protocol=Protocol(interactions_min=3))
    path, facts = prepare(settings, seed=1, folder=tmp_path)
    data = load(path)
    found = {}
    for model in ("shared_bottom", TRUTH):
        (spec,) = runs_of(Variant(name=model, model=model), seed=1, settings=settings, data=path, facts=facts)
        result = run(spec, data, ranks=ranks, progress=_ignore)
        found[model] = mean_of([cell.expected_gauc for cell in result.cells if cell.task == "click"])
    assert found["shared_bottom"] > 0.53
    assert found[TRUTH] > found["shared_bottom"] + 0.05


def test_tables_have_room_for_every_key_and_keep_it(make_specs, prepared):
    (spec,) = make_specs()
    config = config_of(spec)
    num_keys = sum(prepared[1].num_keys.values())
    (table,) = config.tables
    assert slots_for(table, world_size=1, config=config) >= 1.5 * num_keys
    assert all(one.ttl_s is None and one.max_rows is None for one in config.schema.features)


def test_the_hash_names_what_decides_the_result(make_specs, settings):
    (spec,) = make_specs()
    others = [
        *make_specs(gate_gamma=3.0),
        *make_specs("shared_bottom"),
        *make_specs(settings=replace(settings, epochs=2)),
        *make_specs(settings=replace(settings, mode="online")),
        *make_specs(settings=replace(settings, dense_learning_rate=1e-4)),
        replace(spec, seed=2),
        *make_specs("deepfm"),
    ]
    hashes = {one.hash() for one in [spec, *others]}
    assert len(hashes) == 1 + len(others)
    assert make_specs()[0].hash() == spec.hash()


def test_every_feature_gets_the_dim_of_the_variant(make_specs):
    (spec,) = make_specs()
    config = config_of(replace(spec, variant=replace(spec.variant, dim=8)))
    assert {feature.dim for feature in config.schema.features} == {8}
    assert [table.dim for table in config.tables] == [8]


def test_an_option_that_no_model_has_is_refused(make_specs):
    with pytest.raises(ConfigError, match=r"variant 'pepnet': .*gate_colour"):
        config_of(make_specs(gate_colour="red")[0])


def test_unknown_models_are_refused_with_the_closest_names():
    with pytest.raises(ConfigError, match=r"--models: .*unknown model 'pepnt'.*pepnet"):
        check_models(["pepnt"])
    with pytest.raises(ConfigError, match="named twice: mmoe"):
        check_models(["mmoe", "ple", "mmoe"])
    with pytest.raises(ConfigError, match="no model is named"):
        check_models([])
