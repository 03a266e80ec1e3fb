"""A small stream on disk, shared by the tests of this folder, and small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.compare.dataset import DataFacts, prepare
from trainer.compare.plan import RunSpec, Variant, runs_of
from trainer.compare.protocol import Protocol
from trainer.compare.settings import Settings

SMALL = {"tower_widths": (8, 4), "gate_hidden": 4, "bottom_widths": (8,)}
MakeSpecs = Callable[..., list[RunSpec]]


@pytest.fixture(scope="session")
def settings() -> Settings:
    return Settings(
        impressions=6_000, seeds=2, epochs=1, batch_size=256, protocol=Protocol(interactions_min=2)
    )


@pytest.fixture(scope="session")
def prepared(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DataFacts]:
    return prepare(settings, seed=1, folder=tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def make_specs(settings: Settings, prepared: tuple[Path, DataFacts]) -> MakeSpecs:
    """The runs of one model on the small stream."""

    def make(model: str = "pepnet", *, settings: Settings = settings, **changes: object) -> list[RunSpec]:
        variant = Variant(name=model, model=model, model_changes={**SMALL, **changes})
        return runs_of(variant, seed=1, settings=settings, data=prepared[0], facts=prepared[1])

    return make
