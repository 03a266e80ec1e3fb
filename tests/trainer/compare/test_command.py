"""`python -m trainer compare`: its options, its errors, and a small comparison from beginning to end."""

from __future__ import annotations

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from trainer.__main__ import main
from trainer.compare import command
from trainer.compare.plan import TRUTH
from trainer.compare.settings import base_config
from trainer.config import preset, to_toml
from trainer.config.config import ModelConfig
from trainer.config.schema import TaskConfig
from trainer.errors import ConfigError


def _options(*arguments: str):
    parser = argparse.ArgumentParser()
    command.add_command(parser.add_subparsers())
    return command.options_of(parser.parse_args(["compare", *arguments]))


def test_the_default_set_is_all_models_on_three_seeds():
    options = _options()
    names = [variant.name for variant in options.variants]
    assert len(names) == 19
    assert names[-1] == TRUTH
    assert (options.settings.preset, options.settings.seeds, options.settings.impressions) == (
        *("seesaw", 3),
        500_000,
    )
    assert options.num_workers == os.cpu_count()
    assert options.aim == "published_gain"


@pytest.mark.parametrize(
    ("size", "expected"), [("--full", (5, 2_000_000, 2)), ("--quick", tuple(command.QUICK))]
)
def test_sizes_are_what_they_are_said_to_be(size, expected):
    settings = _options(size).settings
    assert (settings.seeds, settings.impressions, settings.epochs) == expected
    assert _options(size, "--mode", "online").settings.epochs == 1
    assert _options(size, "--seeds", "4").settings.seeds == 4


def test_each_ablation_changes_one_thing_about_pepnet():
    options = _options("--ablations")
    changes = [
        (one.model, one.model_changes, one.optimizer_changes, one.dim)
        for one in options.variants
        if one.model != TRUTH
    ]
    assert changes.count(("pepnet", {}, {}, None)) == 1
    assert len({msgspec.json.encode(one) for one in changes}) == len(changes)
    whole = ModelConfig()
    for one in options.variants:
        if one.model == TRUTH or one.name == "pepnet":
            continue
        # The gates' inputs are one thing, said of each gate.
        keys = {"gate_input" if key.endswith("_input") else key for key in one.model_changes}
        keys |= set(one.optimizer_changes) | ({"dim"} if one.dim is not None else set())
        keys |= {"model"} if one.model != "pepnet" else set()
        assert len(keys) == 1, one
        assert all(getattr(whole, key) != value for key, value in one.model_changes.items()), one
    assert {"-EPNet", "-PPNet", "gate input trained", "-gate input", "gamma 3", "dim 64"} <= {
        one.name for one in options.variants
    }


@pytest.mark.parametrize(("name", "absent"), [("seesaw", "dim 16"), ("paper", "dim 40")])
def test_no_ablation_is_the_whole_model_under_another_name(name, absent):
    options = _options("--ablations", "--preset", name)
    config = base_config(options.settings, seed=1)
    hashes = []
    for one in options.variants:
        if one.model != TRUTH:
            dims = [one.dim or feature.dim for feature in config.schema.features]
            model = replace(config.model, name=one.model, **one.model_changes)
            optimizer = replace(config.optimizer, **one.optimizer_changes)
            hashes.append((dims, msgspec.json.encode((model, optimizer))))
    assert all(hashes.count(one) == 1 for one in hashes)
    dims = {variant.name for variant in options.variants if variant.name.startswith("dim ")}
    assert dims == {"dim 8", "dim 16", "dim 40", "dim 64"} - {absent}


def test_a_configuration_of_the_users_own_takes_the_presets_place(tmp_path):
    """The protocol's labels: a click is more than three seconds, an effective view half of the video."""
    own = preset("kuairand")
    own = replace(
        own,
        preset="watch time",
        schema=replace(
            own.schema,
            tasks=(
                TaskConfig(name="click", label="click", single_column=("main",)),
                TaskConfig(
                    name="view", label="effective_view", effective_view_line="half_of_duration", base_rate=0.4
                ),
            ),
            positive_task="click",
        ),
    )
    path = tmp_path / "own.toml"
    path.write_text(to_toml(own))
    options = _options("--config", str(path), "--data", str(tmp_path), "--batch-size", "1024")
    assert (options.settings.preset, options.settings.batch_size) == ("watch time", 1_024)
    assert options.settings.protocol.time_zone_h == 8
    config = base_config(options.settings, seed=1)
    assert config.schema.tasks == own.schema.tasks
    assert config.train.batch_size == 1_024
    with pytest.raises(ConfigError, match=r"absent\.toml: cannot be read"):
        _options("--config", str(tmp_path / "absent.toml"))
    with pytest.raises(SystemExit):
        _options("--config", str(path), "--preset", "seesaw")


def test_what_is_expected_depends_on_the_stream(tmp_path):
    assert _options("--preset", "one_domain").aim == "no_win"
    recording = _options("--data", str(tmp_path))
    assert (recording.aim, recording.settings.preset) == ("not_below", "kuairand")
    assert recording.settings.protocol.time_zone_h == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "pepnet,shared_botom"], r"^--models: unknown model 'shared_botom'.*shared_bottom"),
        (["--preset", "seasaw"], r"unknown preset 'seasaw'.*seesaw"),
        (["--ablations", "--models", "ple"], "--ablations has its own variants"),
        (["--data", "x", "--impressions", "5"], "a recording is read to its end"),
        (["--mode", "online", "--epochs", "2"], "epochs must be 1, found 2"),
        (["--models", ","], "no model is named"),
    ],
)
def test_options_that_are_wrong_are_refused_by_name(arguments, message):
    with pytest.raises(ConfigError, match=message):
        _options(*arguments)


@pytest.mark.parametrize("arguments", [["--seeds", "0"], ["--workers", "-1"], ["--dense-lr", "nan"]])
def test_numbers_that_are_wrong_are_refused_by_the_parser(arguments, capsys):
    with pytest.raises(SystemExit):
        _options(*arguments)
    assert "expected a" in capsys.readouterr().err


def test_an_error_is_one_line(tmp_path, capsys):
    assert main(["compare", "--data", str(tmp_path / "none"), "--out", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert "there is no such file or folder" in error
    assert "Traceback" not in error


SMALL = ("--impressions", "4000", "--min-interactions", "2", "--models", "shared_bottom,pepnet")


def _start(out: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", "compare", *SMALL, *arguments, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_small_comparison_prints_and_writes_its_table(tmp_path, capsys):
    """From the command line to every file, with one worker."""
    assert main(["compare", *SMALL, "--seeds", "1", "--workers", "1", "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "GOAL mean GAUC in discovery: pepnet" in out
    assert "GOAL cells: " in out
    with (tmp_path / "cells.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert {line["model"] for line in lines} == {"shared_bottom", "pepnet", TRUTH}
    assert {path.name for path in tmp_path.iterdir()} == {
        *("data", "runs", "table.txt", "table.md", "table.tex", "cells.csv", "settings.json", "gauc.svg")
    }
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.slow
def test_a_comparison_that_was_stopped_goes_on_and_ends_as_if_it_was_not(tmp_path):
    """Interrupted after its first result; the runs it had are not done again."""
    first = _start(tmp_path / "a", "--seeds", "2", "--workers", "1")
    runs = tmp_path / "a" / "runs"
    deadline_s = time.monotonic() + 240
    while not (runs.is_dir() and any(runs.glob("*.json"))):
        assert first.poll() is None, first.communicate()
        assert time.monotonic() < deadline_s
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=60)
    assert first.returncode == 130
    done = {path.name: path.stat().st_mtime_ns for path in runs.glob("*.json")}
    assert 0 < len(done) < 6

    second = _start(tmp_path / "a", "--seeds", "2", "--workers", "2")
    out, error = second.communicate(timeout=280)
    assert second.returncode == 0, error
    assert f"{len(done)} of 6 runs are done already" in error
    assert {name: (runs / name).stat().st_mtime_ns for name in done} == done
    assert "GOAL mean GAUC in discovery: pepnet" in out
    assert len(list(runs.iterdir())) == 6


@pytest.mark.slow
def test_a_run_that_fails_is_reported_and_the_others_are_not_lost(tmp_path):
    """The columns of seed 2 are torn after they were made: its runs fail, seed 1 is in the table."""
    _, error = _start(tmp_path, "--seeds", "2", "--models", "shared_bottom").communicate(timeout=280)
    (columns,) = (tmp_path / "data").glob("*seed2*.safetensors")
    results = sorted((tmp_path / "runs").glob("*seed2*.json"))
    assert results, error
    for result in results:
        result.unlink()
    facts = columns.with_suffix(".json")
    import hashlib

    columns.write_bytes(columns.read_bytes()[:5000])
    known = json.loads(facts.read_text()) | {"digest": hashlib.sha256(columns.read_bytes()).hexdigest()}
    facts.write_text(json.dumps(known))
    again = _start(tmp_path, "--seeds", "2", "--models", "shared_bottom")
    out, error = again.communicate(timeout=280)
    assert again.returncode == 1
    assert "shared_bottom-seed2: " in error
    assert "the columns cannot be read" in error
    assert "shared_bottom, seed 2: left out, since 1 of its 1 runs failed" in out


@pytest.mark.slow
@pytest.mark.timeout(1_800)
def test_the_quick_set_ends_and_its_models_have_learned(tmp_path):
    """Better than chance, and not better than the truth."""
    quick = subprocess.run(
        [sys.executable, "-m", "trainer", "compare", "--quick", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=1_700,
        check=False,
    )
    assert quick.returncode == 0, quick.stderr
    with (tmp_path / "cells.csv").open() as file:
        found = {
            line["model"]: float(line["mean"])
            for line in csv.DictReader(file)
            if (line["domain"], line["metric"]) == ("all", "expected_gauc")
        }
    assert found.keys() == {*command.QUICK_MODELS, TRUTH}
    assert found[TRUTH] > 0.7
    for model in command.QUICK_MODELS:
        assert 0.55 < found[model] < found[TRUTH] - 0.02, found
    assert quick.stdout.count("GOAL mean GAUC in ") == 3
