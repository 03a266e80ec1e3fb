"""The files of one run: where each is, whose directory it is, and what a new run may remove."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import structlog

from trainer.config import Config, to_toml
from trainer.errors import ConfigError
from trainer.run.status import ProducerStatus, read_status

log = structlog.get_logger()

_MARKER_KIND = "freshet-run"
_OURS = (
    "config.toml",
    "versions.jsonl",
    "versions.1.jsonl",
    "verify.safetensors",
    "summary.json",
    "report.html",
    "logs",
    "ready",
    "status",
    "control",
    "version-log",
    "checkpoints",
)
"""Everything a run writes; a new run removes these and nothing else."""
_OF_ONE_RUN = ("ready", "status", "control", "verify.safetensors", "summary.json", "report.html")
"""What does not outlive a run, also where the next one goes on from its state."""


class Marker(msgspec.Struct, kw_only=True):
    """`run.json`: says that the directory is a run's."""

    kind: str
    produced_before: int = 0
    """Impressions that earlier runs, which this one resumes, have put into the stream."""


@dataclass(frozen=True)
class RunDirectory:
    """Paths only; nothing is cached."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    @property
    def marker(self) -> Path:
        return self.root / "run.json"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def ready(self) -> Path:
        return self.root / "ready"

    @property
    def trainer_status(self) -> Path:
        return self.root / "status" / "trainer.json"

    @property
    def producer_status(self) -> Path:
        return self.root / "status" / "producer.json"

    @property
    def drain(self) -> Path:
        """The trainer trains to the end of the stream and leaves once this file exists."""
        return self.root / "control" / "drain"

    @property
    def broken_off(self) -> Path:
        """While it exists, a trainer that is told to stop only saves its state."""
        return self.root / "control" / "broken-off"

    @property
    def version_log(self) -> Path:
        return self.root / "version-log"

    @property
    def versions(self) -> Path:
        return self.root / "versions.jsonl"

    @property
    def verify(self) -> Path:
        return self.root / "verify.safetensors"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def report(self) -> Path:
        return self.root / "report.html"

    def read_marker(self) -> Marker | None:
        """None where the directory was not made by a run."""
        try:
            marker = msgspec.json.decode(self.marker.read_bytes(), type=Marker)
        except (FileNotFoundError, NotADirectoryError, msgspec.MsgspecError):
            return None
        return marker if marker.kind == _MARKER_KIND else None

    def write_config(self, config: Config) -> None:
        replace_file(self.config, to_toml(config).encode())


@contextmanager
def open_run_directory(root: Path, *, resume: bool, stream_stays: bool = False) -> Iterator[RunDirectory]:
    """Make the directory ready for a run, and keep any other run out of it until the block is left.

    An earlier run's files are removed (resume=False) or gone on from (resume=True).
    Args: stream_stays: the stream outlives a run, so checkpoints in the directory can still be gone on from.
    Raises: ConfigError if the directory holds something that no run wrote, is in use, has no earlier run to
    go on from, or has one that could be gone on from and would be removed.
    """
    directory = RunDirectory(root.resolve())
    marker = directory.read_marker()
    if marker is None and directory.root.exists() and not _is_empty_directory(directory.root):
        raise ConfigError(
            f"{directory.root}: is not empty and not an earlier run's directory (no valid run.json); "
            "nothing was touched. Give another directory with --out, or empty this one"
        )
    if marker is None and resume:
        raise ConfigError(
            f"--resume: {directory.root} holds no earlier run (no valid run.json). Name an earlier run's "
            "directory with --out, or begin a new run without --resume"
        )
    directory.root.mkdir(parents=True, exist_ok=True)
    lock = os.open(directory.root / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{directory.root}: another run is using this directory; end it or give another with --out"
            ) from error
        if marker is not None and not resume:
            if stream_stays and _holds_any(directory.root / "checkpoints"):
                raise ConfigError(
                    f"{directory.root}: holds an earlier run's checkpoints, and its Kafka may still have the "
                    "stream; nothing was touched. Go on from them with --resume, give another directory with "
                    "--out, or remove this one"
                )
            log.info("an earlier run is removed", directory=str(directory.root))
        produced_before = _produced_before(directory, marker) if resume else 0
        for name in _OF_ONE_RUN if resume else _OURS:
            _remove(directory.root / name)
        for path in (
            directory.logs,
            directory.ready,
            directory.trainer_status.parent,
            directory.drain.parent,
        ):
            path.mkdir(exist_ok=True)
        marker = Marker(kind=_MARKER_KIND, produced_before=produced_before)
        replace_file(directory.marker, msgspec.json.encode(marker))
        try:
            yield directory
        finally:
            # A trainer that is later started here by itself would take them for its own.
            directory.drain.unlink(missing_ok=True)
            directory.broken_off.unlink(missing_ok=True)
    finally:
        os.close(lock)


def replace_file(path: Path, data: bytes) -> None:
    """Write a file that readers see whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def _is_empty_directory(path: Path) -> bool:
    # A lock left by a run that ended before its marker was written does not make it full.
    return path.is_dir() and all(entry.name == "run.lock" for entry in path.iterdir())


def _holds_any(path: Path) -> bool:
    return path.is_dir() and any(path.iterdir())


def _produced_before(directory: RunDirectory, marker: Marker | None) -> int:
    earlier = read_status(directory.producer_status, ProducerStatus)
    return (marker.produced_before if marker else 0) + (earlier.impressions_produced if earlier else 0)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
