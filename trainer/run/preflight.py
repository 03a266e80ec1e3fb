"""What is looked at before the first process is started: model, tables, stream and the given Kafka."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from trainer.config import Config, preset
from trainer.config.presets import PRESETS
from trainer.data.kuairand import check_recording
from trainer.data.synthetic import check_schema
from trainer.errors import ConfigError
from trainer.run.plan import RunOptions

_RETRY_S = 0.2
_CONNECT_S = 5.0


def check_inputs(config: Config, options: RunOptions) -> None:
    """Build model and tables, look at the stream's first lines, call servers for kafka.start_timeout_s.

    Raises: ConfigError if there is no such model or it cannot be served, a table holds no row, there is no
        such device, the recording may not be read or the schema is not the stream's, or no given server is
        reached; ScoreError for a score that cannot be used; DataError naming the file and what is wrong with
        it.

    A server that is reached may still refuse what the children ask of it; they say so themselves, as they
    alone know how to log in.
    """
    if options.data is None:
        check_schema(config.schema)
    _check_trainable(config, num_ranks=options.num_ranks)
    if options.data is not None:
        _check_readable(options.data)
        check_recording(options.data, config.schema)
    if options.bootstrap_servers is not None:
        _check_reachable(options.bootstrap_servers, timeout_s=config.kafka.start_timeout_s)


def _check_trainable(config: Config, *, num_ranks: int) -> None:
    if _is_of_a_preset(config):
        # It is known to be right, and torch takes long to import.
        return
    from feature_eviction import IdTable
    from trainer.collectives import check_device
    from trainer.model import check_can_be_served, model_of
    from trainer.recommender import policy_of, slots_for

    check_device(config.train.device)
    check_can_be_served(model_of(config), config=config)
    for table in config.tables:
        slots_for(table, world_size=num_ranks, config=config)
        # A score of the user's own is imported, compiled and tried.
        IdTable(policy_of(table, num_slots=1, config=config))


def _is_of_a_preset(config: Config) -> bool:
    """Whether all that makes model and tables is as a preset has it, on CPUs."""
    if config.preset not in PRESETS:
        return False
    known = preset(config.preset)
    mine, its = (
        (one.schema, one.model, one.tables, one.optimizer, one.train.device) for one in (config, known)
    )
    return mine == its


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
