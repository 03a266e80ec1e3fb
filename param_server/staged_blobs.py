"""The blobs of versions to come: what has arrived, where it lies, and whether it is durable. Bounded."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

from param_server.errors import LimitError
from param_server.manifest import Version
from param_server.segment_log import Place

STAGED_VERSIONS_MAX = 4
STAGED_BLOBS_MAX = 1 << 16


class ArrivedBlob(NamedTuple):
    """One whole blob of a version to come, as a writer sent it."""

    version: Version
    kind: str
    name: str
    data: bytes
    crc32c: int | None = None
    """Of the data, where who brings it has just checked it; None: it is computed."""


@dataclass(slots=True)
class StagedBlob:
    num_bytes: int
    crc32c: int
    place: Place | None
    """None: a program or signature, which is durable at once."""
    durable: bool


class StagedBlobs:
    """By version and name. The owner's lock guards every call but `unsynced`."""

    def __init__(self) -> None:
        self._blobs: dict[Version, dict[str, StagedBlob]] = {}

    def check_room(self, version: Version) -> None:
        """Raises: LimitError if a blob of this version would pass a bound."""
        if version not in self._blobs and len(self._blobs) >= STAGED_VERSIONS_MAX:
            raise LimitError(
                f"version {version}: versions {[str(one) for one in self._blobs]} are staged and not "
                "committed; commit one of them or open a new generation"
            )
        if len(self._blobs.get(version, ())) >= STAGED_BLOBS_MAX:
            raise LimitError(f"version {version}: at most {STAGED_BLOBS_MAX} blobs a version")

    def add(self, version: Version, name: str, num_bytes: int, crc32c: int, *, place: Place | None) -> None:
        blob = StagedBlob(num_bytes, crc32c, place, durable=place is None)
        self._blobs.setdefault(version, {})[name] = blob

    def get(self, version: Version, name: str) -> StagedBlob | None:
        return self._blobs.get(version, {}).get(name)

    def pop(self, version: Version, name: str) -> None:
        self._blobs.get(version, {}).pop(name, None)

    def names(self) -> set[str]:
        return {name for blobs in self._blobs.values() for name in blobs}

    def unsynced(self) -> list[StagedBlob]:
        """Those that a sync which begins now will make durable."""
        return [
            blob for blobs in list(self._blobs.values()) for blob in list(blobs.values()) if not blob.durable
        ]

    def mark_synced(self, covered: Iterable[StagedBlob]) -> None:
        """What was forgotten meanwhile stays forgotten: nothing points to it any more."""
        for blob in covered:
            blob.durable = True

    def forget_unsynced(self) -> None:
        """After a failed append or sync nobody knows what of them the disk has."""
        for version, blobs in list(self._blobs.items()):
            kept = {name: blob for name, blob in blobs.items() if blob.durable}
            if kept:
                self._blobs[version] = kept
            else:
                del self._blobs[version]

    def forget(self, condition: Callable[[Version], bool]) -> None:
        for version in [version for version in self._blobs if condition(version)]:
            del self._blobs[version]
