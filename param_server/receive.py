"""Receiving versions: the parts of a subscription stream, checked and gathered into whole versions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from param_server.blob_parts import PartJoiner, from_message
from param_server.errors import BadBlobError
from param_server.manifest import SHARED_KINDS, BlobRef, Manifest, decode_manifest
from proto import param_server_pb2
from proto.tensor_blob import crc32c

VERSION_BYTES_MAX = 16 << 30


@dataclass(frozen=True, slots=True)
class ReceivedVersion:
    """A manifest and the bytes of every blob that it names, all checked against it."""

    manifest: Manifest
    blobs: dict[str, bytes]

    @property
    def shared(self) -> dict[str, bytes]:
        """The programs and signatures, which a later version may name without bringing them."""
        return {blob.name: self.blobs[blob.name] for blob in self.manifest.blobs if blob.kind in SHARED_KINDS}


def receive_versions(
    parts: Iterable[param_server_pb2.VersionPart], *, shared: dict[str, bytes]
) -> Iterator[ReceivedVersion]:
    """Whole versions, one after the other; what is left at the end of the stream is dropped.

    Args: shared: programs and signatures, by name, of the version that was held before.
    Raises: BadBlobError on any difference from the manifest, ManifestError on a bad manifest.
    """
    manifest: Manifest | None = None
    blobs: dict[str, bytes] = {}
    joiner = PartJoiner()
    for part in parts:
        kind = part.WhichOneof("part")
        if kind == "manifest":
            manifest, blobs, joiner = _manifest(part.manifest), {}, PartJoiner()
        elif manifest is None:
            raise BadBlobError(f"subscription: expected a manifest, found {kind}")
        elif kind == "blob":
            data = joiner.add(part.blob)
            if data is not None:
                _check_blob(manifest, part.blob, data)
                blobs[part.blob.name] = data
        else:
            joiner.finish()
            received = _complete(manifest, part.end, blobs, shared)
            shared, manifest = received.shared, None
            yield received


def _manifest(part: param_server_pb2.ManifestPart) -> Manifest:
    if crc32c(part.data) != part.crc32c:
        raise BadBlobError("subscription: the manifest's CRC32C differs; it was damaged on the way")
    manifest = decode_manifest(part.data, where="subscription: manifest")
    if manifest.num_bytes > VERSION_BYTES_MAX:
        raise BadBlobError(
            f"version {manifest.version}: {manifest.num_bytes} bytes; at most {VERSION_BYTES_MAX} are loaded"
        )
    return manifest


def _check_blob(manifest: Manifest, message: param_server_pb2.Blob, data: bytes) -> None:
    where = f"version {manifest.version}: blob '{message.name[:128]}'"
    if from_message(message.version) != manifest.version:
        raise BadBlobError(f"{where}: it came with version {from_message(message.version)}")
    reference = next((blob for blob in manifest.blobs if blob.name == message.name), None)
    if reference is None or reference.kind != message.kind:
        raise BadBlobError(f"{where}: the manifest does not name it as {message.kind}")
    _check_content(reference, data, where=where)


def _complete(
    manifest: Manifest, end: param_server_pb2.Version, blobs: dict[str, bytes], shared: dict[str, bytes]
) -> ReceivedVersion:
    if from_message(end) != manifest.version:
        raise BadBlobError(f"version {manifest.version}: its end says version {from_message(end)}")
    for reference in manifest.blobs:
        if reference.name in blobs:
            continue
        where = f"version {manifest.version}: blob '{reference.name}'"
        if reference.kind not in SHARED_KINDS or reference.name not in shared:
            raise BadBlobError(f"{where}: it did not come")
        _check_content(reference, shared[reference.name], where=where)
        blobs[reference.name] = shared[reference.name]
    return ReceivedVersion(manifest=manifest, blobs=blobs)


def _check_content(reference: BlobRef, data: bytes, *, where: str) -> None:
    if len(data) != reference.num_bytes or crc32c(data) != reference.crc32c:
        raise BadBlobError(
            f"{where}: expected {reference.num_bytes} bytes with CRC32C {reference.crc32c:08x}, "
            f"found {len(data)} with {crc32c(data):08x}"
        )
