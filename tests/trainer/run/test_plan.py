"""The children's commands and the configuration that they read."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from trainer.config import Config, load_config, preset
from trainer.errors import ConfigError
from trainer.run.plan import RunOptions, plan_run, resolve_config, with_addresses
from trainer.run.processes import Fact
from trainer.run.run_directory import RunDirectory


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    return RunDirectory(tmp_path)


def test_embedded_run_starts_everything_in_order(
    small_config: Config, options: RunOptions, directory: RunDirectory
) -> None:
    config = resolve_config(small_config, options)
    plan = plan_run(config, options, directory)
    assert [spec.name for spec in plan.services] == ["broker", "shard", "replica-0", "replica-1"]
    assert plan.replicas == ("replica-0", "replica-1")
    python, configuration = (sys.executable, "-m"), str(directory.config)
    broker, shard, replica, _ = plan.services
    assert broker.argv == (*python, "trainer", "broker", "--config", configuration)
    assert shard.argv == (
        *(*python, "param_server", "shard", "--address", "127.0.0.1:0"),
        *("--log-dir", str(directory.version_log), "--keep-full", "2"),
    )
    assert replica.argv == (
        *(*python, "param_server", "replica", "--shard", Fact("shard", "address")),
        *("--address", "127.0.0.1:0", "--name", "replica-0"),
    )
    where = ("--config", configuration, "--run-dir", str(directory.root))
    assert plan.trainer.argv == (*python, "trainer", "train", *where)
    assert plan.producer.argv == (
        *python,
        "trainer",
        "produce",
        *where,
        "--impressions",
        "1000",
        "--embedded",
    )
    assert all(spec.ends_itself and spec.ready_timeout_s is None for spec in (plan.trainer, plan.producer))
    assert not any(spec.ends_itself for spec in plan.services)


def test_several_shards_share_one_log_and_the_replicas_are_spread_over_them(
    small_config: Config, options: RunOptions, directory: RunDirectory
) -> None:
    serving = msgspec.structs.replace(small_config.serving, num_shards=2, num_replicas=3)
    config = resolve_config(msgspec.structs.replace(small_config, serving=serving), options)
    plan = plan_run(config, options, directory)
    names = ["broker", "shard", "shard-1", "replica-0", "replica-1", "replica-2"]
    assert [spec.name for spec in plan.services] == names
    log = ("--log-dir", str(directory.version_log), "--keep-full", "2")
    for number, shard in enumerate(plan.services[1:3]):
        own = ("--shard", str(number), "--num-shards", "2")
        assert shard.argv[3:] == ("shard", "--address", "127.0.0.1:0", *log, *own)
    followed = [spec.argv[spec.argv.index("--shard") + 1] for spec in plan.services[3:]]
    assert followed == [Fact(name, "address") for name in ("shard", "shard-1", "shard")]
    first: dict[str, dict[str, str | int]] = {"shard": {"address": "127.0.0.1:4002"}}
    assert with_addresses(config, first) == config, "only when every shard is known"
    found = with_addresses(config, {**first, "shard-1": {"address": "127.0.0.1:4003"}})
    assert found.serving.shard_addresses == ("127.0.0.1:4002", "127.0.0.1:4003")


def test_checkpoints_come_as_often_as_the_embedded_brokers_producer_needs_them(
    small_config: Config, options: RunOptions
) -> None:
    """It waits for what they commit: with an hour between them nothing would move."""
    checkpoint = msgspec.structs.replace(small_config.checkpoint, interval_s=3600)
    config = msgspec.structs.replace(small_config, checkpoint=checkpoint)
    assert resolve_config(config, options).checkpoint.interval_s == 60
    given = replace(options, bootstrap_servers="kafka.example:9092")
    assert resolve_config(config, given).checkpoint.interval_s == 3600


def test_given_broker_is_not_started(
    small_config: Config, options: RunOptions, directory: RunDirectory
) -> None:
    options = replace(options, bootstrap_servers="kafka.example:9092", data=directory.root)
    config = resolve_config(small_config, options)
    plan = plan_run(config, options, directory)
    assert config.kafka.bootstrap_servers == "kafka.example:9092"
    assert [spec.name for spec in plan.services] == ["shard", "replica-0", "replica-1"]
    assert "--embedded" not in plan.producer.argv
    assert plan.producer.argv[-2:] == ("--data", str(directory.root.resolve()))


def test_several_ranks_are_started_by_torchrun(
    small_config: Config, options: RunOptions, directory: RunDirectory
) -> None:
    options = replace(options, num_ranks=3)
    argv = plan_run(resolve_config(small_config, options), options, directory).trainer.argv
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=3", "-m", "trainer", "train")
    assert argv[2:8] == launcher


def test_exit_code_of_a_stopped_torchrun_is_clean_for_it_alone(
    small_config: Config, options: RunOptions, directory: RunDirectory
) -> None:
    config = resolve_config(small_config, options)
    assert 1 not in plan_run(config, options, directory).trainer.stopped_codes
    plan = plan_run(config, replace(options, num_ranks=2), directory)
    assert 1 in plan.trainer.stopped_codes
    assert not any(1 in spec.stopped_codes for spec in (*plan.services, plan.producer))


@pytest.mark.parametrize(
    ("impressions", "seconds", "expected"),
    [(None, None, 200_000), (77, None, 77), (None, 1.5, 3_000), (77, 1.5, 77)],
)
def test_number_of_impressions_follows_the_options(
    small_config: Config,
    options: RunOptions,
    impressions: int | None,
    seconds: float | None,
    expected: int,
) -> None:
    options = replace(options, impressions=impressions, seconds=seconds)
    assert resolve_config(small_config, options).impressions == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"impressions": 0},
        {"seconds": 0.0},
        {"seconds": float("nan")},
        {"num_ranks": 0},
        {"data": Path("/no")},
    ],
)
def test_option_that_makes_no_sense_is_refused(
    small_config: Config, options: RunOptions, wrong: dict[str, object]
) -> None:
    with pytest.raises(ConfigError, match="--"):
        resolve_config(small_config, replace(options, **wrong))  # type: ignore[arg-type]


def test_checkpoints_of_another_run_are_not_gone_on_from_unasked(
    small_config: Config, options: RunOptions, tmp_path: Path
) -> None:
    checkpoint = msgspec.structs.replace(small_config.checkpoint, directory=str(tmp_path / "kept"))
    config = msgspec.structs.replace(small_config, checkpoint=checkpoint)
    assert resolve_config(config, options).checkpoint == checkpoint
    (tmp_path / "kept" / "0001").mkdir(parents=True)
    with pytest.raises(ConfigError, match="--resume"):
        resolve_config(config, options)
    assert resolve_config(config, options_to_resume(options)).checkpoint == checkpoint


def options_to_resume(options: RunOptions) -> RunOptions:
    return replace(options, resume=True, bootstrap_servers="kafka.example:9092")


def test_stream_that_is_gone_cannot_be_resumed(small_config: Config, options: RunOptions) -> None:
    assert resolve_config(small_config, options_to_resume(options)).seed == small_config.seed
    with pytest.raises(ConfigError, match="embedded broker forgets"):
        resolve_config(small_config, replace(options, resume=True))


def test_children_read_the_addresses_that_are_known(
    small_config: Config, options: RunOptions, directory: RunDirectory
) -> None:
    config = resolve_config(small_config, options)
    assert with_addresses(config, {}) == config
    facts: dict[str, dict[str, str | int]] = {
        "broker": {"bootstrap_servers": "127.0.0.1:4001", "pid": 1},
        "shard": {"address": "127.0.0.1:4002", "pid": 2},
    }
    directory.write_config(with_addresses(config, facts))
    found = load_config(directory.config)
    assert found.kafka.bootstrap_servers == "127.0.0.1:4001"
    assert found.serving.shard_address == "127.0.0.1:4002"
    assert found.impressions == 1000
    assert msgspec.structs.replace(found, kafka=config.kafka, serving=config.serving) == config


def test_a_run_does_not_take_tls(tmp_path: Path) -> None:
    config = preset("quickstart")
    files = {"tls_ca_file": "ca.pem", "tls_cert_file": "cert.pem", "tls_key_file": "key.pem"}
    config = msgspec.structs.replace(config, serving=msgspec.structs.replace(config.serving, **files))
    with pytest.raises(ConfigError, match="a run starts its shards on loopback, without TLS"):
        resolve_config(config, RunOptions(out_dir=tmp_path))
