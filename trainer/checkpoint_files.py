"""Checkpoint directories: written under a temporary name, made whole by a rename, verified by CRC.

```
checkpoints/
  step-000000001200/     complete by construction: it got this name after everything in it was durable
    manifest.json        every file with its size and CRC32C, and the run's counters and positions
    manifest.crc32c      the manifest's own CRC32C
    rank0.safetensors    ...
  LATEST                 names the newest; written after the rename, so it never names a torn one
```
"""

from __future__ import annotations

import fcntl
import itertools
import os
import shutil
from pathlib import Path
from typing import IO

import msgspec

from param_server.client import crc32c
from trainer.errors import CheckpointError
from trainer.stream.columns import Position

MANIFEST = "manifest.json"
MANIFEST_CRC = "manifest.crc32c"
LATEST = "LATEST"
FORMAT = "freshet.checkpoint.1"


class FileEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One file of a checkpoint."""

    name: str
    num_bytes: int
    crc32c: int


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint is of and what it consists of."""

    format: str
    step: int
    generation: int
    world_size: int
    schema_hash: str
    config_hash: str
    positions: list[Position]
    """The next impression to train of every partition."""
    slots_per_rank: dict[str, int]
    counters: dict[str, int]
    dead_letters: dict[str, int]
    files: list[FileEntry]


def write_file(path: Path, data: bytes) -> FileEntry:
    """Write and fsync one file."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return FileEntry(name=path.name, num_bytes=len(data), crc32c=crc32c(data))


def commit(temporary: Path, manifest: CheckpointManifest) -> Path:
    """Make a fully written directory the newest checkpoint.

    1. The manifest is written and fsynced: from here on the directory can be verified.
    2. The directory is fsynced, so that its names are durable.
    3. It is renamed to its own name: the atomic step. Before it there is no checkpoint of this step.
    4. The parent is fsynced.
    5. LATEST is replaced. A crash before this leaves an older LATEST; `newest` looks past it.
    """
    root = temporary.parent
    final = _free_name(root, manifest.step)
    data = msgspec.json.encode(manifest)
    write_file(temporary / MANIFEST, data)
    write_file(temporary / MANIFEST_CRC, f"{crc32c(data):08x}\n".encode())
    _fsync_directory(temporary)
    os.rename(temporary, final)
    _fsync_directory(root)
    pointer = root / f"{LATEST}.tmp"
    write_file(pointer, final.name.encode())
    os.replace(pointer, root / LATEST)
    _fsync_directory(root)
    return final


def _free_name(root: Path, step: int) -> Path:
    """A step may be saved again (positions moved past bad records): the older one stays until retention."""
    names = itertools.chain([f"step-{step:012d}"], (f"step-{step:012d}.{n:04d}" for n in itertools.count(1)))
    return next(root / name for name in names if not (root / name).exists())


def lock_directory(root: Path) -> IO[bytes]:
    """Keep other trainers out for as long as the returned file is open; the system frees it on any death.

    Raises: CheckpointError if another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    file = (root / ".lock").open("wb")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise CheckpointError(
            f"{root}: another trainer uses this checkpoint directory; stop it, or choose another directory"
        ) from error
    return file


def set_aside_newer(root: Path, directory: Path) -> None:
    """Rename what is newer than the checkpoint in use: it is damaged, and must not count for retention."""
    for other in root.glob("step-*"):
        if other.name > directory.name:
            other.rename(root / f"damaged-{other.name}")


def newest(root: Path) -> tuple[Path, CheckpointManifest] | None:
    """The newest checkpoint that verifies; damaged ones are passed over, after all of them an error.

    Raises: CheckpointError if there are checkpoints and not one of them is whole.
    """
    candidates = sorted(root.glob("step-*"), reverse=True) if root.is_dir() else []
    damages = []
    for directory in candidates:
        try:
            return directory, verify(directory)
        except CheckpointError as error:
            damages.append(str(error))
    if damages:
        raise CheckpointError(
            f"{root}: no checkpoint is whole: {'; '.join(damages)}. "
            "Restore one from a backup, or start without `--resume`."
        )
    return None


def verify(directory: Path) -> CheckpointManifest:
    """Check every file's size and CRC.

    Raises: CheckpointError naming the file.
    """
    try:
        data = (directory / MANIFEST).read_bytes()
        expected = (directory / MANIFEST_CRC).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read ({error.strerror})") from error
    if expected != f"{crc32c(data):08x}\n".encode():
        raise CheckpointError(
            f"{directory / MANIFEST}: CRC32C {crc32c(data):08x} does not match {MANIFEST_CRC}; it is damaged"
        )
    try:
        manifest = msgspec.json.decode(data, type=CheckpointManifest)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{directory / MANIFEST}: {error}") from error
    if manifest.format != FORMAT:
        raise CheckpointError(f"{directory}: format '{manifest.format}', this build reads '{FORMAT}'")
    for entry in manifest.files:
        read_file(directory, entry)
    return manifest


def read_file(directory: Path, entry: FileEntry) -> bytes:
    """Raises: CheckpointError if the file is missing, of another size or of another CRC."""
    path = directory / entry.name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if len(data) != entry.num_bytes or crc32c(data) != entry.crc32c:
        raise CheckpointError(
            f"{path}: {len(data)} bytes do not match the manifest's {entry.num_bytes} bytes "
            f"with CRC32C {entry.crc32c:08x}; the file is damaged"
        )
    return data


def retain(root: Path, *, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what a crash left unfinished."""
    for directory in sorted(root.glob("step-*"))[: -max(1, keep)]:
        shutil.rmtree(directory)
    for directory in root.glob(".writing-*"):
        shutil.rmtree(directory)


def _fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
