"""What a log still knows, as replicas ask for it: chains of versions, and which version is promoted.

A promoted version is what replicas of the stable channel answer from. It is one small sealed object beside
the manifests, replaced durably by shard 0 and read by everyone; retention keeps its chain.
"""

from __future__ import annotations

from typing import Protocol

from param_server.errors import LogDamageError, ManifestError, StoreMissingError
from param_server.manifest import Manifest, Version
from param_server.sealed import seal, unseal
from param_server.stores import Store

PROMOTED = "promoted"


class VersionReader(Protocol):
    """A log, or a store that holds one, as far as replicas read it."""

    def chain_to(self, version: Version) -> list[Manifest]:
        """The newest full version or snapshot at or before `version`, and what leads from it to `version`.

        Raises: MissingBlobError if the log does not have them (any more).
        """

    def plan_after(self, held: Version | None) -> list[Manifest]:
        """What someone who holds `held` loads to reach the newest version; empty: nothing."""

    def read_blob(self, manifest: Manifest, name: str) -> bytes | memoryview:
        """The bytes of one blob, checked against its manifest."""

    def promoted(self) -> Version | None:
        """The version of the stable channel; None: none was promoted. Raises: LogDamageError."""


def read_promoted(store: Store) -> Version | None:
    """Raises: LogDamageError if the object is not a version under its checksum."""
    try:
        data = store.read(PROMOTED, num_bytes=100)
    except StoreMissingError:
        return None
    line = unseal(data)
    try:
        if line is None:
            raise ManifestError(f"its checksum differs, found {data[:40]!r}; it is torn or rotten")
        return Version.parse(line.decode("ascii", "replace").strip())
    except ManifestError as error:
        raise LogDamageError(f"object {PROMOTED}: {error}. Remove it and promote anew.") from error


def write_promoted(store: Store, version: Version) -> None:
    """Durable when this returns. Only shard 0 writes it: its retention must know of it first."""
    store.replace(PROMOTED, seal(f"{version}\n".encode()))
