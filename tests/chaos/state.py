"""What a checkpoint holds, read back without the code that restores it, and ways to damage one.

The only module of the campaign that knows how a checkpoint lies on disk.
Shapes: N rows of a table, D its dim, K impressions of the ledger.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from trainer.checkpoint_files import CheckpointManifest, newest

from param_server.client import decode, decode_tensors
from trainer.ledger import merge_counts

Array = npt.NDArray[Any]
Arrays = dict[str, Array]

ROW_COLUMNS = ("rows_ND", "state_N", "scores_N", "last_seen_s_N", "updates_N")


@dataclass(frozen=True)
class Table:
    """Every live row of a table over all ranks, ascending by key."""

    keys_N: npt.NDArray[np.int64]
    columns: Arrays
    """ROW_COLUMNS: embedding, optimizer state, score, last sighting, updates."""


@dataclass(frozen=True)
class State:
    """The whole of a checkpoint."""

    directory: Path
    manifest: CheckpointManifest
    tables: dict[str, Table]
    dense: Arrays
    """Parameters and Adam's state, by name."""
    parts: Arrays
    """What each rank keeps beside: id tables slot for slot, metric windows; "rank0/ids/...". """
    ledger_ids_K: npt.NDArray[np.uint64]
    ledger_counts_K: npt.NDArray[np.uint32]


def read_newest(checkpoints: Path) -> State:
    """The newest whole checkpoint.

    Raises: FileNotFoundError if there is none; CheckpointError if none is whole.
    """
    found = newest(checkpoints)
    if found is None:
        raise FileNotFoundError(f"{checkpoints}: holds no checkpoint")
    directory, manifest = found
    segments = [
        decode((directory / file.name).read_bytes(), where=file.name)
        for file in manifest.files
        if file.name.endswith(".rowseg")
    ]
    tables = {}
    for name in sorted({segment.table for segment in segments}):
        mine = [segment for segment in segments if segment.table == name]
        keys_N = np.concatenate([segment.ids_N for segment in mine])
        order_N = np.argsort(keys_N, kind="stable")
        columns = {
            column: np.concatenate([getattr(segment, column) for segment in mine])[order_N]
            for column in ROW_COLUMNS
        }
        tables[name] = Table(keys_N[order_N], columns)
    parts, ledgers = {}, []
    for rank in range(manifest.world_size):
        arrays = _tensors(directory / f"rank{rank}.safetensors")
        ledgers.append((arrays.pop("ledger/ids"), arrays.pop("ledger/counts")))
        parts.update({f"rank{rank}/{name}": array for name, array in arrays.items()})
    ids_K, counts_K = merge_counts(ledgers)
    return State(
        directory=directory,
        manifest=manifest,
        tables=tables,
        dense=_tensors(directory / "dense.safetensors"),
        parts=parts,
        ledger_ids_K=ids_K,
        ledger_counts_K=counts_K,
    )


def _tensors(path: Path) -> Arrays:
    arrays, _ = decode_tensors(path.read_bytes(), where=path.name)
    return dict(arrays)


def names_of_checkpoints(checkpoints: Path) -> list[str]:
    """Oldest first; a checkpoint has its name only once it is complete."""
    return sorted(path.name for path in checkpoints.glob("step-*"))


def damage_newest(checkpoints: Path, rng: np.random.Generator) -> tuple[str, str]:
    """Tear, flip a bit of, or remove one file of the newest checkpoint.

    Returns: (the checkpoint's name, what was done).
    """
    name = names_of_checkpoints(checkpoints)[-1]
    files = sorted(path for path in (checkpoints / name).iterdir() if path.stat().st_size)
    path = files[int(rng.integers(len(files)))]
    data = bytearray(path.read_bytes())
    place = int(rng.integers(len(data)))
    how = ("torn", "bit flipped", "missing")[int(rng.integers(3))]
    if how == "torn":
        path.write_bytes(data[:place])
    elif how == "bit flipped":
        data[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
    else:
        path.unlink()
    return name, f"{path.name} {how}" + (f" at byte {place}" if how != "missing" else "")


def newest_whole(checkpoints: Path) -> str:
    """The checkpoint that the next start will go on from."""
    found = newest(checkpoints)
    return found[0].name if found is not None else ""
