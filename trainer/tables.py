"""The sharded tables: TorchRec's, one a dim, row-wise over the ranks, optimizer fused into backward.

Shapes: B batch rows, E width of all embeddings, C local rows of a table, D its dim, U touched local rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from torch import Tensor, nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, KeyedJaggedTensor, PoolingType
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.comm_ops import set_gradient_division
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.sharding_plan import construct_module_sharding_plan, row_wise
from torchrec.distributed.types import ShardingPlan

from trainer.config.config import OptimizerConfig
from trainer.config.optimizers import NOT_SAVED
from trainer.errors import ConfigError
from trainer.model.layout import FeatureLayout
from trainer.row_adam import ROW_BYTES_PER_VALUE, RowAdam, step_rows


@dataclass(frozen=True, slots=True)
class LocalRows:
    """This rank's rows of one table; all are views that write through to the table."""

    rows_CD: Tensor
    states: tuple[Tensor, ...]
    """What the optimizer keeps of each row: `state_C`, or Adam's two moments [C, D]."""
    first_state: float = 0.0
    """What a new row's begins with."""

    @property
    def state_C(self) -> Tensor:  # noqa: N802 (a shape suffix)
        """Row-wise AdaGrad: the mean of squared gradients, summed over steps, from first_state on.

        Raises: ConfigError if the optimizer keeps something else.
        """
        if len(self.states) != 1:
            raise ConfigError(NOT_SAVED)
        return self.states[0]

    def forget(self, slots_M: Tensor) -> None:
        """These rows have a new owner, for whom the optimizer has seen nothing yet."""
        for state in self.states:
            state.index_fill_(0, slots_M, self.first_state)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.rows_CD, *self.states))


def state_bytes(optimizer: OptimizerConfig, *, dim: int) -> int:
    """What the optimizer keeps of one row."""
    return ROW_BYTES_PER_VALUE * dim if optimizer.embedding == "adam" else 4


class _Embeddings(nn.Module):
    """DistributedModelParallel shards the children of a module, not the module it is given."""

    def __init__(self, collection: EmbeddingBagCollection) -> None:
        super().__init__()
        self.collection = collection

    def forward(self, features: KeyedJaggedTensor) -> object:
        return self.collection(features)


class ShardedTables:
    """Pooled embeddings of slots; the rank r owns the global slots [r * C, (r + 1) * C)."""

    def __init__(
        self,
        layout: FeatureLayout,
        *,
        slots_per_rank: dict[str, int],
        optimizer: OptimizerConfig,
        world_size: int,
        device: torch.device,
    ) -> None:
        # Sums, not means over ranks: a step must mean the same on any number of ranks.
        set_gradient_division(False)
        configs = [
            EmbeddingBagConfig(
                name=table,
                num_embeddings=num_slots * world_size,
                embedding_dim=next(f.dim for f in layout.features if f.table == table),
                feature_names=[f.name for f in layout.features if f.table == table],
                # Over rows TorchRec makes a mean of a sum too, at 2 ms a batch of 1024 even for single ids.
                pooling=PoolingType.SUM,
            )
            for table, num_slots in slots_per_rank.items()
        ]
        self._feature_names = [name for config in configs for name in config.feature_names]
        self._dims_F = torch.tensor(layout.dims, device=device)
        self._device = device
        module = _Embeddings(EmbeddingBagCollection(tables=configs, device=torch.device("meta")))
        sharder = EmbeddingBagCollectionSharder(fused_params=_fused_params(optimizer))
        # The planner may choose a kernel that does not exist on CPU; this plan is the only one wanted.
        plan = construct_module_sharding_plan(
            module.collection,
            per_param_sharding={table: row_wise(compute_kernel="fused") for table in slots_per_rank},
            sharder=sharder,
            world_size=world_size,
            local_size=world_size,
            device_type=device.type,
        )
        self._sharded = DistributedModelParallel(
            module,
            device=device,
            plan=ShardingPlan(plan={"collection": plan}),
            sharders=[sharder],
            init_data_parallel=False,
        )
        self._adams: dict[str, RowAdam] = {}
        self.local = self._local_rows(optimizer)
        for rows in self.local.values():
            rows.rows_CD.zero_()

    def _local_rows(self, optimizer: OptimizerConfig) -> dict[str, LocalRows]:
        """The writable views; a table-batched kernel is not among named_modules()."""
        local = {}
        for lookup in self._sharded.module.collection._lookups:
            for kernel in lookup._emb_modules:
                weights = kernel._emb_module.split_embedding_weights()
                states = kernel._emb_module.split_optimizer_states()
                for index, table in enumerate(kernel._config.embedding_tables):
                    if optimizer.embedding == "adam":
                        rate = optimizer.embedding_adam_learning_rate
                        adam = RowAdam(weights[index], learning_rate=rate)
                        self._adams[table.name] = adam
                        local[table.name] = LocalRows(weights[index], (adam.first_CD, adam.second_CD))
                    else:
                        first = optimizer.embedding_initial_accumulator
                        local[table.name] = LocalRows(weights[index], (states[index][0],), first_state=first)
        return local

    def __call__(self, slots_L: npt.NDArray[np.int64], lengths_FB: npt.NDArray[np.int32]) -> Tensor:
        """Mean-pooled embeddings; a row without slots is zero. `apply` updates the tables.

        Args: slots_L: global slots of all features, tables by ascending dim. lengths_FB: [F, B].
        Returns: float32 [B, E] with a gradient.
        """
        features = KeyedJaggedTensor(
            keys=self._feature_names,
            values=torch.from_numpy(slots_L).to(self._device),
            lengths=torch.from_numpy(lengths_FB.reshape(-1)).to(self._device),
        )
        pooled = self._sharded(features)
        keyed = pooled.wait() if hasattr(pooled, "wait") else pooled
        values_BE: Tensor = keyed.values()
        if lengths_FB.max(initial=0) <= 1:
            return values_BE
        num_BF = torch.from_numpy(np.maximum(lengths_FB.T, 1).astype(np.float32)).to(self._device)
        return values_BE / num_BF.repeat_interleave(self._dims_F, dim=1)

    def apply(
        self, pooled_BE: Tensor, *, gradient_BE: Tensor, touched: dict[str, npt.NDArray[np.int64]]
    ) -> None:
        """Update the rows that made up pooled_BE; once for each call. Collective.

        Args: touched: table → the local slots that any rank looked up in that call, in any order, -1 and
            repeated ones too.
        """

        def backward() -> None:
            pooled_BE.backward(gradient_BE)  # type: ignore[no-untyped-call]

        if not self._adams:
            backward()
            return
        distinct = {
            table: torch.from_numpy(np.unique(slots_N[slots_N >= 0])).to(self._device)
            for table, slots_N in touched.items()
        }
        step_rows(backward, adams=self._adams, touched=distinct)


def _fused_params(optimizer: OptimizerConfig) -> dict[str, object]:
    if optimizer.embedding == "adam":
        # What trainer/row_adam.py needs: the fused update must leave the negative gradient behind.
        return {"optimizer": EmbOptimType.EXACT_SGD, "learning_rate": 1.0}
    return {
        "optimizer": EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        "learning_rate": optimizer.embedding_learning_rate,
        "eps": optimizer.embedding_eps,
    }


def drop_default(
    slots_L: npt.NDArray[np.int64], lengths_FB: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
    """Leave out ids without a row: the default row is zero, is stored nowhere and is never trained.

    Returns: the slots that are not -1 and the lengths that are left.
    """
    present_L = slots_L >= 0
    if present_L.all():
        return slots_L, lengths_FB
    place_L = np.repeat(np.arange(lengths_FB.size), lengths_FB.reshape(-1))
    left = np.bincount(place_L[present_L], minlength=lengths_FB.size).astype(np.int32)
    return slots_L[present_L], left.reshape(lengths_FB.shape)
