"""The named places in a training run at which a test kills or stops the process (proto/failpoints.py)."""

from __future__ import annotations

from collections.abc import Mapping

from proto.failpoints import arm_from_text, reach
from trainer.errors import ConfigError

FAILPOINTS = (
    "after_fetch",
    "after_map",
    "after_backward",
    "after_step",
    *(
        f"publish.{side}_{step}"
        for step in ("take", "append", "commit", "ack")
        for side in ("before", "after")
    ),
    "checkpoint.before_copy",
    "checkpoint.after_copy",
    "checkpoint.before_write",
    "checkpoint.inside_rows_file",
    "checkpoint.inside_ids_file",
    "checkpoint.inside_state_file",
    "checkpoint.inside_dense_file",
    "checkpoint.after_write",
    "checkpoint.before_gather",
    "checkpoint.after_gather",
    "checkpoint.before_manifest",
    "checkpoint.inside_manifest",
    "checkpoint.after_manifest",
    "checkpoint.inside_pointer",
    "checkpoint.after_pointer",
    "checkpoint.after_retention",
)
"""Every name that the code reaches; the fault campaign proves that each one fires."""


def arm_from_environment(environ: Mapping[str, str]) -> None:
    """Raises: ConfigError for a text that is not NAME:HIT:ACTION[:RANK] or a name that does not exist."""
    text = environ.get("FRESHET_FAILPOINT", "")
    if not text:
        return
    try:
        arm_from_text(
            text,
            names=FAILPOINTS,
            rank=environ.get("RANK", "0"),
            log=environ.get("FRESHET_FAILPOINT_LOG"),
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


__all__ = ["FAILPOINTS", "arm_from_environment", "reach"]
