# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Version(_message.Message):
    __slots__ = ("generation", "sequence")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    generation: int
    sequence: int
    def __init__(self, generation: _Optional[int] = ..., sequence: _Optional[int] = ...) -> None: ...

class OpenGenerationRequest(_message.Message):
    __slots__ = ("at_least", "writer")
    AT_LEAST_FIELD_NUMBER: _ClassVar[int]
    WRITER_FIELD_NUMBER: _ClassVar[int]
    at_least: int
    writer: str
    def __init__(self, at_least: _Optional[int] = ..., writer: _Optional[str] = ...) -> None: ...

class OpenGenerationReply(_message.Message):
    __slots__ = ("generation", "head")
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HEAD_FIELD_NUMBER: _ClassVar[int]
    generation: int
    head: Version
    def __init__(self, generation: _Optional[int] = ..., head: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class Blob(_message.Message):
    __slots__ = ("version", "kind", "name", "crc32c", "data", "part", "num_parts")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    NUM_PARTS_FIELD_NUMBER: _ClassVar[int]
    version: Version
    kind: str
    name: str
    crc32c: int
    data: bytes
    part: int
    num_parts: int
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., kind: _Optional[str] = ..., name: _Optional[str] = ..., crc32c: _Optional[int] = ..., data: _Optional[bytes] = ..., part: _Optional[int] = ..., num_parts: _Optional[int] = ...) -> None: ...

class PublishReply(_message.Message):
    __slots__ = ("num_blobs", "num_bytes")
    NUM_BLOBS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    num_blobs: int
    num_bytes: int
    def __init__(self, num_blobs: _Optional[int] = ..., num_bytes: _Optional[int] = ...) -> None: ...

class CommitRequest(_message.Message):
    __slots__ = ("manifest", "crc32c")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    manifest: bytes
    crc32c: int
    def __init__(self, manifest: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class PrepareReply(_message.Message):
    __slots__ = ("blobs",)
    BLOBS_FIELD_NUMBER: _ClassVar[int]
    blobs: _containers.RepeatedCompositeFieldContainer[BlobPlace]
    def __init__(self, blobs: _Optional[_Iterable[_Union[BlobPlace, _Mapping]]] = ...) -> None: ...

class BlobPlace(_message.Message):
    __slots__ = ("name", "segment", "segment_offset")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_OFFSET_FIELD_NUMBER: _ClassVar[int]
    name: str
    segment: str
    segment_offset: int
    def __init__(self, name: _Optional[str] = ..., segment: _Optional[str] = ..., segment_offset: _Optional[int] = ...) -> None: ...

class CommitReply(_message.Message):
    __slots__ = ("head", "repeated_commit")
    HEAD_FIELD_NUMBER: _ClassVar[int]
    REPEATED_COMMIT_FIELD_NUMBER: _ClassVar[int]
    head: Version
    repeated_commit: bool
    def __init__(self, head: _Optional[_Union[Version, _Mapping]] = ..., repeated_commit: _Optional[bool] = ...) -> None: ...

class SubscribeRequest(_message.Message):
    __slots__ = ("replica", "held", "shards")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    SHARDS_FIELD_NUMBER: _ClassVar[int]
    replica: str
    held: Version
    shards: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, replica: _Optional[str] = ..., held: _Optional[_Union[Version, _Mapping]] = ..., shards: _Optional[_Iterable[int]] = ...) -> None: ...

class VersionPart(_message.Message):
    __slots__ = ("manifest", "blob", "end")
    MANIFEST_FIELD_NUMBER: _ClassVar[int]
    BLOB_FIELD_NUMBER: _ClassVar[int]
    END_FIELD_NUMBER: _ClassVar[int]
    manifest: ManifestPart
    blob: Blob
    end: Version
    def __init__(self, manifest: _Optional[_Union[ManifestPart, _Mapping]] = ..., blob: _Optional[_Union[Blob, _Mapping]] = ..., end: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class ManifestPart(_message.Message):
    __slots__ = ("data", "crc32c")
    DATA_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    data: bytes
    crc32c: int
    def __init__(self, data: _Optional[bytes] = ..., crc32c: _Optional[int] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("table", "ids")
    TABLE_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    table: str
    ids: bytes
    def __init__(self, table: _Optional[str] = ..., ids: _Optional[bytes] = ...) -> None: ...

class PullReply(_message.Message):
    __slots__ = ("version", "segment", "crc32c", "incomplete")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    SEGMENT_FIELD_NUMBER: _ClassVar[int]
    CRC32C_FIELD_NUMBER: _ClassVar[int]
    INCOMPLETE_FIELD_NUMBER: _ClassVar[int]
    version: Version
    segment: bytes
    crc32c: int
    incomplete: bool
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., segment: _Optional[bytes] = ..., crc32c: _Optional[int] = ..., incomplete: _Optional[bool] = ...) -> None: ...

class VersionsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class VersionsReply(_message.Message):
    __slots__ = ("versions",)
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    versions: _containers.RepeatedCompositeFieldContainer[VersionInfo]
    def __init__(self, versions: _Optional[_Iterable[_Union[VersionInfo, _Mapping]]] = ...) -> None: ...

class VersionInfo(_message.Message):
    __slots__ = ("version", "parent", "kind", "has_snapshot", "num_rows", "num_deletes", "num_bytes", "created_ms", "rollback_of")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    HAS_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_DELETES_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CREATED_MS_FIELD_NUMBER: _ClassVar[int]
    ROLLBACK_OF_FIELD_NUMBER: _ClassVar[int]
    version: Version
    parent: Version
    kind: str
    has_snapshot: bool
    num_rows: int
    num_deletes: int
    num_bytes: int
    created_ms: int
    rollback_of: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., parent: _Optional[_Union[Version, _Mapping]] = ..., kind: _Optional[str] = ..., has_snapshot: _Optional[bool] = ..., num_rows: _Optional[int] = ..., num_deletes: _Optional[int] = ..., num_bytes: _Optional[int] = ..., created_ms: _Optional[int] = ..., rollback_of: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class RollbackRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class RollbackReply(_message.Message):
    __slots__ = ("head",)
    HEAD_FIELD_NUMBER: _ClassVar[int]
    head: Version
    def __init__(self, head: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ShardStatus(_message.Message):
    __slots__ = ("head", "num_versions", "num_full", "num_delta", "num_rows", "bytes_published", "num_subscribers", "fenced_generation", "damage", "subscribers", "shard", "num_shards", "num_snapshots", "memory_bytes", "num_left_out", "num_cut_off", "refused", "num_rows_refused", "fenced_by")
    class RefusedEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    HEAD_FIELD_NUMBER: _ClassVar[int]
    NUM_VERSIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_FULL_FIELD_NUMBER: _ClassVar[int]
    NUM_DELTA_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PUBLISHED_FIELD_NUMBER: _ClassVar[int]
    NUM_SUBSCRIBERS_FIELD_NUMBER: _ClassVar[int]
    FENCED_GENERATION_FIELD_NUMBER: _ClassVar[int]
    DAMAGE_FIELD_NUMBER: _ClassVar[int]
    SUBSCRIBERS_FIELD_NUMBER: _ClassVar[int]
    SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_SHARDS_FIELD_NUMBER: _ClassVar[int]
    NUM_SNAPSHOTS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_LEFT_OUT_FIELD_NUMBER: _ClassVar[int]
    NUM_CUT_OFF_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    FENCED_BY_FIELD_NUMBER: _ClassVar[int]
    head: Version
    num_versions: int
    num_full: int
    num_delta: int
    num_rows: int
    bytes_published: int
    num_subscribers: int
    fenced_generation: int
    damage: _containers.RepeatedScalarFieldContainer[str]
    subscribers: _containers.RepeatedScalarFieldContainer[str]
    shard: int
    num_shards: int
    num_snapshots: int
    memory_bytes: int
    num_left_out: int
    num_cut_off: int
    refused: _containers.ScalarMap[str, int]
    num_rows_refused: int
    fenced_by: str
    def __init__(self, head: _Optional[_Union[Version, _Mapping]] = ..., num_versions: _Optional[int] = ..., num_full: _Optional[int] = ..., num_delta: _Optional[int] = ..., num_rows: _Optional[int] = ..., bytes_published: _Optional[int] = ..., num_subscribers: _Optional[int] = ..., fenced_generation: _Optional[int] = ..., damage: _Optional[_Iterable[str]] = ..., subscribers: _Optional[_Iterable[str]] = ..., shard: _Optional[int] = ..., num_shards: _Optional[int] = ..., num_snapshots: _Optional[int] = ..., memory_bytes: _Optional[int] = ..., num_left_out: _Optional[int] = ..., num_cut_off: _Optional[int] = ..., refused: _Optional[_Mapping[str, int]] = ..., num_rows_refused: _Optional[int] = ..., fenced_by: _Optional[str] = ...) -> None: ...

class ReplicaStatus(_message.Message):
    __slots__ = ("version", "ready", "age_ms", "num_rows", "num_predictions", "num_unknown_ids", "applied", "num_reloads", "num_refused_requests", "last_refusal", "pinned", "channel", "promoted", "num_row_bytes", "num_rows_over_budget", "num_rows_expired", "num_rows_other_shard", "num_moves_back", "num_rows_refused")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    AGE_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_FIELD_NUMBER: _ClassVar[int]
    NUM_PREDICTIONS_FIELD_NUMBER: _ClassVar[int]
    NUM_UNKNOWN_IDS_FIELD_NUMBER: _ClassVar[int]
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    NUM_RELOADS_FIELD_NUMBER: _ClassVar[int]
    NUM_REFUSED_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    LAST_REFUSAL_FIELD_NUMBER: _ClassVar[int]
    PINNED_FIELD_NUMBER: _ClassVar[int]
    CHANNEL_FIELD_NUMBER: _ClassVar[int]
    PROMOTED_FIELD_NUMBER: _ClassVar[int]
    NUM_ROW_BYTES_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_OVER_BUDGET_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_EXPIRED_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_OTHER_SHARD_FIELD_NUMBER: _ClassVar[int]
    NUM_MOVES_BACK_FIELD_NUMBER: _ClassVar[int]
    NUM_ROWS_REFUSED_FIELD_NUMBER: _ClassVar[int]
    version: Version
    ready: bool
    age_ms: int
    num_rows: int
    num_predictions: int
    num_unknown_ids: int
    applied: _containers.RepeatedCompositeFieldContainer[AppliedVersion]
    num_reloads: int
    num_refused_requests: int
    last_refusal: str
    pinned: Version
    channel: str
    promoted: Version
    num_row_bytes: int
    num_rows_over_budget: int
    num_rows_expired: int
    num_rows_other_shard: int
    num_moves_back: int
    num_rows_refused: int
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., ready: _Optional[bool] = ..., age_ms: _Optional[int] = ..., num_rows: _Optional[int] = ..., num_predictions: _Optional[int] = ..., num_unknown_ids: _Optional[int] = ..., applied: _Optional[_Iterable[_Union[AppliedVersion, _Mapping]]] = ..., num_reloads: _Optional[int] = ..., num_refused_requests: _Optional[int] = ..., last_refusal: _Optional[str] = ..., pinned: _Optional[_Union[Version, _Mapping]] = ..., channel: _Optional[str] = ..., promoted: _Optional[_Union[Version, _Mapping]] = ..., num_row_bytes: _Optional[int] = ..., num_rows_over_budget: _Optional[int] = ..., num_rows_expired: _Optional[int] = ..., num_rows_other_shard: _Optional[int] = ..., num_moves_back: _Optional[int] = ..., num_rows_refused: _Optional[int] = ...) -> None: ...

class PinRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class ReplayRequest(_message.Message):
    __slots__ = ("replica", "until")
    REPLICA_FIELD_NUMBER: _ClassVar[int]
    UNTIL_FIELD_NUMBER: _ClassVar[int]
    replica: str
    until: Version
    def __init__(self, replica: _Optional[str] = ..., until: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class PromoteRequest(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class Promotion(_message.Message):
    __slots__ = ("version",)
    VERSION_FIELD_NUMBER: _ClassVar[int]
    version: Version
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ...) -> None: ...

class AppliedVersion(_message.Message):
    __slots__ = ("version", "visible_ms")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VISIBLE_MS_FIELD_NUMBER: _ClassVar[int]
    version: Version
    visible_ms: int
    def __init__(self, version: _Optional[_Union[Version, _Mapping]] = ..., visible_ms: _Optional[int] = ...) -> None: ...
