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
