"""What becomes of a batch that was not learned, as its loss or a gradient was not finite.

It is consumed like any other: the position moves on, and each of its impressions goes to the dead-letter
topic, so that what was trained is what was produced but for the dead letters. Rows and dense model are as
they were; the id tables have seen its ids. A batch is skipped on all ranks or on none: they learn a step
together.
"""

from __future__ import annotations

import structlog

from trainer.checkpoint import Progress
from trainer.config import Config
from trainer.errors import NotFiniteError
from trainer.status_report import sum_by_key
from trainer.stream.bad_budget import Allowance, BadBudget
from trainer.stream.source import Batch, KafkaSource

log = structlog.get_logger()

REASON = "non_finite_loss"


def allowance_of_training(config: Config) -> Allowance:
    train = config.train
    return Allowance(
        share_max=train.non_finite_share_max,
        window=train.non_finite_window,
        option="train.non_finite_share_max",
        where="training",
        advice="The loss or a gradient of their batches is not finite; nothing of these batches was applied, "
        f"and their impressions are in '{config.kafka.dead_letter_topic}'. If every batch is like this, the "
        "model has gone wrong before: move the newest checkpoints out of their directory and start again "
        "with lower learning rates. If only some are, look at what their dead letters share. To train past "
        "them, start once with a higher train.non_finite_share_max (1 = never stop)",
        error=NotFiniteError,
    )


class SkippedBatches:
    """Counts batches of all ranks together, so that all ranks stop at the same step."""

    def __init__(self, config: Config, *, progress: Progress) -> None:
        """Args: progress: the loop's; the dead letters are counted there."""
        self._progress = progress
        self._budget = BadBudget(allowance_of_training(config))

    def learned(self, num_impressions: int) -> None:
        """Args: num_impressions: of all ranks, here and below."""
        self._budget.add(num_impressions, {}, origin="")

    def skip(self, batch: Batch, *, source: KafkaSource, num_impressions: int, not_finite: str) -> None:
        """Store the dead letters of this rank's part of the newest step's batch, and count it.

        Raises: NotFiniteError beyond the share that is allowed, StreamError if a letter could not be stored.
        """
        progress, own = self._progress, len(batch.impressions)
        step = progress.step
        log.warning("batch skipped", step=step, impressions=num_impressions, not_finite=not_finite)
        source.refuse(batch, reason=REASON, text=f"step {step}: the {not_finite} of its batch is not finite")
        if own:
            progress.dead_letters = sum_by_key([progress.dead_letters, {REASON: own}])
        self._budget.add(num_impressions, {REASON: num_impressions}, origin=f"step {step}")
        self._budget.check()
