"""What a log still knows: the chain of versions that ends at one of them, and which one is promoted.

A promoted version is what replicas of the stable channel answer from. It is one small file beside the
manifests, replaced durably; the log's retention decides how long its chain can be loaded.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Protocol

from param_server.durable_files import fsync_directory, write_durable
from param_server.errors import LogDamageError, ManifestError, MissingBlobError
from param_server.manifest import Manifest, Version


class VersionReader(Protocol):
    """A log, or a store that holds one, as far as replicas read it."""

    def manifests(self) -> list[Manifest]:
        """Every version there is, oldest first."""

    def read_blob(self, version: Version, name: str) -> bytes:
        """The bytes of one blob, checked against its manifest."""


def chain_to(manifests: list[Manifest], until: Version) -> list[Manifest]:
    """The newest full version at or before `until`, and what leads from it to `until`.

    Raises: MissingBlobError if the log does not have them (any more).
    """
    upto = [manifest for manifest in manifests if manifest.version <= until]
    fulls = [index for index, manifest in enumerate(upto) if manifest.kind == "full"]
    if not upto or upto[-1].version != until or not fulls:
        known = f"{manifests[0].version} .. {manifests[-1].version}" if manifests else "no version"
        raise MissingBlobError(f"version {until} is not in the log, which has {known}")
    return upto[fulls[-1] :]


def chain_after(manifests: list[Manifest], held: Version | None) -> list[Manifest]:
    """What someone who holds `held` loads to reach the newest version; empty: nothing.

    The versions that follow `held` if they are there, else the newest full one and all after it.
    """
    if not manifests or (held is not None and held >= manifests[-1].version):
        return []
    versions = [manifest.version for manifest in manifests]
    if held in versions:
        return manifests[versions.index(held) + 1 :]
    fulls = [index for index, manifest in enumerate(manifests) if manifest.kind == "full"]
    return manifests[fulls[-1] :] if fulls else []


class Promotions:
    """The promoted version of one log, in the file `promoted` of a folder; one process writes it."""

    def __init__(self, folder: Path) -> None:
        """Raises: LogDamageError if the file is not a version."""
        self._path = folder / "promoted"
        self._mutex = threading.Lock()
        self._version: Version | None = None
        if self._path.exists():
            text = self._path.read_bytes()[:100].decode("ascii", "replace").strip()
            try:
                self._version = Version.parse(text)
            except ManifestError as error:
                raise LogDamageError(f"{self._path}: {error}. Remove it and promote anew.") from error

    @property
    def version(self) -> Version | None:
        return self._version

    def promote(self, version: Version, *, manifests: list[Manifest]) -> None:
        """Durable when this returns. Raises: MissingBlobError if the log cannot replay the version."""
        with self._mutex:
            chain_to(manifests, version)
            write_durable(self._path, f"{version}\n".encode())
            fsync_directory(self._path.parent)
            self._version = version
