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

from trainer.checkpoint.folders import list_folders, verify
from trainer.checkpoint.manifest import CheckpointManifest
from trainer.checkpoint.restore import SavedState
from trainer.checkpoint.store import open_store
from trainer.errors import CheckpointError, DamagedError
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
    """What each rank keeps beside: "rank0/ids/<table>/<column>" slot for slot, "rank0/state//<column>"."""
    ledger_ids_K: npt.NDArray[np.uint64]
    ledger_counts_K: npt.NDArray[np.uint32]


def read_newest(checkpoints: Path) -> State:
    """The newest whole checkpoint.

    Raises: FileNotFoundError if there is none; CheckpointError if none is whole.
    """
    saved = _newest(checkpoints)
    if saved is None:
        raise FileNotFoundError(f"{checkpoints}: holds no checkpoint")
    parts: Arrays = {}
    ledgers = []
    for entry in saved.manifest.files:
        if entry.kind in ("ids", "state"):
            arrays = dict(saved.tensors(entry))
            if entry.kind == "state":
                ledgers.append((arrays.pop("part/ledger/ids"), arrays.pop("part/ledger/counts")))
            prefix = f"rank{entry.rank}/{entry.kind}/{entry.table}"
            parts.update({f"{prefix}/{name}": array for name, array in arrays.items()})
    ids_K, counts_K = merge_counts(ledgers)
    return State(
        directory=checkpoints / str(saved.folder),
        manifest=saved.manifest,
        tables={name: _table(saved, name) for name in sorted(saved.manifest.slots_per_rank)},
        dense=saved.dense(),
        parts=parts,
        ledger_ids_K=ids_K,
        ledger_counts_K=counts_K,
    )


def _newest(checkpoints: Path) -> SavedState | None:
    """Raises: CheckpointError if there are checkpoints and not one of them is whole."""
    store = open_store(str(checkpoints))
    damages = []
    for folder in reversed(list_folders(store).committed):
        try:
            return SavedState(store, folder, verify(store, folder))
        except DamagedError as error:
            damages.append(str(error))
    if damages:
        raise CheckpointError(f"{checkpoints}: no checkpoint is whole: {'; '.join(damages)}")
    return None


def _table(saved: SavedState, name: str) -> Table:
    segments = list(saved.segments(name))
    keys_N = np.concatenate([segment.ids_N for segment in segments])
    order_N = np.argsort(keys_N, kind="stable")
    columns = {
        column: np.concatenate([getattr(segment, column) for segment in segments])[order_N]
        for column in ROW_COLUMNS
    }
    return Table(keys_N[order_N], columns)


def names_of_checkpoints(checkpoints: Path) -> list[str]:
    """Of those that are complete, oldest first."""
    if not checkpoints.is_dir():
        return []
    return [str(folder) for folder in list_folders(open_store(str(checkpoints))).committed]


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
    """The checkpoint that the next start will go on from; empty = none."""
    saved = _newest(checkpoints)
    return str(saved.folder) if saved is not None else ""
