"""The processes of the parameter server.

python -m param_server shard --address 127.0.0.1:0 --log-dir DIR
python -m param_server replica --shard ADDRESS --address 127.0.0.1:0
python -m param_server replica --log-dir URL --address 127.0.0.1:0
python -m param_server status ADDRESS
python -m param_server rollback ADDRESS VERSION
python -m param_server log ls|verify|show|diff|gc LOG_DIR ...
python -m param_server pin REPLICA VERSION|--off
python -m param_server promote SHARD VERSION
python -m param_server rules simulate --synthetic 1000000 --rules everything --rules paddle_ctr
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import msgspec
import structlog

from feature_eviction.argument_types import at_least
from param_server import (
    log_commands,
    operator_commands,
    rules_command,
    security_arguments,
    shard_process,
)
from param_server.errors import ConfigError, ParamServerError, UnavailableError
from param_server.manifest import Version
from param_server.security import ClientSecurity, ServerSecurity
from param_server.serving_config import ServingConfig

if TYPE_CHECKING:
    from param_server.sources import VersionSource

STOP_GRACE_S = 2.0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m param_server", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    shard = commands.add_parser("shard", help="keep the version log and stream it to replicas")
    shard_process.add_options(shard)
    replica = commands.add_parser("replica", help="follow a shard, or its log, and answer predictions")
    versions_from = replica.add_mutually_exclusive_group(required=True)
    versions_from.add_argument("--shard", help="the shard's host:port")
    versions_from.add_argument("--log-dir", help="read the log itself: a folder, or scheme://... (fsspec)")
    replica.add_argument(
        "--address", default="127.0.0.1:0", help="host:port to listen at; port 0 = any (default: %(default)s)"
    )
    replica.add_argument("--name", default="replica", help="shown by the shard (default: %(default)s)")
    replica.add_argument(
        "--channel",
        choices=("canary", "stable"),
        default="canary",
        help="every version, or the promoted one (default: %(default)s)",
    )
    replica.add_argument("--pin", default="", help="start at this version and stay there")
    replica.add_argument("--serving-config", type=Path, help="TOML: row format, memory, lifetimes")
    replica.add_argument(
        "--stale-after-s",
        type=at_least(0),
        default=0,
        help="not ready beyond it; 0 = never (default: %(default)s)",
    )
    replica.add_argument("--ready-file", type=Path, help="written as JSON once the process listens")
    status = commands.add_parser("status", help="show the state of a shard or a replica")
    status.add_argument("address")
    status.add_argument(
        "--ready", action="store_true", help="end with 1 if it is a replica that is not ready"
    )
    operator_commands.add_parsers(commands)
    rules_command.add_parser(commands)
    log_commands.add_commands(commands.add_parser("log", help="look into a version log, or tidy it"))
    for name in ("shard", "replica", "status", "pin", "promote", "rollback"):
        security_arguments.add_arguments(commands.choices[name])
    security_arguments.add_shard_token(replica)
    arguments = parser.parse_args(argv)
    # Standard output belongs to `status`; logs go beside it.
    logging.basicConfig(stream=sys.stderr, level=logging.INFO)
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    try:
        if arguments.command == "rules":
            rules_command.run(arguments)
            return 0
        if arguments.command == "log":
            return log_commands.run(arguments)
        security = security_arguments.read_security(arguments, os.environ)
        if arguments.command == "shard":
            run_shard(arguments, security)
        elif arguments.command == "replica":
            run_replica(arguments, security)
        elif arguments.command == "status":
            show_status(arguments.address, security, must_be_ready=arguments.ready)
        else:
            operator_commands.run(arguments, security)
    except ParamServerError as error:
        sys.stderr.write(f"param_server {arguments.command}: {error}\n")
        return 1
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        sys.stderr.write(f"param_server {arguments.command}: {where}{error.strerror or error}\n")
        return 1
    return 0


def run_shard(arguments: argparse.Namespace, security: ServerSecurity) -> None:
    from param_server.history_service import HistoryServicer
    from param_server.shard_service import SERVER_THREADS, ShardServicer
    from param_server.transport import open_server
    from proto import param_server_pb2_grpc

    stop = stop_on_signals()
    server, address = open_server(arguments.address, num_threads=SERVER_THREADS, security=security)
    shard = shard_process.open_shard(arguments)
    servicer = ShardServicer(shard, clock_ms=wall_clock_ms)
    param_server_pb2_grpc.add_ParamServerServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    history = HistoryServicer(shard.log, subscriptions=shard.subscriptions)
    param_server_pb2_grpc.add_HistoryServicer_to_server(history, server)  # type: ignore[no-untyped-call]
    server.start()
    beside = ThreadPoolExecutor(max_workers=1, thread_name_prefix="maintain")
    maintaining = beside.submit(shard_process.maintain, shard, stop)
    # An error that it does not expect ends the process: it must not go on unmaintained.
    maintaining.add_done_callback(lambda _: stop.set())
    try:
        announce(arguments.ready_file, address)
        stop.wait()
    finally:
        # Also after an error: Python waits for the threads beside before the process ends.
        stop.set()
        servicer.stop()
        server.stop(STOP_GRACE_S).wait()
        wait([maintaining])
        shard.log.close()
    maintaining.result()


def run_replica(arguments: argparse.Namespace, security: ServerSecurity) -> None:
    from param_server.follower import Follower
    from param_server.predict import warm_up
    from param_server.replica import Replica
    from param_server.replica_service import SERVER_THREADS, ReplicaService
    from param_server.transport import open_server
    from proto import open_inference_pb2_grpc, param_server_pb2_grpc

    stop = stop_on_signals()
    source = open_source(arguments, security)
    replica = Replica(
        clock_ms=wall_clock_ms,
        config=read_serving_config(arguments.serving_config),
        channel=arguments.channel,
    )
    if arguments.pin:
        replica.pin(Version.parse(arguments.pin))
    follower = Follower(replica, source, name=arguments.name)
    server, address = open_server(arguments.address, num_threads=SERVER_THREADS, security=security)
    service = ReplicaService(
        replica,
        stale_after_ms=1000 * arguments.stale_after_s,
        clock_ms=wall_clock_ms,
        pin=follower.pin,
    )
    open_inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    param_server_pb2_grpc.add_ReplicaServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    server.start()
    warm_up()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="follow")
    following = pool.submit(follower.follow)
    # An error that `follow` does not expect ends the process instead of leaving a replica that ages.
    following.add_done_callback(lambda _: stop.set())
    try:
        announce(arguments.ready_file, address)
        stop.wait()
    finally:
        # Also after an error: Python waits for the threads beside before the process ends.
        follower.stop()
        wait([following])
        server.stop(STOP_GRACE_S).wait()
        source.close()
    following.result()


def open_source(arguments: argparse.Namespace, security: ServerSecurity) -> VersionSource:
    """Where a replica gets its versions from.

    Raises: LogError if there is no log, AddressError, AccessError.
    """
    from param_server.log_reader import LogReader
    from param_server.log_recovery import made_for
    from param_server.sources import ShardSource, StoreSource
    from param_server.store_opening import open_store

    if arguments.shard is not None:
        towards_shard = security_arguments.read_shard_security(arguments, os.environ, own=security)
        return ShardSource(arguments.shard, name=arguments.name, security=towards_shard)
    store = open_store(arguments.log_dir)
    made_for(store)  # a folder that is no log would look like a log without a version, for ever
    return StoreSource(LogReader(store))


def read_serving_config(path: Path | None) -> ServingConfig:
    """Raises: ConfigError naming the file and what is wrong in it."""
    if path is None:
        return ServingConfig()
    try:
        return msgspec.toml.decode(path.read_bytes(), type=ServingConfig)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: {error}") from error


def show_status(address: str, security: ClientSecurity, *, must_be_ready: bool) -> None:
    """Write the state of whatever listens at the address as JSON.

    Raises: UnavailableError if nothing answers, or with must_be_ready a replica that is not ready.
    """
    from param_server.client import ParamServerClient, ReplicaClient

    try:
        with ParamServerClient(address, timeout_s=5.0, security=security) as shard:
            state: object = shard.status()
    except UnavailableError as error:
        raise UnavailableError(
            f"nothing answers at {address}; is a shard or a replica running there, is the address right?"
        ) from error
    except ParamServerError:
        with ReplicaClient(address, timeout_s=5.0, security=security) as replica:
            state = replica.status()
    text = msgspec.json.format(msgspec.json.encode(state, enc_hook=str), indent=2)
    sys.stdout.write(text.decode() + "\n")
    if must_be_ready and not getattr(state, "ready", True):
        raise UnavailableError(f"{address}: not ready: no version with a model yet, or one that is too old")


def stop_on_signals() -> threading.Event:
    stop = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, on_signal)
    return stop


def announce(ready_file: Path | None, address: str) -> None:
    """Tell where the process listens: in the log, and in the file if one is wanted, whole at once."""
    structlog.get_logger().info("listening", address=address)
    if ready_file is not None:
        temporary = ready_file.with_name(f".{ready_file.name}.{os.getpid()}")
        temporary.write_bytes(msgspec.json.encode({"address": address, "pid": os.getpid()}))
        os.replace(temporary, ready_file)


def wall_clock_ms() -> int:
    return time.time_ns() // 1_000_000


if __name__ == "__main__":
    sys.exit(main())
