"""A checkpoint as plain files for a batch trainer. Shapes: N rows, D dim."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import numpy as np

from param_server.client import RowSegment, encode_tensors
from trainer.checkpoint.exchange_format import (
    DESCRIPTION,
    EXPORT_FORMAT,
    Description,
    FeatureClass,
    FileSum,
    TableFiles,
    file_sum,
)
from trainer.checkpoint.restore import SavedState
from trainer.checkpoint.store import Store
from trainer.config.schema import SchemaConfig
from trainer.errors import DataError

FILE_BYTES = 256 << 20
"""A file ends once its rows pass this; no more is in memory at a time."""

_COLUMNS = {
    "ids": "ids_N",
    "rows": "rows_ND",
    "state": "state_N",
    "scores": "scores_N",
    "last_seen_s": "last_seen_s_N",
    "updates": "updates_N",
}


def export_checkpoint(
    saved: SavedState, out: Store, *, schema: SchemaConfig | None = None, file_bytes: int = FILE_BYTES
) -> Description:
    """Write a verified checkpoint to an empty folder, its description last.

    Args: schema: to say in the description which feature each class of ids is.
    Raises: DataError if the folder is not empty or the checkpoint is of another schema; DamagedError.
    """
    if schema is not None and schema.hash() != saved.manifest.schema_hash:
        raise DataError(
            f"{saved.where}: made under schema {saved.manifest.schema_hash}, the configuration has schema "
            f"{schema.hash()}"
        )
    if out.names():
        raise DataError(f"{out.root}: is not empty; export into a new folder")
    manifest = saved.manifest
    sums: dict[str, FileSum] = {}
    tables: dict[str, TableFiles] = {}
    for table in sorted({entry.table for entry in manifest.files if entry.kind == "rows"}):
        names, num_rows, dim = [], 0, 0
        for part, segments in enumerate(_groups(saved.segments(table), file_bytes=file_bytes)):
            name = f"{table}.{part:05d}.safetensors"
            columns = {
                column: np.concatenate([getattr(segment, field) for segment in segments])
                for column, field in _COLUMNS.items()
            }
            data = encode_tensors(columns, metadata={"table": table})
            out.write(name, data)
            sums[name] = file_sum(data)
            names.append(name)
            num_rows += len(columns["ids"])
            dim = segments[0].dim
        tables[table] = TableFiles(dim=dim, files=names, num_rows=num_rows)
    dense = encode_tensors(saved.dense(), metadata={})
    out.write("dense.safetensors", dense)
    sums["dense.safetensors"] = file_sum(dense)
    description = Description(
        format=EXPORT_FORMAT,
        tables=tables,
        dense="dense.safetensors",
        step=manifest.step,
        event_time_s=manifest.counters["event_time_s"],
        schema_hash=manifest.schema_hash,
        features=_features(schema),
        counters=manifest.counters,
        sums=sums,
    )
    out.write(DESCRIPTION, msgspec.json.format(msgspec.json.encode(description), indent=2))
    return description


def _groups(segments: Iterator[RowSegment], *, file_bytes: int) -> Iterator[list[RowSegment]]:
    """Segments together until their rows pass `file_bytes`; one group at least where there is a segment."""
    group: list[RowSegment] = []
    num_bytes = 0
    for segment in segments:
        group.append(segment)
        num_bytes += segment.rows_ND.nbytes
        if num_bytes >= file_bytes:
            yield group
            group, num_bytes = [], 0
    if group:
        yield group


def _features(schema: SchemaConfig | None) -> list[FeatureClass]:
    if schema is None:
        return []
    return [
        FeatureClass(name=feature.name, class_id=feature.class_id, table=feature.table)
        for feature in schema.features
    ]
