# mypy: ignore-errors
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ImpressionBatch(_message.Message):
    __slots__ = ("num_impressions", "request_ids", "user_ids", "event_time_ms", "domain_names", "domain_indices", "sparse", "dense", "labels")
    NUM_IMPRESSIONS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_IDS_FIELD_NUMBER: _ClassVar[int]
    USER_IDS_FIELD_NUMBER: _ClassVar[int]
    EVENT_TIME_MS_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_NAMES_FIELD_NUMBER: _ClassVar[int]
    DOMAIN_INDICES_FIELD_NUMBER: _ClassVar[int]
    SPARSE_FIELD_NUMBER: _ClassVar[int]
    DENSE_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    num_impressions: int
    request_ids: bytes
    user_ids: bytes
    event_time_ms: bytes
    domain_names: _containers.RepeatedScalarFieldContainer[str]
    domain_indices: bytes
    sparse: _containers.RepeatedCompositeFieldContainer[SparseColumn]
    dense: _containers.RepeatedCompositeFieldContainer[DenseColumn]
    labels: _containers.RepeatedCompositeFieldContainer[LabelColumn]
    def __init__(self, num_impressions: _Optional[int] = ..., request_ids: _Optional[bytes] = ..., user_ids: _Optional[bytes] = ..., event_time_ms: _Optional[bytes] = ..., domain_names: _Optional[_Iterable[str]] = ..., domain_indices: _Optional[bytes] = ..., sparse: _Optional[_Iterable[_Union[SparseColumn, _Mapping]]] = ..., dense: _Optional[_Iterable[_Union[DenseColumn, _Mapping]]] = ..., labels: _Optional[_Iterable[_Union[LabelColumn, _Mapping]]] = ...) -> None: ...

class SparseColumn(_message.Message):
    __slots__ = ("name", "lengths", "ids")
    NAME_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    name: str
    lengths: bytes
    ids: bytes
    def __init__(self, name: _Optional[str] = ..., lengths: _Optional[bytes] = ..., ids: _Optional[bytes] = ...) -> None: ...

class DenseColumn(_message.Message):
    __slots__ = ("name", "values")
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    name: str
    values: bytes
    def __init__(self, name: _Optional[str] = ..., values: _Optional[bytes] = ...) -> None: ...

class LabelColumn(_message.Message):
    __slots__ = ("task", "values", "known")
    TASK_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    KNOWN_FIELD_NUMBER: _ClassVar[int]
    task: str
    values: bytes
    known: bytes
    def __init__(self, task: _Optional[str] = ..., values: _Optional[bytes] = ..., known: _Optional[bytes] = ...) -> None: ...
