"""The map of the next batch beside the learning of this one: the same state as one after the other."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from trainer.checkpoint.capture import StateCopier
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions

NUM_BATCHES = 120


def event_time_s(batch: Impressions) -> int:
    return int(batch.event_time_ms_N.max()) // 1000


def test_overlapped_batches_end_in_the_same_state_bit_for_bit(
    ranks: Ranks, make_config: Callable[..., Config], make_batches: Callable[..., list[Impressions]]
) -> None:
    """Where rows are evicted at every step, whichever batches are mapped ahead."""
    config = make_config(bytes_limit=128 << 10, batch_size=16)
    batches = make_batches(config, NUM_BATCHES)
    plain, overlapped = Recommender(config, ranks=ranks), Recommender(config, ranks=ranks)
    expected = [plain.train(batch, now_s=event_time_s(batch)) for batch in batches]

    found = []
    ahead = np.random.default_rng(7).random(NUM_BATCHES) < 0.6
    with ThreadPoolExecutor(max_workers=1) as mapper:
        mapped = overlapped.map(batches[0], now_s=event_time_s(batches[0]))
        for index in range(NUM_BATCHES):
            following = batches[index + 1] if index + 1 < NUM_BATCHES else None
            job = None
            if following is not None and ahead[index]:
                job = mapper.submit(overlapped.map, following, now_s=event_time_s(following))
            found.append(overlapped.learn(mapped).probabilities_NT)
            if following is not None:
                mapped = (
                    job.result()
                    if job is not None
                    else overlapped.map(following, now_s=event_time_s(following))
                )
    np.testing.assert_array_equal(np.stack(found), np.stack(expected))
    assert plain.shards["dim16"].ids.counters().evicted["score"] > 300
    mine, theirs = (StateCopier().copy(one, parts={}, with_dense=True) for one in (overlapped, plain))
    for name, array in theirs.dense.items():
        np.testing.assert_array_equal(mine.dense[name], array, err_msg=name)
    for table, other in zip(mine.tables, theirs.tables, strict=True):
        np.testing.assert_array_equal(table.rows_ND, other.rows_ND)
        np.testing.assert_array_equal(table.state_N, other.state_N)
        for name, column in other.ids.items():
            np.testing.assert_array_equal(table.ids[name], column, err_msg=name)


def test_slots_of_the_batch_before_stay_in_flight_until_the_next_map_is_done(
    ranks: Ranks, make_config: Callable[..., Config], make_batches: Callable[..., list[Impressions]]
) -> None:
    """Whatever the map of batch t + 1 evicts, batch t, which may be being learned, does not use it."""
    config = make_config(bytes_limit=128 << 10, batch_size=16)
    recommender = Recommender(config, ranks=ranks)
    before: set[int] = set()
    num_evicted = 0
    for batch in make_batches(config, 80):
        mapped = recommender.map(batch, now_s=event_time_s(batch))
        (table,) = mapped.tables
        evicted = set(table.owned.evicted_slots_K.tolist())
        assert not evicted & before
        num_evicted += len(evicted)
        before = set(table.owned.slots_N.tolist()) - {-1}
        recommender.learn(mapped)
    assert num_evicted > 300
