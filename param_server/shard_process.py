"""A shard as a process: its options, how it is put together, and its work beside."""

from __future__ import annotations

import argparse
import os
import threading
import time
from pathlib import Path

import structlog

from feature_eviction.argument_types import at_least
from param_server.errors import LogError, ManifestError
from param_server.failpoints import arm_from_environment
from param_server.shard import Shard
from param_server.store_opening import open_store
from param_server.version_log import VersionLog

log = structlog.get_logger()

MAINTAIN_S = 0.5
"""How often a shard looks for a commit of the coordinator, or for a snapshot that is due."""


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address", default="127.0.0.1:0", help="host:port to listen at; port 0 = any (default: %(default)s)"
    )
    parser.add_argument(
        "--log-dir", required=True, help="where the version log lies: a folder, or scheme://... (fsspec)"
    )
    parser.add_argument(
        "--keep-full",
        type=at_least(1),
        default=2,
        help="full versions and snapshots kept in the log (default: %(default)s)",
    )
    parser.add_argument(
        "--shard",
        type=at_least(0),
        default=0,
        help="this shard's number; 0 coordinates (default: %(default)s)",
    )
    parser.add_argument(
        "--num-shards", type=at_least(1), default=1, help="shards that share the log (default: %(default)s)"
    )
    parser.add_argument(
        "--snapshot-every",
        type=at_least(0),
        default=0,
        help="deltas after which a snapshot is made; 0 = never (default: %(default)s)",
    )
    parser.add_argument(
        "--memory-mib",
        type=at_least(0),
        default=0,
        help="for rows in memory; 0 = no limit (default: %(default)s)",
    )
    parser.add_argument("--ready-file", type=Path, help="written as JSON once the process listens")


def open_shard(arguments: argparse.Namespace) -> Shard:
    """Raises: LogError, LogDamageError, LimitError."""
    arm_from_environment(os.environ, shard=arguments.shard)
    store = open_store(arguments.log_dir, owner=f"shard-{arguments.shard}")
    version_log = VersionLog(
        store, shard=arguments.shard, num_shards=arguments.num_shards, keep_full=arguments.keep_full
    )
    return Shard(
        version_log,
        num_shards=arguments.num_shards,
        memory_bytes_max=arguments.memory_mib << 20 if arguments.memory_mib else None,
        snapshot_every=arguments.snapshot_every,
    )


def maintain(shard: Shard, stop: threading.Event) -> None:
    """The loop beside the calls, until `stop`.

    A full disk, or a manifest that has rotted and that the coordinator mends, is reported and tried again.
    """
    reported = ""
    while not stop.wait(MAINTAIN_S):
        reason = ""
        try:
            shard.maintain(now_s=time.monotonic())
        except (LogError, ManifestError) as error:
            reason = str(error)
        # Once, and not each half second for as long as it lasts.
        if reason and reason != reported:
            log.error("the log cannot be maintained, it is tried again", reason=reason)
        reported = reason
