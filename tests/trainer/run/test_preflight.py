"""What a run needs from outside is missed before anything is started."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from trainer.config import Config
from trainer.errors import ConfigError
from trainer.run.plan import RunOptions
from trainer.run.preflight import check_inputs
from trainer.run.run_all import run_all


def test_unreachable_kafka_is_an_error_before_anything_starts(
    small_config: Config, options: RunOptions, free_port: Callable[[], int]
) -> None:
    server = f"127.0.0.1:{free_port()}"
    config = msgspec.structs.replace(
        small_config, kafka=msgspec.structs.replace(small_config.kafka, start_timeout_s=1)
    )
    with pytest.raises(ConfigError, match=f"--bootstrap-servers {server}: none could be reached"):
        run_all(config, replace(options, bootstrap_servers=server))
    assert not options.out_dir.exists()


def test_one_server_that_answers_is_enough(options: RunOptions, free_port: Callable[[], int]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        servers = f"127.0.0.1:{free_port()},127.0.0.1:{listening.getsockname()[1]}"
        check_inputs(replace(options, bootstrap_servers=servers), timeout_s=5.0)
        assert listening.accept()[1][0] == "127.0.0.1"


@pytest.mark.parametrize("server", ["kafka", "kafka:", ":9092", "kafka:x", "kafka:70000"])
def test_address_without_host_or_port_is_refused(options: RunOptions, server: str) -> None:
    with pytest.raises(ConfigError, match="expected host:port"):
        check_inputs(replace(options, bootstrap_servers=server), timeout_s=1.0)


def test_recording_that_may_not_be_read_is_refused(
    options: RunOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "log.csv"
    data.touch(mode=0o000)
    # Root may read everything; what is tested is what follows from the system's answer.
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"log\.csv: may not be read"):
        check_inputs(replace(options, data=data), timeout_s=1.0)
