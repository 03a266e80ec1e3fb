"""The version log: a directory in which a version either exists whole or not at all.

    lock                     held by the one process that has the log open
    generation               writers below this generation are fenced
    manifests/<g>.<s>        CRC32C and the manifest; its creation is the commit
    versions/<g>.<s>/<name>  rows and dense blobs
    content/<name>           programs and signatures, named by their SHA-256, shared by versions
    damaged/                 what recovery or a check found broken, kept for a human

Everything a manifest names is durable before the manifest is created, and nothing in these folders is
ever changed after. On one machine the directory is a local one; fsync must mean what it says.
"""

from __future__ import annotations

import fcntl
import hashlib
import threading
from pathlib import Path

import structlog

from param_server.durable_files import (
    create_durable,
    fsync_directory,
    remove_directory,
    write_durable,
)
from param_server.errors import (
    BadBlobError,
    ConflictError,
    FencedError,
    GapError,
    LimitError,
    LogDamageError,
    LogError,
    MissingBlobError,
)
from param_server.log_recovery import blob_path, blob_problem, recover, seal_manifest
from param_server.manifest import (
    SHARED_KINDS,
    BlobRef,
    Manifest,
    Version,
    encode_manifest,
)
from proto.tensor_blob import crc32c

log = structlog.get_logger()

STAGED_VERSIONS_MAX = 4


class VersionLog:
    """One writer process; safe for many threads. Reads touch only files that never change."""

    def __init__(self, directory: Path, *, keep_full: int = 2) -> None:
        """Open or create the log and recover it.

        Args: keep_full: full versions kept, with the deltas that follow the oldest of them.
        Raises: LogError if another process has it open or the directory cannot be used.
        """
        if keep_full < 1:
            raise LogError(f"keep_full must be at least 1, found {keep_full}")
        self._directory = directory
        self._keep_full = keep_full
        self._mutex = threading.Lock()
        self._staged: dict[Version, dict[str, tuple[int, int]]] = {}
        try:
            for name in ("manifests", "versions", "content", "damaged"):
                (directory / name).mkdir(parents=True, exist_ok=True)
            self._lock_file = (directory / "lock").open("a")
        except OSError as error:
            raise LogError(f"log {directory}: cannot be used ({error})") from error
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise LogError(f"log {directory}: another process has it open") from error
        recovered = recover(directory)
        self._manifests = recovered.manifests
        self._fenced_generation = recovered.fenced_generation
        self.damage: list[str] = list(recovered.damage)
        for line in self.damage:
            log.error("version log damage", found=line)

    def close(self) -> None:
        self._lock_file.close()

    @property
    def head(self) -> Version | None:
        """The newest version; None: the log is empty."""
        manifests = self._manifests
        return next(reversed(manifests), None)

    @property
    def fenced_generation(self) -> int:
        return self._fenced_generation

    def manifests(self) -> list[Manifest]:
        """Every version there is, oldest first; the first one is full."""
        return list(self._manifests.values())

    def open_generation(self, at_least: int) -> tuple[int, Version | None]:
        """A generation above `at_least` and above all that the log has seen; older writers are fenced.

        Returns: the generation and the head.
        """
        with self._mutex:
            generation = max(at_least, self._fenced_generation) + 1
            write_durable(self._directory / "generation", f"{generation}\n".encode())
            fsync_directory(self._directory)
            self._fenced_generation = generation
            for version in [staged for staged in self._staged if staged.generation < generation]:
                self._forget_staged(version)
            return generation, self.head

    def stage(self, version: Version, *, kind: str, name: str, data: bytes) -> None:
        """Make one blob of a version to come durable; a repeat replaces it.

        Raises: FencedError, ConflictError (the version is committed with other content), GapError (it
            is not above the head), LimitError, BadBlobError (a program's name is not its content's).
        """
        if kind in SHARED_KINDS and name != f"{kind}-{hashlib.sha256(data).hexdigest()}":
            raise BadBlobError(
                f"version {version}: blob '{name}': expected '{kind}-' and its SHA-256 as name"
            )
        with self._mutex:
            self._check_generation(version)
            committed = self._manifests.get(version)
            if committed is not None:
                self._check_same_blob(committed, name, data)
                return
            if self.head is not None and version < self.head:
                raise GapError(f"version {version} is not above the head {self.head}")
            if version not in self._staged and len(self._staged) >= STAGED_VERSIONS_MAX:
                raise LimitError(
                    f"version {version}: versions {[str(one) for one in self._staged]} are staged and not "
                    "committed; commit one of them or open a new generation"
                )
            path = blob_path(self._directory, version, kind=kind, name=name)
            path.parent.mkdir(exist_ok=True)
            staged = self._staged.setdefault(version, {})
            staged.pop(name, None)
            # Within the mutex, so that no late writer can touch a version that was committed meanwhile.
            if kind not in SHARED_KINDS or not path.exists() or path.read_bytes() != data:
                write_durable(path, data)
            staged[name] = (len(data), crc32c(data))

    def commit(self, manifest: Manifest) -> bool:
        """Make a staged version visible. The order of the steps is the guarantee:

          1. the writer is not fenced, and the version follows the head
          2. every blob is there, durable, with the length and checksum that the manifest says
          3. the folders of these blobs are durable
          4. the manifest is created, exclusively and durably: from here on the version exists
          5. what the version made superfluous is removed

        Returns: True if this very commit had been made before.
        Raises: FencedError, ConflictError, GapError, MissingBlobError, BadBlobError; the log is unchanged.
        """
        sealed = seal_manifest(encode_manifest(manifest))
        version = manifest.version
        with self._mutex:
            if self._check(manifest):
                return True
            for blob in manifest.blobs:
                self._check_staged(version, blob)
            version_directory = self._directory / "versions" / str(version)
            version_directory.mkdir(exist_ok=True)
            self._remove_unnamed(version_directory, manifest)
            for directory in (version_directory, version_directory.parent, self._directory / "content"):
                fsync_directory(directory)
            self._create_manifest(version, sealed)
            self._manifests = {**self._manifests, version: manifest}
            for older in [staged for staged in self._staged if staged <= version]:
                self._forget_staged(older, keep_files=older == version)
            self._retain()
        return False

    def check(self, manifest: Manifest) -> bool:
        """Whether this very manifest is committed already; else it may be, as far as writer and order go.

        Raises: FencedError, ConflictError, GapError.
        """
        with self._mutex:
            return self._check(manifest)

    def read_staged(self, version: Version, blob: BlobRef) -> bytes:
        """The bytes of a blob that is staged for a version to come, checked against its reference.

        Raises: MissingBlobError, BadBlobError.
        """
        with self._mutex:
            self._check_staged(version, blob)
            path = blob_path(self._directory, version, kind=blob.kind, name=blob.name)
            data = path.read_bytes() if path.is_file() else None
        problem = blob_problem(data, blob)
        if data is None or problem is not None:
            raise BadBlobError(f"version {version}: {problem}; publish it again")
        return data

    def read_blob(self, version: Version, name: str) -> bytes:
        """The bytes of one blob, checked.

        Raises: LogDamageError if it is not what was committed, MissingBlobError if the version was
            dropped by retention meanwhile.
        """
        manifest = self._manifests.get(version)
        blob = next((one for one in manifest.blobs if one.name == name), None) if manifest else None
        if blob is None:
            raise MissingBlobError(f"version {version}: blob '{name}' is not in the log any more")
        path = blob_path(self._directory, version, kind=blob.kind, name=name)
        try:
            data: bytes | None = path.read_bytes()
        except FileNotFoundError as error:
            if version not in self._manifests:
                raise MissingBlobError(f"version {version} is not in the log any more") from error
            data = None
        problem = blob_problem(data, blob)
        if data is None or problem is not None:
            raise LogDamageError(
                f"version {version}: {problem}. Publish a full version: it needs none of those before."
            )
        return data

    def read(self, version: Version) -> Manifest:
        """Raises: MissingBlobError if there is no such version (any more)."""
        try:
            return self._manifests[version]
        except KeyError:
            raise MissingBlobError(f"version {version} is not in the log") from None

    def versions_after(self, held: Version | None) -> list[Version]:
        """What a subscriber that holds `held` loads, in order; empty: it has nothing to do.

        The versions that follow `held` if the log knows it; else the newest full one and all after it.
        A subscriber that is ahead of the head (the log lost its newest versions) waits.
        """
        versions = list(self._manifests)
        if not versions or (held is not None and held >= versions[-1]):
            return []
        if held in self._manifests:
            return versions[versions.index(held) + 1 :]
        fulls = [index for index, version in enumerate(versions) if self._manifests[version].kind == "full"]
        return versions[fulls[-1] :]

    def _check_generation(self, version: Version) -> None:
        if version.generation < self._fenced_generation:
            raise FencedError(
                f"version {version}: generation {self._fenced_generation} has been opened, so generation "
                f"{version.generation} is fenced. Another trainer has taken over: stop this one."
            )

    def _check(self, manifest: Manifest) -> bool:
        version = manifest.version
        self._check_generation(version)
        committed = self._manifests.get(version)
        if committed is None:
            self._check_follows(manifest)
            return False
        if committed != manifest:
            raise ConflictError(f"version {version} is committed already, with another manifest")
        return True

    def _create_manifest(self, version: Version, sealed: bytes) -> None:
        path = self._manifest_path(version)
        try:
            create_durable(path, sealed)
        except FileExistsError as error:
            # An earlier try created it and failed right after, so nothing here knows of it yet.
            if path.read_bytes() != sealed:
                raise ConflictError(f"version {version}: another manifest lies in the log") from error
            fsync_directory(path.parent)

    def _check_follows(self, manifest: Manifest) -> None:
        version, head = manifest.version, self.head
        if manifest.parent != head:
            raise GapError(
                f"version {version} follows {manifest.parent}, but the head is {head}. "
                "Publish a full version with the head as its parent."
            )
        if head is None:
            if manifest.kind != "full":
                raise GapError(f"version {version}: the first version of a log must be full")
        elif version.generation == head.generation and version.sequence != head.sequence + 1:
            raise GapError(f"version {version}: expected sequence {head.sequence + 1} after {head}")

    def _check_staged(self, version: Version, blob: BlobRef) -> None:
        found = self._staged.get(version, {}).get(blob.name)
        if found is None and blob.kind in SHARED_KINDS:
            # Named by its content, it may have come with an older version.
            found = self._shared_blob(blob)
        if found is None:
            raise MissingBlobError(
                f"version {version}: blob '{blob.name}' is not staged; publish the version again"
            )
        if found != (blob.num_bytes, blob.crc32c):
            raise BadBlobError(
                f"version {version}: blob '{blob.name}': the manifest says {blob.num_bytes} bytes with "
                f"CRC32C {blob.crc32c:08x}, staged are {found[0]} with {found[1]:08x}; publish it again"
            )

    def _shared_blob(self, blob: BlobRef) -> tuple[int, int] | None:
        for manifest in reversed(self._manifests.values()):
            for one in manifest.blobs:
                if one.name == blob.name:
                    return (one.num_bytes, one.crc32c)
        return None

    def _check_same_blob(self, committed: Manifest, name: str, data: bytes) -> None:
        found = (len(data), crc32c(data))
        if not any((one.num_bytes, one.crc32c) == found for one in committed.blobs if one.name == name):
            raise ConflictError(
                f"version {committed.version} is committed already, without such a blob '{name}'"
            )

    def _manifest_path(self, version: Version) -> Path:
        return self._directory / "manifests" / str(version)

    def _remove_unnamed(self, directory: Path, manifest: Manifest) -> None:
        """Blobs of an attempt that was given up, whose version was then published otherwise."""
        named = {blob.name for blob in manifest.blobs}
        for path in directory.iterdir():
            if path.name not in named:
                path.unlink()

    def _forget_staged(self, version: Version, *, keep_files: bool = False) -> None:
        del self._staged[version]
        if not keep_files:
            remove_directory(self._directory / "versions" / str(version))

    def _retain(self) -> None:
        """Drop what lies before the oldest full version that is kept: manifests first, then blobs."""
        versions = list(self._manifests)
        fulls = [index for index, version in enumerate(versions) if self._manifests[version].kind == "full"]
        dropped = versions[: fulls[max(0, len(fulls) - self._keep_full)]]
        if not dropped:
            return
        self._manifests = {
            version: manifest for version, manifest in self._manifests.items() if version not in dropped
        }
        # Oldest first: a crash in between leaves a log whose start is merely further on.
        for version in dropped:
            self._manifest_path(version).unlink()
        fsync_directory(self._directory / "manifests")
        for version in dropped:
            remove_directory(self._directory / "versions" / str(version))
        named = {blob.name for manifest in self._manifests.values() for blob in manifest.blobs}
        named.update(name for staged in self._staged.values() for name in staged)
        for path in (self._directory / "content").iterdir():
            if path.name not in named:
                path.unlink()
