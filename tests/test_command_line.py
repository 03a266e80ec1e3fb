"""What an operator meets at the command line: options that hold, and faults in one line."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import grpc
import pytest
from kafka import KafkaConsumer
from msgspec.structs import replace

from feature_eviction import ScoreConfig
from param_server.client import ParamServerClient, UnavailableError
from param_server.transport import translate
from trainer.config import load_config, preset, to_toml
from trainer.stream.broker import Security, connect_options

REPOSITORY = Path(__file__).resolve().parent.parent


def command(*arguments: str, module: str = "trainer") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def only_line(done: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr of a command that was refused."""
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr.strip()


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """The quickstart's file, waiting a second for Kafka; its shard address has port 0."""
    config = preset("quickstart")
    path = tmp_path / "config.toml"
    path.write_text(to_toml(replace(config, kafka=replace(config.kafka, start_timeout_s=1))))
    return path


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "error: serving.shard_address (--shard-address): '127.0.0.1:0' has port 0"),
        (("--shard-address", ""), ""),
        (("--shard-address", "127.0.0.1:7000"), ""),
        (("--shard-address", "nowhere"), "error: --shard-address: shard_address must be host:port"),
        (
            ("--shard-address", "127.0.0.1:7000,127.0.0.1:0"),
            "error: serving.shard_address (--shard-address): '1",
        ),
        (("--auto-rollback",), "error: --auto-rollback: auto_rollback needs a quality gate"),
        (("--bootstrap-servers", "nowhere"), "error: --bootstrap-servers: bootstrap_servers must be host"),
    ],
)
def test_train_refuses_addresses_that_nobody_can_call(
    arguments: tuple[str, ...], named: str, config_file: Path, tmp_path: Path
) -> None:
    """Where the shard's address is good, the servers' port 0 is what is left to refuse."""
    if not named:
        arguments = (*arguments, "--bootstrap-servers", "kafka.example:9092,127.0.0.1:0")
        named = "error: kafka.bootstrap_servers (--bootstrap-servers): '127.0.0.1:0' has port 0"
    line = only_line(command("train", "--config", str(config_file), "--run-dir", str(tmp_path), *arguments))
    assert line.startswith(named)


@pytest.mark.parametrize("arguments", [("train", "--shard-address", ""), ("produce",)], ids=lambda a: a[0])
@pytest.mark.timeout(120)
def test_bootstrap_servers_option_overrides_the_file(
    arguments: tuple[str, ...], config_file: Path, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    address = f"127.0.0.1:{free_port()}"
    options = ("--config", str(config_file), "--run-dir", str(tmp_path), "--bootstrap-servers", address)
    done = command(*arguments, *options)
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith(f"error: no Kafka broker answered at {address}")


def test_run_under_torchrun_names_the_command_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun sets for each of its workers
    line = only_line(command("run"))
    assert line.startswith("error: run: starts every process itself, torchrun included")
    assert line.endswith("`train` is the command of one rank")


def test_broker_by_itself_prints_its_address_and_makes_the_quickstarts_topic() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "broker"], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        servers = process.stdout.readline().strip()
        consumer = KafkaConsumer(**connect_options(servers, security=Security(), timeout_s=30))
        kafka = preset("quickstart").kafka
        assert consumer.partitions_for_topic(kafka.topic) == set(range(kafka.num_partitions))
        consumer.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()


def test_run_refuses_seeds_out_of_range_and_servers_that_are_none() -> None:
    assert only_line(command("run", "--seed", "-1")) == "error: --seed: seed must be at least 0, found -1"
    assert only_line(command("run", "--seed", str(2**64))).startswith("error: --seed: seed must be at most ")
    assert only_line(command("run", "--bootstrap-servers", "x")).startswith("error: --bootstrap-servers: ")


def test_a_file_where_a_folder_must_be_is_one_line(config_file: Path, tmp_path: Path) -> None:
    in_the_way = tmp_path / "file"
    in_the_way.write_text("")
    line = only_line(command("produce", "--config", str(config_file), "--run-dir", str(in_the_way)))
    assert line == f"error: {in_the_way / 'status'}: Not a directory"
    shard = command("shard", "--log-dir", str(in_the_way / "log"), module="param_server")
    assert shard.returncode == 1
    assert "Traceback" not in shard.stderr


def test_interrupt_ends_a_command_without_a_traceback(tmp_path: Path) -> None:
    """The configuration is a pipe that this test holds open: the command is known to be reading."""
    pipe = tmp_path / "config.toml"
    os.mkfifo(pipe)
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "produce", "--config", str(pipe), "--run-dir", str(tmp_path)],
        cwd=REPOSITORY,
        stderr=subprocess.PIPE,
        text=True,
    )
    with pipe.open("w"):
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=20)
        except subprocess.TimeoutExpired:
            # Python loses an interrupt that it happens to deliver inside a destructor; people press again.
            process.send_signal(signal.SIGINT)
            _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""


def test_shard_that_does_not_answer_is_named_with_what_to_check(free_port: Callable[[], int]) -> None:
    address = f"127.0.0.1:{free_port()}"
    with ParamServerClient(address, timeout_s=0.3) as client, pytest.raises(UnavailableError) as caught:
        client.status()
    assert str(caught.value).startswith(f"shard {address} does not answer")
    assert "is it running, is the address right?" in str(caught.value)
    failure = caught.value.__cause__
    assert isinstance(failure, grpc.RpcError)
    limited = translate(failure, where="shard x", timeout_s=0.3)
    assert isinstance(limited, UnavailableError)
    assert str(limited).startswith("shard x does not answer within 0.3 s; is it running")


def test_score_that_cannot_be_imported_is_one_line(config_file: Path, tmp_path: Path) -> None:
    """An error of the id table's package reaches the operator like any other."""
    config = load_config(config_file)
    table = replace(config.tables[0], score=ScoreConfig(kind="nowhere:score"))
    config_file.write_text(to_toml(replace(config, tables=(table,))))
    addresses = ("--bootstrap-servers", "127.0.0.1:9", "--shard-address", "")
    done = command("train", "--config", str(config_file), "--run-dir", str(tmp_path), *addresses)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: score kind 'nowhere:score': No module named")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("option", "value"), [("--impressions", "many"), ("--rate", "1.5"), ("--seconds", "soon")]
)
def test_option_that_is_no_number_is_named_with_what_was_expected(option: str, value: str) -> None:
    done = command("run", option, value)
    assert done.returncode == 2
    assert re.search(rf"argument {option}: expected .*, found {value}$", done.stderr.splitlines()[-1])
