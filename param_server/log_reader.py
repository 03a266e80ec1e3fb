"""Reading a log beside the shards that write it: no lock, no repair, nothing changes in the store.

A reader looks at the store again whenever it is asked for versions. What retention drops meanwhile is no
damage: who is in the middle of it is told so and begins anew.
"""

from __future__ import annotations

import structlog

from param_server.errors import GapError, ManifestError, StoreMissingError
from param_server.history import read_promoted
from param_server.log_glimpse import look
from param_server.log_recovery import (
    MANIFESTS,
    ordinal_name,
    ordinals_in,
    read_manifest,
    read_named_blob,
)
from param_server.log_view import LogView
from param_server.manifest import Manifest, Version
from param_server.stores import Store

log = structlog.get_logger()


class LogReader:
    """Implements history.VersionReader; for one thread. The store is its maker's to close."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._view = LogView([])
        self._unreadable: set[str] = set()

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
        self._view = LogView([])
        glimpse = look(self._store, ordinals_in(self._store, MANIFESTS), known=known)
        for line in sorted(set(glimpse.unreadable) - self._unreadable):
            log.error("version log damage, what needs it is left out", found=line)
        self._unreadable = set(glimpse.unreadable)
        if glimpse.gap:
            raise GapError(f"{glimpse.gap}: the log is being repaired, it is read anew")
        if glimpse.unreadable and not glimpse.entries:
            raise ManifestError(f"no version of the log can be loaded: {glimpse.unreadable[0]}")
        self._view = LogView(glimpse.entries)

    def _is_as_known(self) -> bool:
        """A repair sets the newest versions aside, and others take their ordinals."""
        if not self._view.entries:
            return False
        newest = self._view.entries[-1]
        try:
            return read_manifest(self._store, ordinal_name(MANIFESTS, newest.ordinal)) == newest.manifest
        except (StoreMissingError, ManifestError):
            return False
