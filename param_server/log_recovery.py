"""Recovery of the version log: keep what is whole, put aside what is broken, name every difference.

What an interrupted process leaves behind (temporary files, blobs without a manifest, deltas whose full
version retention has dropped) is removed. What was committed and is now torn, rotten or missing is
damage: it is moved to damaged/ and reported, and the head falls back to the newest version that can
still be loaded whole.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

from param_server.durable_files import (
    TEMPORARY_PREFIX,
    fsync_directory,
    remove_directory,
    write_durable,
)
from param_server.errors import LogError, ManifestError
from param_server.manifest import (
    MANIFEST_BYTES_MAX,
    SHARED_KINDS,
    BlobRef,
    Manifest,
    Version,
    decode_manifest,
)
from proto.tensor_blob import crc32c

_SEAL_BYTES = 9
"""A manifest file begins with the CRC32C of the rest in eight hex digits and a newline."""


@dataclass
class Recovered:
    """manifests: oldest first, each loadable from the full version before it."""

    manifests: dict[Version, Manifest]
    fenced_generation: int
    damage: list[str] = field(default_factory=list)


def seal_manifest(data: bytes) -> bytes:
    return b"%08x\n" % crc32c(data) + data


def recover(directory: Path) -> Recovered:
    """Read a log's folder and leave in it exactly the versions that are returned.

    Raises: LogError if the folder cannot be read or written.
    """
    try:
        return _recover(directory)
    except OSError as error:
        raise LogError(f"log {directory}: cannot be recovered ({error})") from error


def _recover(directory: Path) -> Recovered:
    damage: list[str] = []
    generation = _read_generation(directory, damage)
    found, unreadable = _read_manifests(directory, damage)
    kept: dict[Version, Manifest] = {}
    lost: list[Version] = list(unreadable)
    for version, manifest in sorted(found.items()):
        problem = _problem(directory, manifest)
        follows = manifest.kind == "full" or manifest.parent == next(reversed(kept), None)
        if problem is None and follows:
            kept[version] = manifest
        elif problem is not None:
            damage.append(f"version {version}: {problem}")
            lost.append(version)
        elif not kept and not lost:
            _drop(directory, version)  # retention was interrupted: its full version is gone already
        else:
            damage.append(f"version {version}: its parent {manifest.parent} cannot be loaded")
            lost.append(version)
    for version in lost:
        _put_aside(directory, version)
    seen = max((version.generation for version in [*kept, *lost]), default=0)
    head = next(reversed(kept), None)
    fenced = max(generation, seen)
    if any(head is None or version > head for version in lost):
        # A writer that went on with the old generation would use lost version numbers a second time.
        fenced += 1
        write_durable(directory / "generation", f"{fenced}\n".encode())
        damage.append(f"the head fell back to {head}; writers need a generation from {fenced} on")
    _remove_leftovers(directory, kept)
    for name in ("manifests", "versions", "content", "damaged", "."):
        fsync_directory(directory / name)
    return Recovered(manifests=kept, fenced_generation=fenced, damage=damage)


def _read_generation(directory: Path, damage: list[str]) -> int:
    try:
        text = (directory / "generation").read_bytes()
    except FileNotFoundError:
        return 0
    if not text.rstrip(b"\n").isdigit() or len(text) > 20:
        damage.append(f"file generation: expected a number, found {text[:40]!r}; the manifests decide")
        return 0
    return int(text)


def _read_manifests(directory: Path, damage: list[str]) -> tuple[dict[Version, Manifest], list[Version]]:
    found: dict[Version, Manifest] = {}
    unreadable: list[Version] = []
    for path in sorted((directory / "manifests").iterdir()):
        if path.name.startswith(TEMPORARY_PREFIX):
            path.unlink()
            continue
        try:
            version = Version.parse(path.name)
        except ManifestError:
            damage.append(f"file manifests/{path.name}: not the name of a version")
            os.replace(path, directory / "damaged" / f"manifest-{path.name}")
            continue
        try:
            found[version] = read_manifest_file(path, version)
        except ManifestError as error:
            damage.append(str(error))
            unreadable.append(version)
    return found, unreadable


def read_manifest_file(path: Path, version: Version) -> Manifest:
    """Raises: ManifestError if the file is torn, rotten or another version's."""
    where = f"manifest {version}"
    if path.stat().st_size > MANIFEST_BYTES_MAX + _SEAL_BYTES:
        raise ManifestError(f"{where}: at most {MANIFEST_BYTES_MAX} bytes are allowed")
    sealed = path.read_bytes()
    data = sealed[_SEAL_BYTES:]
    if sealed != seal_manifest(data):
        raise ManifestError(f"{where}: its checksum differs; the file is torn or rotten")
    manifest = decode_manifest(data, where=where)
    if manifest.version != version:
        raise ManifestError(f"{where}: the file holds version {manifest.version}")
    return manifest


def blob_path(directory: Path, version: Version, *, kind: str, name: str) -> Path:
    if kind in SHARED_KINDS:
        return directory / "content" / name
    return directory / "versions" / str(version) / name


def blob_problem(data: bytes | None, blob: BlobRef) -> str | None:
    """What is wrong with the bytes read for a blob; None: they are what was committed."""
    if data is None:
        return f"blob '{blob.name}': the file is missing"
    if len(data) != blob.num_bytes or crc32c(data) != blob.crc32c:
        return (
            f"blob '{blob.name}': expected {blob.num_bytes} bytes with CRC32C {blob.crc32c:08x}, "
            f"found {len(data)} with {crc32c(data):08x}"
        )
    return None


def _problem(directory: Path, manifest: Manifest) -> str | None:
    for blob in manifest.blobs:
        path = blob_path(directory, manifest.version, kind=blob.kind, name=blob.name)
        problem = blob_problem(path.read_bytes() if path.is_file() else None, blob)
        if problem is not None:
            return problem
    return None


def _put_aside(directory: Path, version: Version) -> None:
    """Keep what is left of a broken version for a human; a second damage of one name replaces the first."""
    for source, name in (
        (directory / "manifests" / str(version), f"manifest-{version}"),
        (directory / "versions" / str(version), f"blobs-{version}"),
    ):
        target = directory / "damaged" / name
        if source.exists():
            remove_directory(target)
            os.replace(source, target)


def _drop(directory: Path, version: Version) -> None:
    (directory / "manifests" / str(version)).unlink()
    remove_directory(directory / "versions" / str(version))


def _remove_leftovers(directory: Path, kept: dict[Version, Manifest]) -> None:
    """What was never committed, or is no longer named."""
    names = {str(version) for version in kept}
    for path in (directory / "versions").iterdir():
        if path.name not in names:
            remove_directory(path)
        else:
            blobs = {blob.name for blob in kept[Version.parse(path.name)].blobs}
            for stray in [one for one in path.iterdir() if one.name not in blobs]:
                stray.unlink()
    named = {blob.name for manifest in kept.values() for blob in manifest.blobs}
    for folder, keep in (("content", named), (".", {"generation", "lock"})):
        for path in (directory / folder).iterdir():
            if path.is_file() and path.name not in keep:
                path.unlink()
