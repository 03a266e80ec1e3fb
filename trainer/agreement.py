"""What the ranks tell each other before each step, so that all of them do the same at the same step.

Two short exchanges: first what each rank has and wants (Flags), then, once all have taken their part of the
batch, what is in it (BatchFacts). Everything that follows is decided by these and by state that is equal on
every rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from trainer.collectives import Ranks


class Flags(NamedTuple):
    """What a rank says; and, of all ranks together, what at least one of them says."""

    ready: bool
    """Its part of a whole batch is there."""
    not_ready: bool
    not_drained: bool
    """It was not asked to drain, or has not handed out all that its partitions held then."""
    stop: bool
    publish_due: bool
    checkpoint_due: bool
    report_due: bool
    partitions_grew: bool
    publish_unfinished: bool
    """It has work left in the publisher's phase."""
    publish_failed: bool
    save_unfinished: bool
    """It has work left in the phase of the checkpoint on its way."""
    save_failed: bool


class BatchFacts(NamedTuple):
    """What a rank's part of a batch holds; of all ranks together see `Agreement`."""

    num_impressions: int
    event_time_s: int
    """Newest so far."""
    produced_ms_newest: int
    """Newest so far."""
    next_ready: bool
    """Its part of another whole batch is there already."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """One step, as all ranks see it."""

    flags: Flags
    num_impressions: int
    """Of all ranks together."""
    num_rows: int
    """Of the rank that has most: all pad to it."""
    event_time_s: int
    produced_ms_newest: int
    next_ready: bool
    """Every rank has its part of another whole batch."""

    @property
    def drained(self) -> bool:
        return not self.flags.not_drained

    @property
    def ends(self) -> bool:
        """This is the last step."""
        return self.flags.stop or self.drained


def agree_on_flags(mine: Flags, *, ranks: Ranks) -> Flags:
    """Collective."""
    return Flags(*(said > 0 for said in ranks.gather(np.array(mine, np.int64)).max(axis=0).tolist()))


def agree_on_batch(flags: Flags, mine: BatchFacts, *, ranks: Ranks) -> Agreement:
    """Collective."""
    facts_RF = ranks.gather(np.array(mine, np.int64))
    newest = BatchFacts(*facts_RF.max(axis=0).tolist())
    return Agreement(
        flags=flags,
        num_impressions=int(facts_RF[:, 0].sum()),
        num_rows=newest.num_impressions,
        event_time_s=newest.event_time_s,
        produced_ms_newest=newest.produced_ms_newest,
        next_ready=bool(facts_RF[:, 3].all()),
    )
