"""The layout of an export: plain safetensors and one JSON, for a batch trainer to read or to write.

```
OUT/
  dim16.00000.safetensors   ids I64 [N], rows F32 [N, D], state F32 [N], scores F32 [N], last_seen_s I64 [N],
                            updates U32 [N]; a table may have several such files
  dense.safetensors         param/NAME; and of Adam exp_avg/NAME, exp_avg_sq/NAME, step/NAME together
  export.json               which files belong to which table; written last
```

An import needs ids and rows of a table and nothing else: docs/operations.md says what stands for the rest.
Shapes: N rows, D dim.
"""

from __future__ import annotations

import msgspec

from param_server.client import crc32c
from trainer.checkpoint.store import Store
from trainer.errors import DataError

DESCRIPTION = "export.json"
EXPORT_FORMAT = "freshet.export.1"


class TableFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    dim: int
    files: list[str]
    num_rows: int | None = None


class FileSum(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    num_bytes: int
    crc32c: int


class FeatureClass(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An id is class_id << 52 | raw id."""

    name: str
    class_id: int
    table: str


class Description(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """export.json. A writer of its own gives format and tables, and what else it knows."""

    format: str
    tables: dict[str, TableFiles]
    dense: str = ""
    """The file of the dense parameters; empty = none."""
    step: int = 0
    event_time_s: int = 0
    """Event time that training has reached; a row without last_seen_s was seen then."""
    schema_hash: str = ""
    """Given, it must be the importing configuration's."""
    features: list[FeatureClass] = []
    """What the ids mean."""
    counters: dict[str, int] = {}
    sums: dict[str, FileSum] = {}
    """Checked for the files that are in it."""


def read_description(store: Store) -> Description:
    """Raises: DataError if it is missing or not what the format says."""
    where = f"{store.root}/{DESCRIPTION}"
    try:
        description = msgspec.json.decode(store.read(DESCRIPTION), type=Description)
    except FileNotFoundError as error:
        raise DataError(f"{where}: is missing; an export is a folder with this file in it") from error
    except msgspec.MsgspecError as error:
        raise DataError(f"{where}: {error}") from error
    if description.format != EXPORT_FORMAT:
        raise DataError(f"{where}: expected format '{EXPORT_FORMAT}', found '{description.format}'")
    for name in (description.dense, *(name for one in description.tables.values() for name in one.files)):
        if "/" in name or name.startswith("."):
            raise DataError(f"{where}: '{name}' is not the name of a file beside it")
    return description


def read_exported(store: Store, name: str, description: Description) -> bytes:
    """Raises: DataError if the file is missing, or its size or CRC is not the one that is given."""
    where = f"{store.root}/{name}"
    try:
        data = store.read(name)
    except FileNotFoundError as error:
        raise DataError(f"{where}: is missing; {DESCRIPTION} names it") from error
    expected = description.sums.get(name)
    if expected is not None and (len(data), crc32c(data)) != (expected.num_bytes, expected.crc32c):
        raise DataError(
            f"{where}: expected {expected.num_bytes} bytes with CRC32C {expected.crc32c:08x}, "
            f"found {len(data)} bytes with CRC32C {crc32c(data):08x}"
        )
    return data


def file_sum(data: bytes) -> FileSum:
    return FileSum(num_bytes=len(data), crc32c=crc32c(data))
