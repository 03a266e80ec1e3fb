"""Planted conflicts are what their options say: correlations that are kept, all else in its place."""

from __future__ import annotations

from functools import cache

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from trainer.config import Config, preset, to_toml
from trainer.config.config import ProduceConfig
from trainer.data import seesaw, table1
from trainer.data.synthetic import SyntheticStream

ANOTHER = {
    "domain_conflict": 0.3,
    "task_conflict": 0.3,
    "taste_spread": 0.1,
    "taste_scale": 2.0,
    "group_taste_share": 0.1,
    "group_effect_share": 0.9,
}


@cache
def stream_with(option: str | None):
    """(impressions, truth) of a small stream, whole, with another value of one option, or as it is."""
    base = preset("quickstart")
    produce = replace(base.produce, scale=0.002, **({option: ANOTHER[option]} if option else {}))
    config = replace(base, impressions=3_000, produce=produce)
    return next(SyntheticStream(config).batches(config.impressions))


@pytest.mark.parametrize("cosine", [1.0, 0.8, 0.3, 0.0])
def test_a_turn_keeps_lengths_and_takes_every_taste_by_the_same_angle(cosine):
    rng = np.random.default_rng(5)
    turned_KK = seesaw.turn(rng, 6, cosine=cosine)
    np.testing.assert_allclose(turned_KK @ turned_KK.T, np.eye(6), atol=1e-12)
    taste_NK = rng.standard_normal((50, 6))
    np.testing.assert_allclose(
        (taste_NK * (taste_NK @ turned_KK)).sum(axis=1), cosine * (taste_NK**2).sum(axis=1), atol=1e-9
    )


def test_two_turns_by_the_same_angle_go_into_planes_of_their_own():
    rng = np.random.default_rng(5)
    one, two = (seesaw.turn(rng, 6, cosine=0.0) for _ in range(2))
    assert np.abs(one - two).max() > 0.1


@pytest.mark.parametrize("conflict", [0.2, 0.7])
def test_domains_and_tasks_keep_the_correlation_that_the_options_leave_on_average_over_seeds(conflict):
    """Of the taste product: <A, B> / K is the correlation of u A v and u B v for normal u and v."""
    click, kept_by_domains, kept_by_tasks = table1.TASKS.index("click"), [], []
    for seed in range(100):
        planted = seesaw.plant(
            np.random.default_rng(seed),
            domain_conflict=conflict,
            task_conflict=conflict,
            num_authors=5,
            loads_T=np.zeros(6, np.float32),
        )
        alike_DTDT = np.einsum("dtkj,eskj->dtes", planted.turn_DTKK, planted.turn_DTKK) / 6
        kept_by_domains += [alike_DTDT[0, click, 1, click], alike_DTDT[1, click, 2, click]]
        kept_by_tasks += [alike_DTDT[0, click, 0, task] for task in range(6) if task != click]
    np.testing.assert_allclose(kept_by_tasks, 1.0 - conflict, atol=1e-6)
    assert np.mean(kept_by_domains) == pytest.approx(1.0 - conflict, abs=0.05)


def test_effects_keep_their_variance_and_the_share_that_domains_have_in_common():
    rng = np.random.default_rng(5)
    planted = seesaw.plant(
        rng,
        domain_conflict=0.4,
        task_conflict=0.0,
        num_authors=20_000,
        loads_T=np.zeros(6, np.float32),
    )
    effect_WT = rng.standard_normal((20_000, 6)).astype(np.float32)
    blended = [planted.effects(effect_WT, own_WT) for own_WT in planted.author_effect_DWT]
    np.testing.assert_allclose([np.var(one) for one in blended], 1.0, atol=0.03)
    assert np.corrcoef(blended[0].ravel(), blended[1].ravel())[0, 1] == pytest.approx(0.6, abs=0.02)


@pytest.mark.parametrize("option", ANOTHER)
def test_an_option_changes_the_labels_and_nothing_that_is_shown(option):
    (plain_impressions, plain_NT), (impressions, truth_NT) = stream_with(None), stream_with(option)
    for name, jagged in plain_impressions.sparse.items():
        np.testing.assert_array_equal(impressions.sparse[name].ids_L, jagged.ids_L)
    np.testing.assert_array_equal(impressions.event_time_ms_N, plain_impressions.event_time_ms_N)
    assert np.abs(truth_NT - plain_NT).max() > 0.01


def test_one_domain_has_no_taste_of_a_person_beyond_the_group():
    """Two users of a group are alike, and what they add to a logit is the same for every item."""
    config = preset("one_domain")
    stream = SyntheticStream(config)
    (logits_UIT,) = stream.probe(num_users=40, num_items=30).astype(np.float64)
    by_user_UT = logits_UIT - logits_UIT[:, :1]
    np.testing.assert_allclose(by_user_UT, np.broadcast_to(by_user_UT[:1], by_user_UT.shape), atol=1e-4)
    assert len(np.unique(logits_UIT[:, 0, 0].round(4))) < 40, "no two of 40 users in 48 groups were alike"
    (other_UIT,) = SyntheticStream(replace(config, produce=replace(config.produce, taste_scale=1.0))).probe(
        num_users=40, num_items=30
    )
    assert np.abs((other_UIT - other_UIT[:, :1]) - (other_UIT - other_UIT[:, :1])[:1]).max() > 0.1


@pytest.mark.parametrize(
    ("option", "value", "text"),
    [
        ("domain_conflict", -0.1, "domain_conflict must be in 0..1, found -0.1"),
        ("task_conflict", 1.1, "task_conflict must be in 0..1, found 1.1"),
        ("group_taste_share", float("nan"), "group_taste_share must be in 0..1, found nan"),
        ("taste_scale", -1.0, "taste_scale must be in 0..10, found -1.0"),
        ("taste_spread", float("inf"), "taste_spread must be in 0..10, found inf"),
    ],
)
def test_an_option_out_of_its_range_is_named(option, value, text):
    with pytest.raises(ValueError, match=text):
        ProduceConfig(**{option: value})


def test_presets_say_their_options_in_their_files():
    for name in ("seesaw", "one_domain"):
        config = preset(name)
        assert msgspec.toml.decode(to_toml(config), type=Config).produce == config.produce
        assert config.preset == name
