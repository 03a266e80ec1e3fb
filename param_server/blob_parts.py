"""Blobs as gRPC messages: cut into parts of at most 4 MiB, and joined again with every part checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import overload

from param_server.errors import BadBlobError, LimitError
from param_server.manifest import BLOB_BYTES_MAX, Version, check_blob_name
from param_server.staged_blobs import ArrivedBlob
from param_server.transport import PART_BYTES_MAX
from proto import param_server_pb2
from proto.tensor_blob import crc32c

PARTS_MAX = BLOB_BYTES_MAX // PART_BYTES_MAX


def split_blob(version: Version, kind: str, name: str, data: bytes) -> Iterator[param_server_pb2.Blob]:
    """The parts of one blob, in order."""
    num_parts = max(1, -(-len(data) // PART_BYTES_MAX))
    for part in range(num_parts):
        piece = data[part * PART_BYTES_MAX : (part + 1) * PART_BYTES_MAX]
        yield param_server_pb2.Blob(
            version=to_message(version),
            kind=kind,
            name=name,
            crc32c=crc32c(piece),
            data=piece,
            part=part,
            num_parts=num_parts,
        )


def join_parts(messages: Iterable[param_server_pb2.Blob]) -> Iterator[ArrivedBlob]:
    """Whole blobs from their parts, one blob after the other.

    Raises: BadBlobError on a wrong checksum, order or name, LimitError past BLOB_BYTES_MAX.
    """
    joiner = PartJoiner()
    for message in messages:
        data = joiner.add(message)
        if data is not None:
            # A part's checksum was held against its data; of a blob in one part it is the blob's.
            whole = message.crc32c if message.num_parts == 1 else None
            yield ArrivedBlob(from_message(message.version), message.kind, message.name, data, whole)
    joiner.finish()


class PartJoiner:
    """Collects the parts of one blob at a time; holds at most BLOB_BYTES_MAX bytes."""

    def __init__(self) -> None:
        self._first: param_server_pb2.Blob | None = None
        self._pieces: list[bytes] = []

    def add(self, message: param_server_pb2.Blob) -> bytes | None:
        """The whole blob, if this was its last part."""
        where = f"blob '{message.name[:128]}' part {message.part}"
        if self._first is None:
            self._check_first(message, where=where)
            self._first = message
        if _identity(message) != _identity(self._first) or message.part != len(self._pieces):
            raise BadBlobError(
                f"{where}: expected part {len(self._pieces)} of {self._first.num_parts} of blob "
                f"'{self._first.name}'; parts come in order, one blob after the other"
            )
        if crc32c(message.data) != message.crc32c:
            raise BadBlobError(f"{where}: its CRC32C differs; it was damaged on the way. Send it again.")
        if len(message.data) > PART_BYTES_MAX:
            raise LimitError(
                f"{where}: at most {PART_BYTES_MAX} bytes are allowed, found {len(message.data)}"
            )
        self._pieces.append(message.data)
        if len(self._pieces) < message.num_parts:
            return None
        data = b"".join(self._pieces)
        self._first, self._pieces = None, []
        return data

    def finish(self) -> None:
        """Raises: BadBlobError if a blob has begun and not ended."""
        if self._first is not None:
            raise BadBlobError(
                f"blob '{self._first.name}': {len(self._pieces)} of {self._first.num_parts} parts came"
            )

    def _check_first(self, message: param_server_pb2.Blob, *, where: str) -> None:
        if not 1 <= message.num_parts <= PARTS_MAX:
            raise LimitError(f"{where}: a blob has 1..{PARTS_MAX} parts, found {message.num_parts}")
        try:
            check_blob_name(message.kind, message.name)
            from_message(message.version)
        except ValueError as error:
            raise BadBlobError(f"{where}: {error}") from error


@overload
def to_message(version: None) -> None: ...
@overload
def to_message(version: Version) -> param_server_pb2.Version: ...
def to_message(version: Version | None) -> param_server_pb2.Version | None:
    if version is None:
        return None
    return param_server_pb2.Version(generation=version.generation, sequence=version.sequence)


def from_message(message: param_server_pb2.Version) -> Version:
    """Raises: BadBlobError for numbers that no version has."""
    try:
        return Version(message.generation, message.sequence)
    except ValueError as error:
        raise BadBlobError(str(error)) from error


def _identity(message: param_server_pb2.Blob) -> tuple[object, ...]:
    version = message.version
    return (version.generation, version.sequence, message.kind, message.name, message.num_parts)
