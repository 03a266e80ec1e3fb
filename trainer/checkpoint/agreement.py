"""How ranks agree on what went wrong on one of them, so that all end or all go on.

A rank that raised alone would leave the others waiting in their next collective call.
"""

from __future__ import annotations

import msgspec

from trainer.collectives import Ranks
from trainer.errors import CheckpointError


class Fault(msgspec.Struct):
    """What went wrong on a rank, told to the others; an empty reason = nothing did."""

    reason: str = ""
    ends_run: bool = False


def gather_faults(ranks: Ranks, fault: Fault) -> list[Fault]:
    """Every rank's fault. Collective."""
    return [msgspec.json.decode(data, type=Fault) for data in ranks.gather_bytes(msgspec.json.encode(fault))]


def agree_on(ranks: Ranks, fault: Fault) -> list[str]:
    """The reasons of all ranks. Collective.

    Raises: CheckpointError, on every rank, if one of them ends the run.
    """
    faults = gather_faults(ranks, fault)
    for one in faults:
        if one.ends_run:
            raise CheckpointError(one.reason)
    return [one.reason for one in faults if one.reason]
