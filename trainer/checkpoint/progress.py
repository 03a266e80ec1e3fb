"""Where a run stands: what a checkpoint says beside the state itself."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from trainer.checkpoint.manifest import CheckpointManifest, FileEntry
from trainer.config import Config
from trainer.stream.columns import Position


class Progress(msgspec.Struct, kw_only=True):
    """Where a run stands; the same on every rank but for the dead letters, which each rank counts."""

    step: int = 0
    generation: int = 0
    published: str = ""
    """The newest version that the parameter server acknowledged; empty = none."""
    impressions_trained: int = 0
    event_time_s: int = 0
    produced_ms_newest: int = 0
    """When the newest impression trained entered the stream."""
    dead_letters: dict[str, int] = {}
    topic_id: str = ""
    """The id that the broker gave the topic of the positions; empty where it gives none."""


@dataclass(frozen=True, slots=True)
class Committed:
    """A checkpoint that is durable."""

    name: str
    step: int
    positions: list[Position]
    """Of this rank's partitions."""
    seconds: float
    """From the copy to now."""


@dataclass(frozen=True, slots=True)
class Restored:
    name: str
    progress: Progress
    positions: list[Position]
    """Of all partitions."""


class RankPart(msgspec.Struct):
    """What a rank adds to the manifest."""

    files: list[FileEntry]
    positions: list[Position]
    dead_letters: dict[str, int]


def manifest_of(
    progress: Progress,
    parts: list[RankPart],
    *,
    config: Config,
    slots_per_rank: dict[str, int],
    created_ms: int,
) -> CheckpointManifest:
    """The manifest of a state; no parts, no ranks: it was imported."""
    dead_letters: dict[str, int] = {}
    for part in parts:
        for reason, num in part.dead_letters.items():
            dead_letters[reason] = dead_letters.get(reason, 0) + num
    return CheckpointManifest(
        step=progress.step,
        created_ms=created_ms,
        generation=progress.generation,
        published=progress.published,
        topic_id=progress.topic_id,
        world_size=len(parts),
        schema_hash=config.schema.hash(),
        config_hash=config.hash(),
        positions=[position for part in parts for position in part.positions],
        slots_per_rank=slots_per_rank,
        counters={
            "impressions_trained": progress.impressions_trained,
            "event_time_s": progress.event_time_s,
            "produced_ms_newest": progress.produced_ms_newest,
        },
        dead_letters=dead_letters,
        files=[file for part in parts for file in part.files],
    )


def progress_of(manifest: CheckpointManifest, *, rank: int) -> Progress:
    """What a rank goes on with; rank 0 takes over the dead letters of all."""
    return Progress(
        step=manifest.step,
        generation=manifest.generation,
        published=manifest.published,
        topic_id=manifest.topic_id,
        impressions_trained=manifest.counters["impressions_trained"],
        event_time_s=manifest.counters["event_time_s"],
        produced_ms_newest=manifest.counters["produced_ms_newest"],
        dead_letters=manifest.dead_letters if rank == 0 else {},
    )
