"""A checkpoint into a fresh recommender: slot for slot where the layout is the same, else row by raw id.

One file is in memory at a time, beside the columns (24 bytes a row) that choose which rows stay where not all
fit. Shapes: N rows, D dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
import torch

from feature_eviction import IdTable, StateError, owner_of
from param_server.client import BlobError, RowSegment, decode, decode_tensors
from trainer.checkpoint.capture import DENSE_FILE, Arrays, StatePart
from trainer.checkpoint.folders import Folder, read_file
from trainer.checkpoint.manifest import CheckpointManifest, FileEntry
from trainer.checkpoint.store import Store
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import CheckpointError, DamagedError
from trainer.recommender import Recommender, TableShard, policy_of

ADAM_KEYS = ("step", "exp_avg", "exp_avg_sq")

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class SavedState:
    """A checkpoint that was verified, opened for reading."""

    store: Store
    folder: Folder
    manifest: CheckpointManifest

    @property
    def where(self) -> str:
        return f"{self.store.root}/{self.folder}"

    def read(self, entry: FileEntry) -> bytes:
        return read_file(self.store, self.folder, entry)

    def tensors(self, entry: FileEntry) -> Arrays:
        return decode_tensors(self.read(entry), where=f"{self.where}/{entry.name}")[0]

    def segments(self, table: str, *, rank: int | None = None) -> Iterator[RowSegment]:
        """A table's rows file by file; only those that a rank wrote if asked."""
        for entry in self.manifest.entries("rows", table=table, rank=rank):
            yield decode(self.read(entry), where=f"{self.where}/{entry.name}")

    def dense(self) -> Arrays:
        """Raises: DamagedError if the manifest names no dense file."""
        entries = self.manifest.entries("dense")
        if not entries:
            raise DamagedError(f"{self.where}/{DENSE_FILE}: the manifest does not name it")
        return self.tensors(entries[0])


def load(
    saved: SavedState,
    recommender: Recommender,
    *,
    parts: Mapping[str, StatePart],
    config: Config,
    ranks: Ranks,
) -> None:
    """Write this rank's share of the saved state.

    Raises: CheckpointError if it was made under another schema or model, DamagedError.
    """
    manifest = saved.manifest
    if manifest.schema_hash != config.schema.hash():
        raise CheckpointError(
            f"{saved.where}: made under schema {manifest.schema_hash}, the configuration has schema "
            f"{config.schema.hash()}. Use the old features, tasks and domains, or another "
            "checkpoint directory."
        )
    same_layout = manifest.world_size == ranks.world_size and manifest.slots_per_rank == {
        name: shard.slots_per_rank for name, shard in recommender.shards.items()
    }
    try:
        _load_dense(recommender, saved.dense())
        exactly = same_layout and _load_ids(saved, recommender, config=config, rank=ranks.rank)
        for table, shard in recommender.shards.items():
            if exactly:
                _write_rows(shard, saved.segments(table, rank=ranks.rank), all_held=True)
            else:
                if ranks.rank == 0:
                    log.warning(
                        "rows move: the table's counters and admission counts begin anew", table=table
                    )
                _insert_keys(saved, shard, ranks=ranks)
                _write_rows(shard, saved.segments(table), all_held=False)
        _load_parts(saved, parts, ranks=ranks)
    except (BlobError, ValueError) as error:
        raise CheckpointError(f"{saved.where}: {error}") from error


def _load_dense(recommender: Recommender, arrays: Arrays) -> None:
    """Raises: ValueError if a parameter is missing or has another shape."""
    check_dense(recommender.dense, arrays)
    optimizer = recommender.dense_optimizer
    for name, parameter in recommender.dense.named_parameters():
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(arrays[f"param/{name}"].copy()))
        for key in ADAM_KEYS:
            if f"{key}/{name}" in arrays:
                value = torch.from_numpy(arrays[f"{key}/{name}"].copy())
                # The fused optimizer keeps its step beside the parameter, on a GPU too.
                optimizer.state[parameter][key] = value.to(parameter.device)


def check_dense(dense: torch.nn.Module, arrays: Arrays) -> None:
    """Raises: ValueError if the parameters are not these, or one or Adam's state of it is of another shape or
    not whole."""
    known = {f"param/{name}" for name, _ in dense.named_parameters()}
    unknown = sorted(key for key in arrays if key.startswith("param/") and key not in known)
    if unknown:
        raise ValueError(f"dense '{unknown[0]}': the model has no such parameter; model.name is another one")
    for name, parameter in dense.named_parameters():
        shape = tuple(parameter.shape)
        shapes = {"param": shape, "step": (), "exp_avg": shape, "exp_avg_sq": shape}
        if not any(f"{key}/{name}" in arrays for key in ADAM_KEYS):
            shapes = {"param": shape}  # a parameter that was never trained has no state
        for key, expected in shapes.items():
            saved = arrays.get(f"{key}/{name}")
            if saved is None and key != "param":
                raise ValueError(
                    f"dense '{key}/{name}': expected shape {list(expected)}, found nothing; "
                    "Adam's step, exp_avg and exp_avg_sq belong together"
                )
            if saved is None or saved.shape != expected:
                found = "nothing" if saved is None else list(saved.shape)
                raise ValueError(
                    f"dense '{key}/{name}': expected shape {list(expected)}, found {found}; "
                    "the model's configuration is another one"
                )


def _load_ids(saved: SavedState, recommender: Recommender, *, config: Config, rank: int) -> bool:
    """Id tables slot for slot; False where a table's policy is another one."""
    restored = {}
    for table, shard in recommender.shards.items():
        policy = policy_of(shard.config, num_slots=shard.slots_per_rank, config=config)
        entries = saved.manifest.entries("ids", table=table, rank=rank)
        if len(entries) != 1:
            raise DamagedError(f"{saved.where}: {len(entries)} id files of table '{table}', rank {rank}")
        state = {name: column.copy() for name, column in saved.tensors(entries[0]).items()}
        try:
            restored[table] = IdTable.load(policy, state)
        except StateError as error:
            # Every byte was verified before: what differs is the policy.
            log.warning("rows move into a table of another policy", table=table, difference=str(error))
            return False
    for table, ids in restored.items():
        recommender.replace_ids(table, ids)
    return True


def _owned(segment: RowSegment, ranks: Ranks) -> npt.NDArray[np.bool_]:
    own_N: npt.NDArray[np.bool_] = owner_of(segment.ids_N, num_owners=ranks.world_size) == ranks.rank
    return own_N


def _insert_keys(saved: SavedState, shard: TableShard, *, ranks: Ranks) -> None:
    """A whole table in one call, so that the best rows stay where not all fit."""
    columns: dict[str, list[npt.NDArray[Any]]] = {
        name: [] for name in ("ids_N", "scores_N", "last_seen_s_N", "updates_N")
    }
    for segment in saved.segments(shard.config.name):
        own_N = _owned(segment, ranks)
        for name, pieces in columns.items():
            pieces.append(getattr(segment, name)[own_N])
    whole = {name: np.concatenate(pieces) for name, pieces in columns.items() if pieces}
    if whole:
        shard.ids.insert_rows(
            whole["ids_N"],
            scores_N=whole["scores_N"],
            last_seen_s_N=whole["last_seen_s_N"],
            updates_N=whole["updates_N"],
        )


def _write_rows(shard: TableShard, segments: Iterator[RowSegment], *, all_held: bool) -> None:
    """Rows and optimizer state into the slots of their keys.

    Args: all_held: each row must have its slot; else rows without one are left out: they are other ranks',
        or there was no room.
    """
    for segment in segments:
        slots_N = shard.ids.lookup(segment.ids_N)
        held_N = slots_N >= 0
        if all_held and not held_N.all():
            raise ValueError(f"table '{segment.table}': rows of {int((~held_N).sum())} keys have no slot")
        device = shard.rows.rows_CD.device
        place_N = torch.from_numpy(slots_N[held_N]).to(device)
        assert segment.state_N is not None
        # Indexing makes copies that may be written to, as torch wants them.
        shard.rows.rows_CD[place_N] = torch.from_numpy(segment.rows_ND[held_N]).to(device)
        shard.rows.state_C[place_N] = torch.from_numpy(segment.state_N[held_N]).to(device)


def _load_parts(saved: SavedState, parts: Mapping[str, StatePart], *, ranks: Ranks) -> None:
    """The parts and the random generators; nothing where the checkpoint was imported."""
    states = [saved.tensors(entry) for entry in saved.manifest.entries("state")]
    if not states:
        return
    for name, part in parts.items():
        prefix = f"part/{name}/"
        columns_by_rank = [
            {key.removeprefix(prefix): column for key, column in state.items() if key.startswith(prefix)}
            for state in states
        ]
        if any(columns_by_rank):
            part.restore(columns_by_rank, rank=ranks.rank, world_size=ranks.world_size)
        else:
            log.warning("a part of the state begins anew: the checkpoint is older than it", part=name)
    # With another number of ranks there is no state that is the right one; a saved one is as good as any.
    mine = states[ranks.rank % len(states)]
    torch.set_rng_state(torch.from_numpy(mine["rng/torch_cpu"].copy()))
    if "rng/torch_cuda" in mine and torch.cuda.is_available():
        torch.cuda.set_rng_state(torch.from_numpy(mine["rng/torch_cuda"].copy()))
