"""What one process knows of a log: its versions in order.

A view only ever grows at its end, else another takes its place, so readers need no lock.
"""

from __future__ import annotations

from param_server.errors import MissingBlobError
from param_server.log_order import chain_to, index_after, plan_after
from param_server.log_recovery import Entry
from param_server.manifest import Manifest, Version


class LogView:
    """Entries oldest first; the first one has a base."""

    def __init__(self, entries: list[Entry]) -> None:
        self.entries = entries
        self._by_version = {entry.manifest.version: entry for entry in entries}

    def add(self, entry: Entry) -> None:
        """In place, since a log may have many versions: readers see the list with it or without it."""
        self._by_version[entry.manifest.version] = entry
        self.entries.append(entry)

    @property
    def head(self) -> Version | None:
        """The newest version; None: the log is empty."""
        return self.entries[-1].manifest.version if self.entries else None

    def get(self, version: Version) -> Entry | None:
        return self._by_version.get(version)

    def entry(self, version: Version) -> Entry:
        """Raises: MissingBlobError if there is no such version (any more)."""
        found = self._by_version.get(version)
        if found is None:
            ends = [self.entries[0], self.entries[-1]] if self.entries else []
            known = " .. ".join(str(one.manifest.version) for one in ends) or "no version"
            raise MissingBlobError(f"version {version} is not in the log, which has {known}")
        return found

    def plan_after(self, held: Version | None) -> list[Manifest]:
        """What a reader that holds `held` loads, in order; empty: it has nothing to do (log_order.py)."""
        return plan_after(self.entries, self._by_version, held)

    def num_after(self, held: Version | None) -> int:
        """How many versions follow `held`; all of them if the log does not know it."""
        entries, known = self.entries, self._by_version.get(held) if held is not None else None
        if not entries or (held is not None and held >= entries[-1].manifest.version):
            return 0
        return len(entries) - (index_after(entries, known) if known is not None else 0)

    def chain_to(self, version: Version) -> list[Manifest]:
        """The manifests whose rows, one over the other, are the version's. Raises: MissingBlobError."""
        self.entry(version)
        return chain_to(self.entries, version)
