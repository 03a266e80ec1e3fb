"""What is looked at before the first process is started: the model, the recording and the given Kafka."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from trainer.config import Config
from trainer.config.config import ModelConfig
from trainer.data.kuairand import check_recording
from trainer.errors import ConfigError
from trainer.run.plan import RunOptions

_RETRY_S = 0.2
_CONNECT_S = 5.0


def check_inputs(config: Config, options: RunOptions) -> None:
    """Build the model, look at the recording's first lines, call the servers for kafka.start_timeout_s.

    Raises: ConfigError if there is no such model or it cannot be served, the recording may not be read or the
        schema is not its own, or no given server is reached; DataError naming the file and what is wrong
        with it.

    A server that is reached may still refuse what the children ask of it; they say so themselves, as they
    alone know how to log in.
    """
    _check_model(config)
    if options.data is not None:
        _check_readable(options.data)
        check_recording(options.data, config.schema)
    if options.bootstrap_servers is not None:
        _check_reachable(options.bootstrap_servers, timeout_s=config.kafka.start_timeout_s)


def _check_model(config: Config) -> None:
    if config.model.name == ModelConfig().name:
        # It is there and can be served, and torch takes long to import.
        return
    from trainer.model import check_can_be_served, model_of

    check_can_be_served(model_of(config), config=config)


def _check_readable(data: Path) -> None:
    needed = os.R_OK | os.X_OK if data.is_dir() else os.R_OK
    if not os.access(data, needed):
        raise ConfigError(f"--data {data}: may not be read by this user; change its permissions")


def _check_reachable(servers: str, *, timeout_s: float) -> None:
    addresses = [_address(server) for server in servers.split(",")]
    deadline_s = time.monotonic() + timeout_s
    while True:
        failures = []
        for address in addresses:
            left_s = deadline_s - time.monotonic()
            try:
                socket.create_connection(address, timeout=min(_CONNECT_S, max(0.1, left_s))).close()
            except OSError as error:
                failures.append(f"{address[0]}:{address[1]}: {error.strerror or error}")
            else:
                return
        if time.monotonic() + _RETRY_S >= deadline_s:
            raise ConfigError(
                f"--bootstrap-servers {servers}: none could be reached within {timeout_s:g} s "
                f"({'; '.join(failures)}); check the address and that the broker runs"
            )
        time.sleep(_RETRY_S)


def _address(server: str) -> tuple[str, int]:
    host, _, port = server.strip().rpartition(":")
    if not host or not port.isdigit() or int(port) > 65_535:
        raise ConfigError(f"--bootstrap-servers: expected host:port, found '{server}'")
    return host.strip("[]"), int(port)
