"""A model that reads each impression's domain: trained, published and served as PEPNet is."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.test_killed_trainer import REPOSITORY, command, make_config
from tests.test_whole_path import check_summary, run
from trainer.config import Config, preset, to_toml


def of_the_domain(config: Config) -> Config:
    return replace(config, model=replace(config.model, name="specific_top", bottom_widths=(16,)))


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_replicas_answer_as_training_does(tmp_path: Path) -> None:
    path, out = tmp_path / "config.toml", tmp_path / "run"
    path.write_text(to_toml(of_the_domain(preset("quickstart"))))
    done = run("--config", str(path), "--impressions", "4000", "--out", str(out))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    check_summary(out, impressions=4000, domains={"discovery", "featured_video", "slide"})


@pytest.mark.timeout(120)
def test_it_is_refused_with_the_way_out_where_no_request_would_bring_the_domain(
    embedded_broker: Any, tmp_path: Path
) -> None:
    config = of_the_domain(make_config(embedded_broker))
    features = tuple(one for one in config.schema.features if one.name != "domain")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(replace(config, schema=replace(config.schema, features=features))))
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
