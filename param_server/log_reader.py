"""Reading a log beside the shards that write it: no lock, no repair, nothing changes in the store.

A reader looks at the store again whenever it is asked for versions. What retention drops meanwhile is no
damage: who is in the middle of it is told so and begins anew.
"""

from __future__ import annotations

from dataclasses import replace

from param_server.errors import GapError, StoreMissingError
from param_server.history import read_promoted
from param_server.log_recovery import (
    MANIFESTS,
    SNAPSHOTS,
    Entry,
    ordinal_name,
    ordinals_in,
    read_manifest,
    read_named_blob,
)
from param_server.log_view import LogView
from param_server.manifest import Manifest, Version
from param_server.stores import Store


class LogReader:
    """Implements history.VersionReader; for one thread. The store is its maker's to close."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._view = LogView([])

    def plan_after(self, held: Version | None) -> list[Manifest]:
        """What a reader that holds `held` loads to reach the newest version there is by now.

        Raises: GapError, ManifestError, LogError.
        """
        self._look()
        return self._view.plan_after(held)

    def chain_to(self, version: Version) -> list[Manifest]:
        """The manifests whose rows, one over the other, are the version's.

        Raises: MissingBlobError, GapError, ManifestError, LogError.
        """
        self._look()
        return self._view.chain_to(version)

    def promoted(self) -> Version | None:
        """The version of the stable channel; None: none was promoted. Raises: LogDamageError."""
        return read_promoted(self._store)

    def read_blob(self, manifest: Manifest, name: str) -> bytes | memoryview:
        """The bytes of one blob, checked.

        Raises: LogDamageError if it is not what was committed, MissingBlobError if the version was
            dropped by retention meanwhile.
        """
        return read_named_blob(self._store, manifest, name, still_there=self._still_has)

    def _still_has(self, version: Version) -> bool:
        self._look()
        return self._view.get(version) is not None

    def _look(self) -> None:
        """See which versions came and went; what is known is not read again."""
        known = {entry.ordinal: entry for entry in self._view.entries} if self._is_as_known() else {}
        made = set(ordinals_in(self._store, SNAPSHOTS))
        entries: list[Entry] = []
        for ordinal in ordinals_in(self._store, MANIFESTS):
            try:
                entry = known.get(ordinal) or Entry(ordinal, self._read(MANIFESTS, ordinal))
                if entry.snapshot is None and ordinal in made:
                    entry = replace(entry, snapshot=self._read(SNAPSHOTS, ordinal))
            except StoreMissingError:
                entries.clear()  # retention goes from the oldest on, so it took all before this one too
                continue
            if entry.base is None and not entries:
                continue  # retention has dropped the version that it builds on
            if entry.base is None and entry.manifest.parent != entries[-1].manifest.version:
                self._view = LogView([])
                raise GapError(
                    f"version {entry.manifest.version} follows {entry.manifest.parent}, before it lies "
                    f"{entries[-1].manifest.version}: the log is being repaired, it is read anew"
                )
            entries.append(entry)
        self._view = LogView(entries)

    def _is_as_known(self) -> bool:
        """A repair sets the newest versions aside, and others take their ordinals."""
        if not self._view.entries:
            return False
        newest = self._view.entries[-1]
        try:
            return self._read(MANIFESTS, newest.ordinal) == newest.manifest
        except StoreMissingError:
            return False

    def _read(self, folder: str, ordinal: int) -> Manifest:
        return read_manifest(self._store, ordinal_name(folder, ordinal))
