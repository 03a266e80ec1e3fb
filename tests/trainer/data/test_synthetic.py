"""The synthetic stream is calibrated to Table 1, deterministic, and can be learned."""

from __future__ import annotations

import hashlib

import msgspec
import numpy as np
import pytest

from trainer.config import Config, preset
from trainer.config.schema import TaskConfig
from trainer.data.population import LIFETIME_DAYS_MAX, spread_ids
from trainer.data.synthetic import EVENT_START_MS, SyntheticStream
from trainer.errors import ConfigError
from trainer.metrics import auc


def _config(**changes) -> Config:
    produce = changes.pop("produce", {})
    base = preset("quickstart")
    return msgspec.structs.replace(base, produce=msgspec.structs.replace(base.produce, **produce), **changes)


@pytest.fixture(scope="module")
def small_stream() -> SyntheticStream:
    return SyntheticStream(_config(impressions=10_000, produce={"scale": 0.005}))


@pytest.mark.parametrize("sizes", [(64, 1_000), (1, 999)])
def test_the_stream_does_not_depend_on_the_batch_size(sizes):
    config = _config(impressions=2_500, produce={"scale": 0.005})
    first, second = (list(SyntheticStream(config).batches(size)) for size in sizes)
    for name in ("request_ids_N", "user_ids_N", "event_time_ms_N", "labels_NT"):
        left, right = (np.concatenate([getattr(i, name) for i, _ in parts]) for parts in (first, second))
        np.testing.assert_array_equal(left, right)
    left, right = (np.concatenate([i.sparse["tags"].ids_L for i, _ in parts]) for parts in (first, second))
    np.testing.assert_array_equal(left, right)
    left, right = (np.concatenate([truth for _, truth in parts]) for parts in (first, second))
    np.testing.assert_array_equal(left, right)
    assert [len(i) for i, _ in first[:-1]] == [sizes[0]] * (len(first) - 1)


def test_another_seed_gives_another_stream():
    one, two = (
        next(SyntheticStream(_config(seed=seed, produce={"scale": 0.005})).batches(1_000))[0]
        for seed in (1, 2)
    )
    assert (one.user_ids_N != two.user_ids_N).mean() > 0.9
    assert not set(one.request_ids_N.tolist()) & set(two.request_ids_N.tolist())


def test_users_and_items_belong_to_the_domain_that_shows_them(small_stream):
    region_of_user = dict(
        zip(small_stream.users.ids_U.tolist(), small_stream.users.regions_U.tolist(), strict=True)
    )
    region_of_item = dict(
        zip(small_stream.items.ids_I.tolist(), small_stream.items.regions_I.tolist(), strict=True)
    )
    for impressions, _ in small_stream.batches(5_000):
        items_N = impressions.sparse["item_id"].ids_L
        for domain, user, item in zip(impressions.domain_N, impressions.user_ids_N, items_N, strict=True):
            assert region_of_user[int(user)] >> int(domain) & 1
            assert region_of_item[int(item)] >> int(domain) & 1


def test_event_time_ascends_over_the_configured_days_and_items_die(small_stream):
    impressions = next(part for part, _ in small_stream.batches(10_000))
    times_N = impressions.event_time_ms_N
    assert (np.diff(times_N) >= 0).all()
    assert times_N[0] >= EVENT_START_MS
    assert 11.9 < (times_N[-1] - EVENT_START_MS) / 86_400_000 <= 12.0
    age_N = impressions.dense["item_age_h"]
    assert (age_N >= 0).all()
    assert age_N.max() < LIFETIME_DAYS_MAX * 24 + 2
    items_N = impressions.sparse["item_id"].ids_L
    assert not set(items_N[:500].tolist()) & set(items_N[-2_000:].tolist())


def test_labels_follow_the_true_probabilities(small_stream):
    parts = list(small_stream.batches(10_000))
    labels_NT = np.concatenate([part.labels_NT for part, _ in parts])
    truth_NT = np.concatenate([truth for _, truth in parts])
    deviation_T = np.sqrt((truth_NT * (1 - truth_NT)).sum(axis=0))
    assert (np.abs(labels_NT.sum(axis=0) - truth_NT.sum(axis=0)) < 5 * deviation_T).all()


def test_groups_categories_and_authors_alone_teach_a_linear_model_something():
    """A floor far below what the network reaches: the effects are there to be learned."""
    config = _config(impressions=100_000)
    parts = [part for part, _ in SyntheticStream(config).batches(50_000)]
    click = config.schema.task_names.index("click")

    def logits(name: str) -> tuple[np.ndarray, np.ndarray]:
        """Smoothed log odds of click by id, from the first half, looked up for the second."""
        train, test = (part.sparse[name].ids_L for part in parts)
        ids, inverse = np.unique(train, return_inverse=True)
        labels = parts[0].labels_NT[:, click]
        mean = labels.mean()
        clicked = np.bincount(inverse, labels) + 10 * mean
        odds = np.log(clicked / (np.bincount(inverse) + 10 - clicked))
        row = np.minimum(np.searchsorted(ids, test), len(ids) - 1)
        return np.where(ids[row] == test, odds[row], np.log(mean / (1 - mean)))

    score_N = sum(logits(name) for name in ("user_id", "author_id", "category"))
    for domain in range(3):
        row_M = parts[1].domain_N == domain
        assert auc(score_N[row_M], parts[1].labels_NT[row_M, click]) > 0.65


def test_ids_are_distinct_and_fit_52_bits():
    ids_N = spread_ids(np.arange(200_000))
    assert len(np.unique(ids_N)) == 200_000
    assert ids_N.min() >= 0
    assert ids_N.max() < 1 << 52


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"produce": {"scale": 1e-5}}, "scale"),
        ({"schema": preset("kuairand").schema, "tables": preset("kuairand").tables}, "no features"),
    ],
)
def test_what_the_stream_cannot_do_is_named(changes, text):
    with pytest.raises(ConfigError, match=text):
        SyntheticStream(_config(**changes))


def test_a_schema_with_fewer_tasks_and_domains_is_served_in_its_own_order():
    base = preset("quickstart").schema
    schema = msgspec.structs.replace(
        base,
        domains=("slide", "discovery"),
        tasks=(TaskConfig(name="click"), TaskConfig(name="like")),
        features=base.features[:3],
    )
    config = _config(schema=schema, impressions=20_000, produce={"scale": 0.005})
    parts = list(SyntheticStream(config).batches(20_000))
    impressions, truth_NT = parts[0]
    assert truth_NT.shape == (20_000, 2)
    assert set(impressions.sparse) == {"domain", "user_id", "user_group"}
    rates = [truth_NT[impressions.domain_N == domain, 0].mean() for domain in (0, 1)]
    assert rates == pytest.approx([0.5733, 0.1466], rel=0.1)


@pytest.mark.parametrize(
    ("seed", "digest"),
    [
        (1, "a379294fb7c0ce563a6a0e6fe2ff91d2e53cc333eb8646ac6f61d2dc438a97e2"),
        (7, "649b7ad96d54c20bfcebfc934c51d30443aebf0ba7ae1d8568282fa85dd9316d"),
    ],
)
def test_quickstarts_stream_is_bit_for_bit_what_it_has_been(seed, digest):
    """Digests of the stream as it was before it had options; figures quoted anywhere rest on it."""
    parts = [part for part, _ in SyntheticStream(_config(impressions=20_000, seed=seed)).batches(4_096)]
    found = hashlib.sha256(np.concatenate([part.labels_NT for part in parts]).astype(np.uint8).tobytes())
    found.update(np.concatenate([part.event_time_ms_N for part in parts]).tobytes())
    for name in parts[0].sparse:
        found.update(np.concatenate([part.sparse[name].ids_L for part in parts]).tobytes())
    for name in parts[0].dense:
        found.update(np.concatenate([part.dense[name] for part in parts]).tobytes())
    assert found.hexdigest() == digest


def test_labels_made_of_watch_time_are_refused_where_there_is_none():
    base = preset("quickstart").schema
    tasks = (*base.tasks[:-1], TaskConfig(name="effective_view", label="effective_view"))
    with pytest.raises(ConfigError, match="'effective_view' is made of watch time"):
        SyntheticStream(_config(schema=msgspec.structs.replace(base, tasks=tasks)))
