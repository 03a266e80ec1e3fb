"""What a run says when it stops, whatever stopped it: where, what is safe, and how to go on."""

from __future__ import annotations

from collections.abc import Iterable

import structlog

from trainer.checkpoint import Progress
from trainer.stream.columns import Position

log = structlog.get_logger()


def report_stop(reason: str, *, progress: Progress, positions: Iterable[Position], checkpoint: str) -> None:
    """One line. Args: reason: what stopped it. checkpoint: the newest that is durable; empty = none yet."""
    go_on = "start it again with the same run directory: it trains on from there, each impression once"
    if not checkpoint:
        go_on = "start it again with the same run directory: it trains from the beginning of the stream"
    log.info(
        "stopped",
        because=reason,
        step=progress.step,
        impressions_trained=progress.impressions_trained,
        next_untrained=[
            f"partition {one.partition} offset {one.kafka_offset} row {one.row}" for one in positions
        ],
        newest_checkpoint=checkpoint or "none",
        go_on=go_on,
    )
