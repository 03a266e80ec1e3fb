"""The named places in a shard at which a test kills or stops the process (proto/failpoints.py)."""

from __future__ import annotations

from collections.abc import Mapping

from param_server.errors import ParamServerError
from proto.failpoints import arm_from_text, reach

FAILPOINTS = (
    "publish_joined",
    "publish_appended",
    "publish_synced",
    "commit_checked",
    "commit_prepared",
    "commit_durable",
    "commit_created",
    "commit_switched",
    "snapshot_appended",
    "snapshot_synced",
    "snapshot_created",
    "retain_manifests",
    "retain_segments",
    "generation_written",
)
"""Every name that the code reaches; the kill tests prove that each one fires."""


def arm_from_environment(environ: Mapping[str, str], *, shard: int) -> None:
    """Raises: ParamServerError for a text that is not NAME:HIT:ACTION[:SHARD] or an unknown name."""
    text = environ.get("FRESHET_FAILPOINT", "")
    # A whole run has one environment: a name of the trainer's is none of ours.
    if not text or text.partition(":")[0] not in FAILPOINTS:
        return
    try:
        arm_from_text(text, names=FAILPOINTS, rank=str(shard), log=environ.get("FRESHET_FAILPOINT_LOG"))
    except ValueError as error:
        raise ParamServerError(str(error)) from error


__all__ = ["FAILPOINTS", "arm_from_environment", "reach"]
