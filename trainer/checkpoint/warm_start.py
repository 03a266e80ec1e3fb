"""A checkpoint of step 0 made from exported files: training begins with what another run or trainer learned.

It has rows and dense parameters but no positions and no rank's own state, so that any number of ranks takes
it over, from the stream's beginning. Shapes: N rows, D dim.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import torch

from feature_eviction import class_of
from feature_eviction.restoring import LAST_SEEN_S_MAX, RowColumns
from param_server.client import BlobError, RowSegment, decode_tensors, encode, encode_tensors, split
from trainer.checkpoint.capture import DENSE_FILE, Arrays
from trainer.checkpoint.exchange_format import DESCRIPTION, Description, read_description, read_exported
from trainer.checkpoint.folders import LATEST, Folder, list_folders
from trainer.checkpoint.lease import acquire_lease
from trainer.checkpoint.manifest import MANIFEST, FileEntry, encode_manifest, entry_of
from trainer.checkpoint.progress import Progress, manifest_of
from trainer.checkpoint.restore import ADAM_KEYS, check_dense
from trainer.checkpoint.store import Store
from trainer.config import Config
from trainer.config.config import OptimizerConfig, TableConfig
from trainer.errors import CheckpointError, DataError
from trainer.model import model_of

DEFAULT_SCORE = 1.0
DEFAULT_UPDATES = 1

_DENSE_KEYS = ("param", *ADAM_KEYS)


def import_checkpoint(source: Store, target: Store, *, config: Config, now_ms: int) -> Folder:
    """Make the first checkpoint of a directory.

    Raises: DataError if the files are not what their layout and the configuration say; CheckpointError if
        the directory holds checkpoints or is in use.
    """
    description = read_description(source)
    _check_against(description, config, where=source.root)
    lease = acquire_lease(target, lease_s=config.checkpoint.lease_used_s, now_ms=now_ms)
    try:
        if list_folders(target).committed:
            raise CheckpointError(
                f"{target.root}: holds checkpoints already; import into a directory of its own"
            )
        folder = Folder(lease=lease.generation, save=1, step=0)
        try:
            _write(source, target, folder, description=description, config=config, now_ms=now_ms)
        except (CheckpointError, DataError):
            target.remove(str(folder))
            raise
    finally:
        lease.release(now_ms=now_ms)
    return folder


def _write(
    source: Store, target: Store, folder: Folder, *, description: Description, config: Config, now_ms: int
) -> None:
    files = _write_dense(source, target, folder, description=description, config=config)
    for table in config.tables:
        if table.name in description.tables:
            files += _write_table(source, target, folder, table=table, description=description, config=config)
    progress = Progress(event_time_s=description.event_time_s)
    manifest = manifest_of(progress, [], config=config, slots_per_rank={}, created_ms=now_ms)
    manifest = msgspec.structs.replace(manifest, files=files)
    target.create(f"{folder}/{MANIFEST}", encode_manifest(manifest))
    target.write(LATEST, str(folder).encode())


def _check_against(description: Description, config: Config, *, where: str) -> None:
    if description.schema_hash not in ("", config.schema.hash()):
        raise DataError(
            f"{where}: made under schema {description.schema_hash}, the configuration has schema "
            f"{config.schema.hash()}"
        )
    if not 0 <= description.event_time_s <= LAST_SEEN_S_MAX:
        raise DataError(
            f"{where}/{DESCRIPTION}: 'event_time_s': expected seconds in 0..{LAST_SEEN_S_MAX}, found "
            f"{description.event_time_s}"
        )
    dims = {table.name: table.dim for table in config.tables}
    for name, table in description.tables.items():
        if dims.get(name) != table.dim:
            raise DataError(
                f"{where}: table '{name}' of dim {table.dim}: the configuration has tables "
                f"{', '.join(sorted(dims))}"
            )


def _write_dense(
    source: Store, target: Store, folder: Folder, *, description: Description, config: Config
) -> list[FileEntry]:
    """The parameters given; without any those that a fresh run begins with."""
    torch.manual_seed(config.seed)
    dense = model_of(config)
    arrays = {f"param/{name}": value.detach().numpy() for name, value in dense.named_parameters()}
    if description.dense:
        known = {f"{key}/{name}" for key in _DENSE_KEYS for name, _ in dense.named_parameters()}
        where = f"{source.root}/{description.dense}"
        arrays = _tensors(source, description.dense, description)
        unknown = sorted(set(arrays) - known)
        if unknown:
            raise DataError(f"{where}: the model has no '{unknown[0]}'")
        try:
            check_dense(dense, arrays)
        except ValueError as error:
            raise DataError(f"{where}: {error}") from error
        for name, array in arrays.items():
            if array.dtype != np.float32 or not np.isfinite(array).all():
                raise DataError(f"{where}: '{name}': expected finite float32 values, found {array.dtype}")
            if name.startswith(("step/", "exp_avg_sq/")) and (array < 0).any():
                raise DataError(f"{where}: '{name}': expected at least 0, found {array.min():g}")
    data = encode_tensors(arrays, metadata={})
    target.write(f"{folder}/{DENSE_FILE}", data)
    return [entry_of(DENSE_FILE, data, kind="dense")]


def _write_table(
    source: Store,
    target: Store,
    folder: Folder,
    *,
    table: TableConfig,
    description: Description,
    config: Config,
) -> list[FileEntry]:
    classes = {feature.class_id for feature in config.schema.features if feature.table == table.name}
    entries: list[FileEntry] = []
    keys: list[npt.NDArray[np.int64]] = []
    for name in description.tables[table.name].files:
        where = f"{source.root}/{name}"
        arrays = _tensors(source, name, description)
        segment = _segment(arrays, table, description, optimizer=config.optimizer, where=where)
        strange = sorted(set(class_of(segment.ids_N).tolist()) - classes)
        if strange:
            raise DataError(
                f"{where}: ids of class {strange[0]} (id >> 52); the features of table '{table.name}' have "
                f"classes {sorted(classes)}"
            )
        keys.append(segment.ids_N)
        try:
            for piece in split(segment, bytes_max=config.publish.segment_bytes_max):
                data = encode(piece, row_format="float32")
                file_name = f"{table.name}.rank0.{len(entries):05d}.rowseg"
                target.write(f"{folder}/{file_name}", data)
                entries.append(entry_of(file_name, data, kind="rows", table=table.name))
        except BlobError as error:
            raise DataError(f"{where}: {error}") from error
    all_N = np.sort(np.concatenate([np.empty(0, np.int64), *keys]))
    doubled = all_N[1:][all_N[1:] == all_N[:-1]]
    if len(doubled):
        raise DataError(f"{source.root}: table '{table.name}': id {int(doubled[0])} is in two files")
    expected = description.tables[table.name].num_rows
    if expected not in (None, len(all_N)):
        raise DataError(f"{source.root}: table '{table.name}': expected {expected} rows, found {len(all_N)}")
    return entries


def _tensors(source: Store, name: str, description: Description) -> Arrays:
    try:
        return decode_tensors(read_exported(source, name, description), where=f"{source.root}/{name}")[0]
    except BlobError as error:
        raise DataError(str(error)) from error


def _segment(
    arrays: Arrays,
    table: TableConfig,
    description: Description,
    *,
    optimizer: OptimizerConfig,
    where: str,
) -> RowSegment:
    """Raises: DataError naming a column that is missing, strange, or of another shape or dtype."""
    unknown = sorted(set(arrays) - {"ids", "rows", "state", "scores", "last_seen_s", "updates"})
    if unknown or "ids" not in arrays or "rows" not in arrays:
        raise DataError(f"{where}: expected columns ids and rows, found {sorted(arrays)}")
    num = arrays["ids"].shape[0] if arrays["ids"].ndim else 0
    defaults: dict[str, tuple[Any, Any]] = {
        "ids": (np.int64, None),
        "state": (np.float32, optimizer.embedding_initial_accumulator),
        "scores": (np.float32, DEFAULT_SCORE),
        "last_seen_s": (np.int64, description.event_time_s),
        "updates": (np.uint32, DEFAULT_UPDATES),
    }
    columns = {
        name: arrays.get(name, np.full(num, default, dtype)) if default is not None else arrays[name]
        for name, (dtype, default) in defaults.items()
    }
    shapes = dict.fromkeys(columns, (num,)) | {"rows": (num, table.dim)}
    dtypes = {name: np.dtype(dtype) for name, (dtype, _) in defaults.items()} | {"rows": np.dtype(np.float32)}
    for name, column in (*columns.items(), ("rows", arrays["rows"])):
        if column.dtype != dtypes[name] or column.shape != shapes[name]:
            raise DataError(
                f"{where}: '{name}': expected {dtypes[name]} {list(shapes[name])}, found {column.dtype} "
                f"{list(column.shape)}"
            )
    try:
        RowColumns.checked(
            columns["ids"],
            scores_N=columns["scores"],
            last_seen_s_N=columns["last_seen_s"],
            updates_N=columns["updates"],
        )
    except ValueError as error:
        raise DataError(f"{where}: {error}") from error
    if (columns["state"] < 0).any():
        raise DataError(f"{where}: 'state': sums of squares are not negative")
    return RowSegment(
        table=table.name,
        ids_N=columns["ids"],
        rows_ND=arrays["rows"],
        deleted_ids_M=np.zeros(0, np.int64),
        state_N=columns["state"],
        scores_N=columns["scores"],
        last_seen_s_N=columns["last_seen_s"],
        updates_N=columns["updates"],
    )
