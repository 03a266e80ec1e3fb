"""Small configurations, and batches of the synthetic stream."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from msgspec.structs import replace

from trainer.config import Config, preset
from trainer.data.synthetic import SyntheticStream
from trainer.stream.columns import Impressions


@pytest.fixture(scope="session")
def make_config() -> Callable[..., Config]:
    """The quickstart with a small model; `bytes_limit` decides how soon rows must leave.

    Its answers begin at one half, so that a few batches have much to learn.
    """

    def make(*, bytes_limit: int = 4 << 20, batch_size: int = 64, seed: int = 1) -> Config:
        config = preset("quickstart")
        tasks = tuple(replace(task, base_rate=0.5) for task in config.schema.tasks)
        return replace(
            config,
            seed=seed,
            schema=replace(config.schema, tasks=tasks),
            model=replace(config.model, tower_widths=(16, 8), gate_hidden=8),
            tables=(replace(config.tables[0], bytes_limit=bytes_limit),),
            train=replace(config.train, batch_size=batch_size, metrics_window=2000),
        )

    return make


@pytest.fixture(scope="session")
def make_batches() -> Callable[..., list[Impressions]]:
    """`num` batches of the synthetic stream, batch_size impressions each."""

    def make(config: Config, num: int) -> list[Impressions]:
        stream = SyntheticStream(config).batches(config.train.batch_size)
        return [next(stream)[0] for _ in range(num)]

    return make
