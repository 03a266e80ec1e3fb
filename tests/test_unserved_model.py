"""A model that a replica cannot run: refused where it would be published, trained where it is not."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.test_killed_trainer import REPOSITORY, command, drained_manifest, make_config
from trainer.config import Config, to_toml

NUM_IMPRESSIONS = 1_920


def domain_config(broker: Any) -> Config:
    config = make_config(broker)
    return replace(config, model=replace(config.model, name="specific_top", bottom_widths=(16,)))


@pytest.mark.timeout(200)
def test_a_model_that_uses_the_domain_trains_from_the_stream_without_publishing(
    embedded_broker: Any, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(domain_config(embedded_broker)))
    subprocess.run(
        command("produce", path, tmp_path / "producer", "--impressions", str(NUM_IMPRESSIONS)),
        cwd=REPOSITORY,
        check=True,
        timeout=60,
    )
    manifest = drained_manifest(path, tmp_path / "run")
    assert manifest["counters"]["impressions_trained"] == NUM_IMPRESSIONS


@pytest.mark.timeout(120)
def test_it_is_refused_with_the_way_out_where_it_would_be_published(
    embedded_broker: Any, tmp_path: Path
) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(domain_config(embedded_broker)))
    done = subprocess.run(
        command("train", path, tmp_path / "run", "--shard-address", "127.0.0.1:1"),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith("error: model 'specific_top' uses the domain's index")
    assert "serving.shard_address = ''" in error
    assert not (tmp_path / "run" / "checkpoints").exists()
