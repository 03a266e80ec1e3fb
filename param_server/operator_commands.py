"""The commands `pin`, `promote` and `rollback`: which version replicas answer from, by an operator's word."""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from param_server.errors import ConfigError, UnavailableError
from param_server.manifest import Version
from param_server.security import ClientSecurity

POLL_S = 0.1
ANSWER_S = 10.0
"""A shard that does not answer is told of soon; a rollback of a large table takes its time."""
ROLLBACK_S = 600.0


def add_parsers(commands: Any) -> None:
    pin = commands.add_parser("pin", help="hold a replica at a version, older or newer")
    pin.add_argument("address", help="the replica's host:port")
    pin.add_argument("version", nargs="?", default="", help="generation.sequence")
    pin.add_argument("--off", action="store_true", help="follow the channel again")
    pin.add_argument(
        "--timeout-s",
        type=float,
        default=60.0,
        help="how long to wait until it is there (default: %(default)s)",
    )
    promote = commands.add_parser("promote", help="name the version of the stable channel")
    promote.add_argument("address", help="the shard's host:port")
    promote.add_argument("version", help="generation.sequence")
    rollback = commands.add_parser("rollback", help="publish an older version's content as a new version")
    rollback.add_argument("address", help="of shard 0")
    rollback.add_argument("version", help="generation.sequence, as `log ls` shows it")


def run(arguments: argparse.Namespace, security: ClientSecurity) -> None:
    """Raises: ParamServerError."""
    if arguments.command == "promote":
        _promote(arguments, security)
    elif arguments.command == "rollback":
        _roll_back(arguments, security)
    elif arguments.off == bool(arguments.version):
        raise ConfigError("expected a version or --off, one of them")
    else:
        _pin(arguments, security)


def _promote(arguments: argparse.Namespace, security: ClientSecurity) -> None:
    from param_server.client import HistoryClient

    with HistoryClient(arguments.address, security=security) as client:
        promoted = client.promote(Version.parse(arguments.version))
    sys.stdout.write(f"promoted {promoted}: replicas of the stable channel load it\n")


def _roll_back(arguments: argparse.Namespace, security: ClientSecurity) -> None:
    from param_server.client import ParamServerClient

    old = Version.parse(arguments.version)
    with ParamServerClient(arguments.address, timeout_s=ANSWER_S, security=security) as shard:
        shard.status()
    with ParamServerClient(arguments.address, timeout_s=ROLLBACK_S, security=security) as shard:
        sys.stdout.write(f"{shard.rollback(old)} has the content of {old}\n")


def _pin(arguments: argparse.Namespace, security: ClientSecurity) -> None:
    from param_server.client import ReplicaClient

    with ReplicaClient(arguments.address, security=security) as client:
        if arguments.off:
            state = client.unpin()
            sys.stdout.write(f"unpinned at {state.version}: it follows the {state.channel} channel\n")
            return
        version = Version.parse(arguments.version)
        state = client.pin(version)
        deadline = time.monotonic() + arguments.timeout_s
        while state.version != version:
            if state.pinned != version:
                raise ConfigError(f"replica {arguments.address}: someone else pinned it to {state.pinned}")
            if time.monotonic() > deadline:
                raise UnavailableError(
                    f"replica {arguments.address}: after {arguments.timeout_s:g} s it answers from "
                    f"{state.version} still; it stays pinned to {version} and goes on trying "
                    f"({state.last_refusal or 'no version was refused'})"
                )
            time.sleep(POLL_S)
            state = client.status()
        sys.stdout.write(f"pinned at {version}\n")
