"""The state of one rank, copied at a step boundary, and the files that the copy becomes.

What is copied: of every live row the embedding and its optimizer state, the id table's state (which has key,
score, last sighting and updates of each row, and the generators of numpy), the dense model with Adam's state
(rank 0), the parts, the states of PyTorch's random generators. Embeddings go into buffers that are kept
from one checkpoint to the next: fresh memory would cost more time than the copy. So a run needs, beside its
tables, once what the live rows take, and while files are written twice more what one table's id table takes.

Shapes: N live rows, D dim, C slots.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from param_server.client import RowSegment, encode, encode_tensors, split
from trainer.checkpoint.manifest import FileKind
from trainer.recommender import Recommender, TableShard

Arrays = dict[str, npt.NDArray[Any]]

DENSE_FILE = "dense.safetensors"
_GPU_ROWS_AT_ONCE = 1 << 18


class StatePart(Protocol):
    """Something beside the model that a run must not forget: the metric window, for one."""

    def columns(self) -> dict[str, npt.NDArray[Any]]:
        """Its state; may be views, since they are copied at once."""

    def restore(
        self, columns_by_rank: Sequence[dict[str, npt.NDArray[Any]]], *, rank: int, world_size: int
    ) -> None:
        """Take over what the ranks of the saved run had, one entry each; their number may be another.

        Raises: ValueError if the columns are not what this part understands.
        """


class StateFile(NamedTuple):
    name: str
    kind: FileKind
    table: str
    data: bytes


@dataclass(frozen=True, slots=True)
class TableCopy:
    table: str
    rows_ND: npt.NDArray[np.float32]
    state_N: npt.NDArray[np.float32]
    ids: Arrays
    """The id table's own copy; its columns are in the order of the rows."""

    def segment(self) -> RowSegment:
        return RowSegment(
            table=self.table,
            ids_N=self.ids["key"],
            rows_ND=self.rows_ND,
            deleted_ids_M=np.zeros(0, np.int64),
            state_N=self.state_N,
            scores_N=self.ids["score"],
            last_seen_s_N=self.ids["last_seen_s"].astype(np.int64),
            updates_N=self.ids["updates"],
        )


@dataclass(frozen=True, slots=True)
class StateCopy:
    """Shares nothing with what training goes on to change."""

    tables: list[TableCopy]
    state: Arrays
    """part/<part>/<column> and rng/<generator>."""
    dense: Arrays | None
    """Only on rank 0."""


class StateCopier:
    """Copies a recommender again and again into the same buffers; one copy is in use at a time."""

    def __init__(self) -> None:
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}

    def copy(
        self, recommender: Recommender, *, parts: Mapping[str, StatePart], with_dense: bool
    ) -> StateCopy:
        tables = [self._copy_table(shard) for shard in recommender.shards.values()]
        state = {
            f"part/{part}/{name}": column.copy()
            for part, source in parts.items()
            for name, column in source.columns().items()
        }
        state["rng/torch_cpu"] = torch.get_rng_state().numpy().copy()
        if torch.cuda.is_available():
            state["rng/torch_cuda"] = torch.cuda.get_rng_state().numpy().copy()
        return StateCopy(tables=tables, state=state, dense=copy_dense(recommender) if with_dense else None)

    def _copy_table(self, shard: TableShard) -> TableCopy:
        ids = shard.ids.state()
        name, rows_CD = shard.config.name, shard.rows.rows_CD
        if name not in self._buffers:
            # Of all slots, but memory is only taken for the pages that live rows reach.
            shape = (shard.slots_per_rank, shard.config.dim)
            self._buffers[name] = torch.empty(shape), torch.empty(shard.slots_per_rank)
        slots_N = torch.from_numpy(ids["slot"].astype(np.int64))
        buffer_CD, buffer_C = self._buffers[name]
        rows_ND, state_N = buffer_CD[: len(slots_N)], buffer_C[: len(slots_N)]
        _gather(rows_CD.detach(), slots_N, into_N=rows_ND)
        _gather(shard.rows.state_C.detach(), slots_N, into_N=state_N)
        return TableCopy(table=name, rows_ND=rows_ND.numpy(), state_N=state_N.numpy(), ids=ids)


def _gather(source_C: Tensor, slots_N: Tensor, *, into_N: Tensor) -> None:
    if source_C.device.type == "cpu":
        torch.index_select(source_C, 0, slots_N, out=into_N)
        return
    # A GPU has no room for a second table: piece by piece.
    for start in range(0, len(slots_N), _GPU_ROWS_AT_ONCE):
        piece = slots_N[start : start + _GPU_ROWS_AT_ONCE].to(source_C.device)
        into_N[start : start + len(piece)].copy_(source_C.index_select(0, piece))


def copy_dense(recommender: Recommender) -> Arrays:
    """Dense parameters and Adam's state, by parameter name."""
    arrays: Arrays = {}
    for name, parameter in recommender.dense.named_parameters():
        arrays[f"param/{name}"] = _copied(parameter)
        for key, value in recommender.dense_optimizer.state.get(parameter, {}).items():
            arrays[f"{key}/{name}"] = _copied(value)
    return arrays


def _copied(tensor: Tensor) -> npt.NDArray[Any]:
    return tensor.detach().to("cpu", copy=True).numpy()


def files_of(copy: StateCopy, *, rank: int, bytes_max: int) -> Iterator[StateFile]:
    """The files of a rank, one at a time, so that no more than one is in memory encoded.

    Raises: BlobError if a row is not finite.
    """
    for table in copy.tables:
        for part, piece in enumerate(split(table.segment(), bytes_max=bytes_max)):
            name = f"{table.table}.rank{rank}.{part:05d}.rowseg"
            yield StateFile(name, "rows", table.table, encode(piece, row_format="float32"))
        ids = encode_tensors(table.ids, metadata={})
        yield StateFile(f"{table.table}.rank{rank}.ids.safetensors", "ids", table.table, ids)
    yield StateFile(f"rank{rank}.safetensors", "state", "", encode_tensors(copy.state, metadata={}))
    if copy.dense is not None:
        yield StateFile(DENSE_FILE, "dense", "", encode_tensors(copy.dense, metadata={}))
