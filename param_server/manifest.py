"""The manifest: what one version consists of. Its creation in the log is the commit."""

from __future__ import annotations

import hashlib
import re
from typing import Literal, get_args

import msgspec

from param_server.errors import GapError, ManifestError
from proto.tensor_blob import crc32c

BlobKind = Literal["rows", "dense", "program", "signature"]
SHARED_KINDS = frozenset({"program", "signature"})
"""Blobs named by their content: a later version may name one without sending it again."""

FORMAT_VERSION = 1
MANIFEST_BYTES_MAX = 4 << 20
ROWS_BLOB_BYTES_MAX = 4 << 20
BLOB_BYTES_MAX = 256 << 20
SHARDS_MAX = 1024

_BLOB_NAME = re.compile(r"(?!\.)[a-z0-9_.-]{1,128}", re.ASCII)
_UINT63_MAX = 2**63 - 1


class Version(msgspec.Struct, frozen=True, order=True):
    """(generation, sequence), ordered; written "generation.sequence"."""

    generation: int
    sequence: int

    def __post_init__(self) -> None:
        if not (0 <= self.generation <= _UINT63_MAX and 0 <= self.sequence <= _UINT63_MAX):
            raise ValueError(f"generation and sequence must be in 0..2^63-1, found {self}")

    def __str__(self) -> str:
        return f"{self.generation}.{self.sequence}"

    @classmethod
    def parse(cls, text: str) -> Version:
        """Raises: ManifestError unless the text is "generation.sequence"."""
        generation, dot, sequence = text.partition(".")
        if not (dot and _is_number(generation) and _is_number(sequence)):
            raise ManifestError(f"expected a version as generation.sequence, found '{text[:60]}'")
        try:
            return cls(generation=int(generation), sequence=int(sequence))
        except ValueError as error:
            raise ManifestError(f"version: {error}") from error


class BlobRef(msgspec.Struct, frozen=True, kw_only=True):
    """One blob of a version; `table`, `num_rows` and `num_deletes` belong to kind "rows"."""

    kind: BlobKind
    name: str
    crc32c: int
    num_bytes: int
    table: str = ""
    num_rows: int = 0
    num_deletes: int = 0
    shard: int = 0
    """The shard whose ids these rows have; the dense blob is shard 0's."""
    segment: str = ""
    """Where the log keeps it; empty until the log has placed it, and for programs and signatures."""
    segment_offset: int = 0

    def __post_init__(self) -> None:
        check_blob_name(self.kind, self.name)
        limit = ROWS_BLOB_BYTES_MAX if self.kind == "rows" else BLOB_BYTES_MAX
        if not 0 < self.num_bytes <= limit:
            raise ValueError(f"blob '{self.name}': num_bytes must be in 1..{limit}, found {self.num_bytes}")
        if not 0 <= self.crc32c < 2**32:
            raise ValueError(f"blob '{self.name}': crc32c must be in 0..2^32-1, found {self.crc32c}")
        if (self.kind == "rows") != bool(self.table):
            raise ValueError(f"blob '{self.name}': table belongs to kind 'rows' and only there")
        if not 0 <= self.shard < SHARDS_MAX:
            raise ValueError(f"blob '{self.name}': shard must be in 0..{SHARDS_MAX - 1}, found {self.shard}")
        if self.segment_offset < 0 or len(self.segment) > 256:
            raise ValueError(f"blob '{self.name}': its place in the log is none")
        if self.num_rows < 0 or self.num_deletes < 0:
            raise ValueError(f"blob '{self.name}': num_rows and num_deletes must not be negative")


class ManifestPosition(msgspec.Struct, frozen=True, kw_only=True):
    """The next impression to read: row `row` of the record at `kafka_offset`."""

    topic: str
    partition: int
    kafka_offset: int
    row: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """One version, whole. Unknown fields are ignored, so that v1 can grow.

    A version has no model at all, or exactly one dense, one program and one signature blob.
    """

    version: Version
    parent: Version | None
    """The version committed before this one; None: this is the log's first."""
    kind: Literal["full", "delta"]
    """full: the rows are all there are; delta: the rows and deletes change the parent's."""
    blobs: tuple[BlobRef, ...]
    schema_hash: str
    watermark_ms: int
    """Event time up to which impressions are learned, unix milliseconds."""
    produced_ms_newest: int
    """When the newest learned impression entered the stream, unix milliseconds."""
    created_ms: int
    positions: tuple[ManifestPosition, ...] = ()
    counts: dict[str, int] = {}
    rollback_of: Version | None = None
    """Set where a rollback made this version: it has that one's content."""
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if self.format_version != FORMAT_VERSION:
            raise ValueError(f"expected manifest format {FORMAT_VERSION}, found {self.format_version}")
        if self.parent is not None and not self.parent < self.version:
            raise ValueError(f"version {self.version} must be above its parent {self.parent}")
        if self.kind == "delta" and self.parent is None:
            raise ValueError(f"version {self.version}: a delta needs a parent")
        names = [blob.name for blob in self.blobs]
        if len(set(names)) != len(names):
            raise ValueError(f"version {self.version}: blob names must be unique")
        model = sorted(blob.kind for blob in self.blobs if blob.kind != "rows")
        if model not in ([], ["dense", "program", "signature"]):
            raise ValueError(
                f"version {self.version}: expected one dense, one program and one signature blob or none "
                f"of them, found {model}"
            )

    def blob(self, kind: BlobKind) -> BlobRef | None:
        """The one blob of a kind other than "rows"; None: the version has no model."""
        return next((blob for blob in self.blobs if blob.kind == kind), None)

    @property
    def rows_blobs(self) -> list[BlobRef]:
        return [blob for blob in self.blobs if blob.kind == "rows"]

    @property
    def num_bytes(self) -> int:
        return sum(blob.num_bytes for blob in self.blobs)


def without_places(manifest: Manifest) -> Manifest:
    """As its writer described it, who knows nothing of segments."""
    blobs = tuple(msgspec.structs.replace(blob, segment="", segment_offset=0) for blob in manifest.blobs)
    return msgspec.structs.replace(manifest, blobs=blobs)


def check_applies(manifest: Manifest, *, held: Version | None) -> None:
    """Raises: GapError if a version is not above the one held, or a delta does not follow it."""
    if held is not None and manifest.version <= held:
        raise GapError(f"version {manifest.version} is not above {held}; versions never go back")
    if manifest.kind == "delta" and manifest.parent != held:
        raise GapError(
            f"version {manifest.version} changes {manifest.parent}, but {held} is held; "
            "the newest full version and what follows it must be loaded"
        )


def encode_manifest(manifest: Manifest) -> bytes:
    return msgspec.json.encode(manifest)


def decode_manifest(data: bytes, *, where: str) -> Manifest:
    """Raises: ManifestError naming `where` and the field that is wrong."""
    if len(data) > MANIFEST_BYTES_MAX:
        raise ManifestError(f"{where}: a manifest has at most {MANIFEST_BYTES_MAX} bytes, found {len(data)}")
    try:
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"{where}: {error}") from error


def content_name(kind: BlobKind, data: bytes) -> str:
    """The name of a program or signature: the same content has the same name in every version."""
    return f"{kind}-{hashlib.sha256(data).hexdigest()}"


def check_blob_name(kind: str, name: str) -> None:
    """Raises: ValueError for an unknown kind, a name that is no plain file name, or a program or
    signature that is not named by its content."""
    if kind not in get_args(BlobKind):
        raise ValueError(f"a blob's kind is one of {list(get_args(BlobKind))}, found '{kind[:60]}'")
    if not _BLOB_NAME.fullmatch(name):
        raise ValueError(
            f"a blob's name is 1..128 of a-z 0-9 _ . - and begins with no dot, found '{name[:60]}'"
        )
    if kind in SHARED_KINDS and not re.fullmatch(rf"{kind}-[0-9a-f]{{64}}", name):
        raise ValueError(f"blob '{name}': a {kind} is named '{kind}-<sha256>'")


def blob_ref(
    kind: BlobKind,
    name: str,
    data: bytes,
    *,
    table: str = "",
    num_rows: int = 0,
    num_deletes: int = 0,
    shard: int = 0,
) -> BlobRef:
    """Describe a blob; length and checksum are computed from `data`.

    Raises: ManifestError if name, size or table break the rules of BlobRef.
    """
    try:
        return BlobRef(
            kind=kind,
            name=name,
            crc32c=crc32c(data),
            num_bytes=len(data),
            table=table,
            num_rows=num_rows,
            num_deletes=num_deletes,
            shard=shard,
        )
    except ValueError as error:
        raise ManifestError(str(error)) from error


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 19
