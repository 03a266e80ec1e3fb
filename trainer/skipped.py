"""What becomes of a batch that was not learned, as its loss or a gradient was not finite.

It is consumed like any other: the position moves on, and each of its impressions goes to the dead-letter
topic, so that what was trained is what was produced but for the dead letters. Rows and dense model are as they
were; the id tables have seen its ids. A batch is skipped on all ranks or on none: they learn one step together.
"""

from __future__ import annotations

import structlog

from trainer.config import Config
from trainer.errors import NotFiniteError
from trainer.stream.bad_budget import Allowance, BadBudget
from trainer.stream.source import Batch, KafkaSource

log = structlog.get_logger()

REASON = "non_finite_loss"


def allowance_of_training(config: Config) -> Allowance:
    train, optimizer = config.train, config.optimizer
    return Allowance(
        share_max=train.non_finite_share_max,
        window=train.non_finite_window,
        option="train.non_finite_share_max",
        where="training",
        advice="The loss or a gradient of their batches is not finite; nothing of them was applied, and they are "
        f"in '{config.kafka.dead_letter_topic}'. The state that training goes on from is as good as it was before "
        "them. If every batch is like this, the model has gone wrong earlier: move the newest checkpoints out of "
        f"their directory, and start again with a lower optimizer.dense_learning_rate ({optimizer.dense_learning_rate:g}). "
        "If only some are, look at the dead letters for what they share. To train past them, start once with a "
        "higher train.non_finite_share_max (1 = never stop)",
        error=NotFiniteError,
    )


class SkippedBatches:
    """Counts batches of all ranks together, so that all ranks stop at the same step."""

    def __init__(self, config: Config) -> None:
        self._budget = BadBudget(allowance_of_training(config))

    def learned(self, num_impressions: int) -> None:
        """Args: num_impressions: of all ranks, here and below."""
        self._budget.add(num_impressions, {}, origin="")

    def skip(
        self, batch: Batch, *, source: KafkaSource, num_impressions: int, step: int, not_finite: str
    ) -> None:
        """Store the dead letters of this rank's part and count the batch.

        Raises: NotFiniteError beyond the share that is allowed, StreamError if a letter could not be stored.
        """
        text = f"step {step}: the {not_finite} of its batch is not finite"
        log.warning("batch skipped", step=step, impressions=num_impressions, not_finite=not_finite)
        source.refuse(batch, reason=REASON, text=text)
        self._budget.add(num_impressions, {REASON: num_impressions}, origin=f"step {step}")
        self._budget.check()
