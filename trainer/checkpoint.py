"""The whole state of a run, saved and restored: tables, dense model, optimizers, metrics, positions.

Rows are RowSegments by raw key, never by slot, so any number of ranks can load them; with the number of
ranks and slots unchanged the id tables come back slot for slot and the run goes on bit for bit.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import structlog
import torch

from feature_eviction import IdTable, StateError, owner_of
from param_server.client import (
    BlobError,
    RowSegment,
    decode,
    decode_tensors,
    encode,
    encode_tensors,
    split,
)
from trainer.checkpoint_files import (
    FORMAT,
    CheckpointManifest,
    FileEntry,
    commit,
    lock_directory,
    newest,
    read_file,
    retain,
    set_aside_newer,
    write_file,
)
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.errors import CheckpointError
from trainer.metrics import QualityWindow
from trainer.recommender import Recommender, TableShard, policy_of
from trainer.stream.columns import Position

log = structlog.get_logger()

Arrays = dict[str, npt.NDArray[Any]]


class Progress(msgspec.Struct, kw_only=True):
    """Where a run stands; the same on every rank but for the dead letters, which each rank counts."""

    step: int = 0
    generation: int = 0
    impressions_trained: int = 0
    event_time_s: int = 0
    produced_ms_newest: int = 0
    """When the newest impression trained entered the stream."""
    dead_letters: dict[str, int] = {}


class _RankPart(msgspec.Struct):
    """What a rank adds to the manifest."""

    files: list[FileEntry]
    positions: list[Position]
    dead_letters: dict[str, int]


@dataclass(frozen=True, slots=True)
class Restored:
    progress: Progress
    positions: list[Position]
    directory: Path


class Checkpoints:
    """The checkpoint directory of a run. Calls are collective."""

    def __init__(self, root: Path, *, config: Config, ranks: Ranks) -> None:
        """Raises: CheckpointError if another trainer uses the directory."""
        self._root = root
        self._config = config
        self._ranks = ranks
        self._saved: tuple[int, list[Position]] | None = None
        self._lock = lock_directory(root) if ranks.rank == 0 else None

    def close(self) -> None:
        """Let other trainers use the directory."""
        if self._lock is not None:
            self._lock.close()

    def save(
        self,
        recommender: Recommender,
        *,
        window: QualityWindow,
        progress: Progress,
        positions: list[Position],
    ) -> None:
        """Write everything, then make it the newest checkpoint; nothing where nothing moved since the last.

        Args: positions: this rank's partitions.
        """
        unmoved = self._saved == (progress.step, positions)
        if self._ranks.sum(np.array([not unmoved], np.int64))[0] == 0:
            return
        self._saved = (progress.step, positions)
        temporary = self._root / f".writing-{progress.step:012d}"
        if self._ranks.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self._ranks.barrier()
        files = [write_file(temporary / name, data) for name, data in self._files(recommender, window=window)]
        part = _RankPart(files=files, positions=positions, dead_letters=progress.dead_letters)
        gathered = self._ranks.gather_bytes(msgspec.json.encode(part))
        if self._ranks.rank == 0:
            parts = [msgspec.json.decode(data, type=_RankPart) for data in gathered]
            commit(temporary, self._manifest(recommender, progress=progress, parts=parts))
            retain(self._root, keep=self._config.checkpoint.keep)
        self._ranks.barrier()

    def _manifest(
        self, recommender: Recommender, *, progress: Progress, parts: list[_RankPart]
    ) -> CheckpointManifest:
        dead_letters: dict[str, int] = {}
        for part in parts:
            for reason, num in part.dead_letters.items():
                dead_letters[reason] = dead_letters.get(reason, 0) + num
        return CheckpointManifest(
            format=FORMAT,
            step=progress.step,
            generation=progress.generation,
            world_size=self._ranks.world_size,
            schema_hash=self._config.schema.hash(),
            config_hash=self._config.hash(),
            positions=[position for part in parts for position in part.positions],
            slots_per_rank={name: shard.slots_per_rank for name, shard in recommender.shards.items()},
            counters={
                "impressions_trained": progress.impressions_trained,
                "event_time_s": progress.event_time_s,
                "produced_ms_newest": progress.produced_ms_newest,
            },
            dead_letters=dead_letters,
            files=[file for part in parts for file in part.files],
        )

    def _files(self, recommender: Recommender, *, window: QualityWindow) -> list[tuple[str, bytes]]:
        """This rank's files: (name, content)."""
        rank = self._ranks.rank
        state: Arrays = {f"window/{name}": column for name, column in window.columns().items()}
        files = []
        for table, shard in recommender.shards.items():
            state |= {f"ids/{table}/{name}": column for name, column in shard.ids.state().items()}
            pieces = split(rows_segment(shard), bytes_max=self._config.publish.segment_bytes_max)
            files += [
                (f"{table}.rank{rank}.{part:05d}.rowseg", encode(piece, row_format="float32"))
                for part, piece in enumerate(pieces)
            ]
        files.append((f"rank{rank}.safetensors", encode_tensors(state, metadata={})))
        if rank == 0:
            files.append(("dense.safetensors", encode_tensors(dense_state(recommender), metadata={})))
        return files

    def restore(self, recommender: Recommender, *, window: QualityWindow) -> Restored | None:
        """Load the newest whole checkpoint into a fresh recommender; None where there is none.

        Raises: CheckpointError if it is damaged or was made under another schema.
        """
        found = newest(self._root)
        if found is None:
            return None
        directory, manifest = found
        if manifest.schema_hash != self._config.schema.hash():
            raise CheckpointError(
                f"{directory}: made under schema {manifest.schema_hash}, the configuration has schema "
                f"{self._config.schema.hash()}. Use the old features, tasks and domains, or another "
                "checkpoint directory."
            )
        files = {entry.name: entry for entry in manifest.files}

        def read(name: str) -> bytes:
            return read_file(directory, files[name])

        try:
            _load_dense(recommender, decode_tensors(read("dense.safetensors"), where="dense")[0])
            same_layout = manifest.world_size == self._ranks.world_size and manifest.slots_per_rank == {
                name: shard.slots_per_rank for name, shard in recommender.shards.items()
            }
            if same_layout:
                same_layout = self._load_exactly(
                    recommender, window=window, state_blob=read(self._state_name)
                )
            self._load_rows(
                recommender,
                [
                    decode(read(name), where=str(directory / name))
                    for name in sorted(files)
                    if name.endswith(".rowseg") and (not same_layout or f".rank{self._ranks.rank}." in name)
                ],
                exactly=same_layout,
            )
        except (BlobError, KeyError, ValueError) as error:
            raise CheckpointError(f"{directory}: {error}") from error
        self._ranks.barrier()
        if self._ranks.rank == 0:
            set_aside_newer(self._root, directory)
        progress = Progress(
            step=manifest.step,
            generation=manifest.generation,
            impressions_trained=manifest.counters["impressions_trained"],
            event_time_s=manifest.counters["event_time_s"],
            produced_ms_newest=manifest.counters["produced_ms_newest"],
            dead_letters=manifest.dead_letters if self._ranks.rank == 0 else {},
        )
        return Restored(progress=progress, positions=manifest.positions, directory=directory)

    @property
    def _state_name(self) -> str:
        return f"rank{self._ranks.rank}.safetensors"

    def _load_exactly(self, recommender: Recommender, *, window: QualityWindow, state_blob: bytes) -> bool:
        """Id tables slot for slot, and the metric windows; False where a table's policy is another one."""
        arrays, _ = decode_tensors(state_blob, where=self._state_name)
        if not window.restore(_under(arrays, "window/")):
            log.warning("metric windows begin empty: metrics_window, domains or tasks changed")
        restored = {}
        for table, shard in recommender.shards.items():
            policy = policy_of(shard.config, num_slots=shard.slots_per_rank, config=self._config)
            try:
                restored[table] = IdTable.load(policy, _under(arrays, f"ids/{table}/"))
            except StateError as error:
                # Every byte was verified before: what differs is the policy.
                log.warning("rows move into a table of another policy", table=table, difference=str(error))
                return False
        for table, ids in restored.items():
            recommender.replace_ids(table, ids)
        return True

    def _load_rows(self, recommender: Recommender, segments: list[RowSegment], *, exactly: bool) -> None:
        """Write the rows that this rank owns.

        Args: exactly: the id tables know every key already; otherwise they are inserted, a whole table
            in one call, so that the best ones stay where not all fit.
        """
        for table, shard in recommender.shards.items():
            mine = [segment for segment in segments if segment.table == table]
            owned = [
                owner_of(segment.ids_N, num_owners=self._ranks.world_size) == self._ranks.rank
                for segment in mine
            ]
            keys_N = _joined(segment.ids_N[own_N] for segment, own_N in zip(mine, owned, strict=True))
            if exactly:
                slots_N = shard.ids.lookup(keys_N)
            else:
                slots_N = shard.ids.insert_rows(
                    keys_N,
                    scores_N=_owned_column(mine, owned, "scores_N"),
                    last_seen_s_N=_owned_column(mine, owned, "last_seen_s_N"),
                    updates_N=_owned_column(mine, owned, "updates_N"),
                )
            held_N = slots_N >= 0
            if exactly and not held_N.all():
                raise ValueError(f"table '{table}': rows of {int((~held_N).sum())} keys have no slot")
            place_N = torch.from_numpy(slots_N[held_N])
            rows_ND = _owned_column(mine, owned, "rows_ND")[held_N]
            state_N = _owned_column(mine, owned, "state_N")[held_N]
            shard.rows.rows_CD[place_N] = torch.from_numpy(rows_ND).to(shard.rows.rows_CD.device)
            shard.rows.state_C[place_N] = torch.from_numpy(state_N).to(shard.rows.state_C.device)


def _owned_column(
    segments: list[RowSegment], owned: list[npt.NDArray[np.bool_]], name: str
) -> npt.NDArray[Any]:
    return _joined(getattr(segment, name)[own_N] for segment, own_N in zip(segments, owned, strict=True))


def _joined(parts: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """A writable copy of all parts."""
    return np.concatenate(list(parts))


def rows_segment(shard: TableShard) -> RowSegment:
    """Every live row of this rank with its optimizer state, score, last sighting and updates."""
    columns = shard.ids.rows()
    place_N = torch.from_numpy(columns.slots_N.astype(np.int64))
    return RowSegment(
        table=shard.config.name,
        ids_N=columns.keys_N,
        rows_ND=shard.rows.rows_CD[place_N].detach().cpu().numpy(),
        deleted_ids_M=np.zeros(0, np.int64),
        state_N=shard.rows.state_C[place_N].detach().cpu().numpy(),
        scores_N=columns.scores_N,
        last_seen_s_N=columns.last_seen_s_N,
        updates_N=columns.updates_N,
    )


def dense_state(recommender: Recommender) -> Arrays:
    """Dense parameters and Adam's state, by parameter name."""
    arrays: Arrays = {}
    for name, parameter in recommender.dense.named_parameters():
        arrays[f"param/{name}"] = parameter.detach().cpu().numpy()
        for key, value in recommender.dense_optimizer.state.get(parameter, {}).items():
            arrays[f"{key}/{name}"] = value.detach().cpu().numpy()
    return arrays


def _load_dense(recommender: Recommender, arrays: Arrays) -> None:
    """Raises: ValueError if a parameter is missing or has another shape."""
    optimizer = recommender.dense_optimizer
    for name, parameter in recommender.dense.named_parameters():
        saved = arrays.get(f"param/{name}")
        if saved is None or saved.shape != tuple(parameter.shape):
            found = "nothing" if saved is None else list(saved.shape)
            raise ValueError(
                f"dense parameter '{name}': expected shape {list(parameter.shape)}, found {found}; "
                "the model's configuration is another one"
            )
        with torch.no_grad():
            parameter.copy_(torch.from_numpy(saved.copy()))
        for key in ("step", "exp_avg", "exp_avg_sq"):
            if f"{key}/{name}" in arrays:
                value = torch.from_numpy(arrays[f"{key}/{name}"].copy())
                # The fused optimizer keeps its step beside the parameter, on a GPU too.
                optimizer.state[parameter][key] = value.to(parameter.device)


def _under(arrays: Arrays, prefix: str) -> Arrays:
    return {
        name.removeprefix(prefix): array.copy() for name, array in arrays.items() if name.startswith(prefix)
    }
