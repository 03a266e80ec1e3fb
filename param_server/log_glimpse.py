"""What a log holds, seen from beside the shard that coordinates it: by other shards and by readers.

Nothing in the store changes, and no blob is read. Retention and repair go on meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from param_server.errors import ManifestError, StoreMissingError
from param_server.log_recovery import (
    MANIFESTS,
    SNAPSHOTS,
    Entry,
    Recovered,
    is_there,
    ordinal_name,
    ordinals_in,
    read_manifest,
)
from param_server.manifest import Manifest
from param_server.opened import Opened, read_opened
from param_server.stores import Store


@dataclass(frozen=True, slots=True)
class Glimpse:
    """What a reader beside the coordinator sees."""

    entries: list[Entry]
    """Each can be loaded from the newest base at or before it."""
    unreadable: list[str]
    """Torn or rotten manifests; what needs them is left out."""
    gap: str
    """What follows the entries does not build on them: the log is being repaired just now. "": it does."""


def look(store: Store, ordinals: Iterable[int], *, known: Mapping[int, Entry]) -> Glimpse:
    """The versions at these ordinals, read beside the coordinator; what is known is not read again.

    Raises: LogError.
    """
    made = set(ordinals_in(store, SNAPSHOTS))
    entries: list[Entry] = []
    unreadable: list[str] = []
    broken = False
    for ordinal in ordinals:
        name = ordinal_name(MANIFESTS, ordinal)
        try:
            entry = known.get(ordinal) or Entry(ordinal, read_manifest(store, name))
            snapshot = _read_snapshot(store, entry, unreadable) if ordinal in made else None
        except StoreMissingError:
            entries.clear()  # retention goes from the oldest on, so it took all before this one too
            continue
        except ManifestError as error:
            unreadable.append(str(error))
            broken = True
            continue
        entry = replace(entry, snapshot=snapshot)
        if entry.base is None and (broken or not entries):
            continue  # what it builds on cannot be read, or retention has dropped it
        if entry.base is None and entries[-1].manifest.version != entry.manifest.parent:
            gap = f"version {entry.manifest.version} follows {entry.manifest.parent}, before it lies "
            return Glimpse(entries, unreadable, gap=f"{gap}{entries[-1].manifest.version}")
        entries.append(entry)
        broken = False
    return Glimpse(entries, unreadable, gap="")


def mirror(store: Store) -> Recovered:
    """What a shard that does not coordinate knows when it starts.

    Whether blobs are whole is the coordinator's to judge, which repairs the log; a second opinion here would
    only part the two. Nothing in the store changes. Raises: LogError if it cannot be read.
    """
    damage: list[str] = []
    opened = read_opened(store, damage)
    glimpse = look(store, ordinals_in(store, MANIFESTS), known={})
    opened = max([opened, *(Opened(entry.manifest.version.generation) for entry in glimpse.entries)])
    return Recovered(entries=glimpse.entries, opened=opened, damage=damage + glimpse.unreadable)


def _read_snapshot(store: Store, entry: Entry, unreadable: list[str]) -> Manifest | None:
    """The snapshot at an entry's ordinal, if it can be used."""
    if entry.snapshot is not None:
        return entry.snapshot
    try:
        snapshot = read_manifest(store, ordinal_name(SNAPSHOTS, entry.ordinal))
    except StoreMissingError:
        if not is_there(store, entry.ordinal):
            raise
        return None  # set aside since it was listed
    except ManifestError as error:
        unreadable.append(str(error))
        return None
    return snapshot if snapshot.version == entry.manifest.version and snapshot.kind == "full" else None
