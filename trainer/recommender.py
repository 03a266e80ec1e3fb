"""The trained state of one rank and its step: map ids, reset new rows, predict, learn.

A step has two halves. `map` changes the id tables alone, `learn` everything else, so the map of batch t + 1
may run in another thread while batch t is learned. It always sees batch t's slots in flight, at the same time
or not: what is evicted depends on the batches and never on how the halves overlapped.
Shapes: B rows of this rank's batch, N impressions in it (N <= B), T tasks, E embedding width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from feature_eviction import (
    ClassPolicy,
    IdTable,
    MapResult,
    TablePolicy,
    num_slots_for_budget,
    table_bytes,
)
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.config.config import TableConfig
from trainer.errors import ConfigError, NotFiniteError
from trainer.failpoints import reach
from trainer.features import KeyMaker, TableKeys
from trainer.finite import dense_norm, own_health, what_is_not_finite
from trainer.id_routing import IdRouter
from trainer.model import model_of, multi_task_loss, uses_domain
from trainer.model.compiled import Forward, compile_dense
from trainer.model.l2 import parameter_groups
from trainer.model.layout import FeatureLayout
from trainer.publish.changed_rows import BYTES_PER_SLOT, ChangedRows
from trainer.row_init import first_rows
from trainer.stream.columns import Impressions
from trainer.tables import LocalRows, ShardedTables, drop_default, state_bytes
from trainer.task_scaling import TaskRates


@dataclass(slots=True)
class TableShard:
    """One table on this rank: the owner of its id table, its rows and its record of changes."""

    config: TableConfig
    slots_per_rank: int
    ids: IdTable
    router: IdRouter
    rows: LocalRows
    changed: ChangedRows

    @property
    def bytes_used(self) -> int:
        """Rows, optimizer state, id table and change record of this rank."""
        return self.rows.num_bytes + self.ids.bytes_used + self.slots_per_rank * BYTES_PER_SLOT


@dataclass(frozen=True, slots=True)
class MappedBatch:
    """A batch whose ids have their slots; to be learned once, in the order of the maps."""

    impressions: Impressions
    num_rows: int
    """B: the impressions and the padding that makes all ranks' batches equally long."""
    tables: list[MappedTable]


@dataclass(frozen=True, slots=True)
class MappedTable:
    """One table's part of a mapped batch."""

    shard: TableShard
    owned: MapResult
    """What the id table did for all ranks' keys."""
    first_rows_MD: npt.NDArray[np.float32]
    """What the new slots begin with."""
    slots_L: npt.NDArray[np.int64]
    """Global slots, without the default row."""
    lengths_FB: npt.NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class Learned:
    """What became of a batch; the same on every rank but for the probabilities and the words."""

    probabilities_NT: npt.NDArray[np.float32]
    """Made before this batch was learned."""
    not_finite: str
    """Empty: it was learned. Else what was not finite: nothing of the batch was applied."""


class Recommender:
    """Tables, dense model and their optimizers; every rank holds its shard and the whole dense model."""

    def __init__(self, config: Config, *, ranks: Ranks) -> None:
        """Raises: ConfigError if a table's budget does not hold a single row a rank."""
        torch.manual_seed(config.seed)
        self._config = config
        self._ranks = ranks
        self._routing_ranks = ranks.for_another_thread()
        self._device = ranks.device
        self.layout = FeatureLayout.of(config.schema)
        self.keys = KeyMaker(config.schema)
        self.num_folded = 0
        """Ids wider than 52 bits that were mapped, since this was made."""
        self.batch_rows = max(1, config.train.batch_size // ranks.world_size)
        """Rows of a rank's batch where nobody says otherwise."""
        self.dense = model_of(config)
        self.dense.to(self._device)
        # One fused pass over all parameters instead of a dozen small ones over each.
        self.dense_optimizer = torch.optim.Adam(
            parameter_groups(self.dense, l2=config.model.l2, batch_size=config.train.batch_size),
            lr=config.optimizer.dense_learning_rate,
            fused=True,
        )
        self._precision = torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32
        self._learn: Forward = self.dense
        if config.model.compile:
            self._learn = compile_dense(
                self.dense, num_rows=self.batch_rows, width=self.layout.width, precision=self._precision
            )
        slots = {
            table.name: slots_for(table, world_size=ranks.world_size, config=config)
            for table in sorted(config.tables, key=lambda table: table.dim)
        }
        self.embeddings = ShardedTables(
            self.layout,
            slots_per_rank=slots,
            optimizer=config.optimizer,
            world_size=ranks.world_size,
            device=self._device,
        )
        self.shards = {
            table.name: self._shard(table, slots[table.name])
            for table in sorted(config.tables, key=lambda table: table.dim)
        }
        self._loss_weight_T = torch.tensor(
            [task.loss_weight for task in config.schema.tasks], dtype=torch.float32, device=self._device
        )
        self.task_rates: TaskRates | None = None
        """With train.task_scaling: a part of each checkpoint."""
        if config.train.task_scaling == "by_positives":
            self.task_rates = TaskRates(len(config.schema.tasks))

    def _shard(self, table: TableConfig, num_slots: int) -> TableShard:
        ids = IdTable(policy_of(table, num_slots=num_slots, config=self._config))
        return TableShard(
            config=table,
            slots_per_rank=num_slots,
            ids=ids,
            router=IdRouter(ids, slots_per_rank=num_slots, ranks=self._routing_ranks),
            rows=self.embeddings.local[table.name],
            changed=ChangedRows(num_slots, table=table.name),
        )

    def replace_ids(self, table: str, ids: IdTable) -> None:
        """Put a restored id table in the place of the fresh one; its rows are the caller's to write."""
        shard = self.shards[table]
        shard.ids = ids
        shard.router = IdRouter(ids, slots_per_rank=shard.slots_per_rank, ranks=self._routing_ranks)

    def train(
        self, impressions: Impressions, *, now_s: int, num_rows: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Map and learn one batch. Collective; arguments as for `map`.

        Returns: probabilities float32 [N, T], made before this batch was learned.
        Raises: NotFiniteError on every rank, with rows and dense model as they were, if the loss or a
            gradient is not finite.
        """
        learned = self.learn(self.map(impressions, now_s=now_s, num_rows=num_rows))
        if learned.not_finite:
            raise NotFiniteError(
                f"the batch of {len(impressions)} impressions up to event time {now_s} was not learned: its "
                f"{learned.not_finite} is not finite. Look for labels that are no numbers, or lower the "
                "learning rates"
            )
        return learned.probabilities_NT

    def map(self, impressions: Impressions, *, now_s: int, num_rows: int | None = None) -> MappedBatch:
        """Give the ids of this rank's part of one global batch their slots. Collective among maps.

        May run beside the `learn` of the batch before, and only of that one.
        Args: now_s: event time of the global batch, the same on every rank. num_rows: B, the same on every
            rank; None = batch_rows.
        """
        if num_rows is None or self._config.model.compile:
            # What is compiled is compiled for one number of rows.
            num_rows = max(num_rows or 0, self.batch_rows)
        mapped = []
        for table in self.keys.table_keys(impressions, num_rows=num_rows):
            shard = self.shards[table.table]
            self.num_folded += table.num_folded
            # The batch before the last is learned; the last one may be being learned right now.
            shard.ids.release(shard.ids.newest_batch - 1)
            routed = shard.router.map(table.keys_L, positives_L=table.positives_L, now_s=now_s)
            slots_L, lengths_FB = drop_default(routed.global_slots_L, table.lengths_FB)
            # Made here and not where they are written, since `learn` is what a step waits for.
            first_rows_MD = first_rows(
                routed.owned.new_keys_M,
                dim=shard.config.dim,
                scale=self._config.optimizer.embedding_init_scale,
                seed=self._config.seed,
            )
            mapped.append(MappedTable(shard, routed.owned, first_rows_MD, slots_L, lengths_FB))
        reach("after_map")
        return MappedBatch(impressions, num_rows, mapped)

    def learn(self, batch: MappedBatch, *, dense_rate_share: float = 1.0) -> Learned:
        """Predict, then learn from, a mapped batch, unless something in it is not finite. Collective among
        steps.

        Args: dense_rate_share: of the dense learning rate, for this step; the same on every rank.
        """
        for table in batch.tables:
            self._apply_map(table)
        pooled_BE = self.embeddings(
            np.concatenate([table.slots_L for table in batch.tables]),
            np.concatenate([table.lengths_FB for table in batch.tables]),
        )
        # The tables' optimizer is part of their backward. So the graph is cut here: everything is judged
        # before anything is applied.
        embedding_BE = pooled_BE.detach().requires_grad_()
        domain_B = self._domain(batch.impressions, num_rows=batch.num_rows)
        logits_BT = self._logits(embedding_BE, domain_B)
        labels_BT, known_BT = self._labels(batch.impressions, num_rows=batch.num_rows)
        loss = multi_task_loss(
            logits_BT, labels_BT=labels_BT, known_BT=known_BT, weight_T=self._task_weights()
        )
        self.dense_optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        gradient_BE = embedding_BE.grad
        assert gradient_BE is not None
        parameters = list(self.dense.parameters())
        health = own_health(loss, logits_BT=logits_BT, gradient_BE=gradient_BE)
        counts_2T = [(labels_BT * known_BT).sum(0), known_BT.sum(0)] if self.task_rates is not None else []
        sums_F = self._ranks.sum_gradients(parameters, also_F=torch.cat([health, *counts_2T]))
        not_finite = ""
        if torch.isfinite(sums_F[0] + dense_norm(parameters)):
            self._apply(batch, pooled_BE, gradient_BE=gradient_BE, dense_rate_share=dense_rate_share)
            if self.task_rates is not None:
                self.task_rates.add(*sums_F[1:].cpu().double().numpy().reshape(2, -1))
        else:
            not_finite = what_is_not_finite(loss, logits_BT=logits_BT, gradient_BE=gradient_BE)
        probabilities_BT = torch.sigmoid(logits_BT.detach()).cpu().numpy()
        return Learned(probabilities_BT[: len(batch.impressions)], not_finite)

    def _apply(
        self, batch: MappedBatch, pooled_BE: Tensor, *, gradient_BE: Tensor, dense_rate_share: float
    ) -> None:
        """Update the rows, then the dense model, whose gradients are there."""
        touched = {table.shard.config.name: table.owned.slots_N for table in batch.tables}
        self.embeddings.apply(pooled_BE, gradient_BE=gradient_BE, touched=touched)
        reach("after_backward")
        for group in self.dense_optimizer.param_groups:
            group["lr"] = self._config.optimizer.dense_learning_rate * dense_rate_share
        self.dense_optimizer.step()

    def _task_weights(self) -> Tensor:
        """What each task's loss counts in this step, [T]."""
        if self.task_rates is None:
            return self._loss_weight_T
        scale_T = torch.from_numpy(self.task_rates.scales()).to(self._loss_weight_T)
        return self._loss_weight_T * scale_T

    def _domain(self, impressions: Impressions, *, num_rows: int) -> Tensor | None:
        """The domain's index, 0 in the padding; None for a model that does not ask for it."""
        if not uses_domain(self.dense):
            return None
        domain_B = torch.zeros(num_rows, dtype=torch.int64)
        domain_B[: len(impressions)] = torch.from_numpy(impressions.domain_N.astype(np.int64))
        return domain_B.to(self._device)

    def _logits(self, embedding_BE: Tensor, domain_B: Tensor | None) -> Tensor:
        """The dense model as training runs it: products in train.precision, weights and logits in float32."""
        reduced = self._precision == torch.bfloat16
        with torch.autocast(self._device.type, torch.bfloat16, enabled=reduced):
            logits_BT = self._learn(embedding_BE, domain_B)
        return logits_BT.float()

    def _apply_map(self, table: MappedTable) -> None:
        """Record evictions, reset rows that have a new owner, record the rows this step will change.

        The order matters: a slot that was evicted and given away in the same call must end as its
        new owner's.
        """
        shard, owned = table.shard, table.owned
        shard.changed.evict(owned.evicted_keys_K, owned.evicted_slots_K)
        if len(owned.new_slots_M):
            slots_M = torch.from_numpy(owned.new_slots_M).to(self._device)
            shard.rows.rows_CD.index_copy_(0, slots_M, torch.from_numpy(table.first_rows_MD).to(self._device))
            shard.rows.forget(slots_M)
        shard.changed.touch(owned.slots_N[owned.slots_N >= 0])

    def _labels(self, impressions: Impressions, *, num_rows: int) -> tuple[Tensor, Tensor]:
        """Labels and their known mask, padded to the batch's rows with unknown ones."""
        num, num_tasks = impressions.labels_NT.shape
        labels_BT = torch.zeros(num_rows, num_tasks)
        known_BT = torch.zeros(num_rows, num_tasks)
        labels_BT[:num] = torch.from_numpy(impressions.labels_NT)
        known_BT[:num] = torch.from_numpy(impressions.known_NT.astype(np.float32))
        return labels_BT.to(self._device), known_BT.to(self._device)

    @torch.no_grad()
    def predict(self, impressions: Impressions) -> npt.NDArray[np.float32]:
        """Probabilities float32 [N, T] as serving would answer, in float32 throughout; changes nothing.

        Collective.
        """
        tables = self.keys.table_keys(impressions, num_rows=self.batch_rows)
        parts = [self._present(table) for table in tables]
        embedding_BE = self.embeddings(
            np.concatenate([slots_L for slots_L, _ in parts]),
            np.concatenate([lengths_FB for _, lengths_FB in parts]),
        )
        domain_B = self._domain(impressions, num_rows=self.batch_rows)
        probabilities_BT: Tensor = torch.sigmoid(self.dense(embedding_BE, domain_B))
        return probabilities_BT.cpu().numpy()[: len(impressions)]

    def _present(self, table: TableKeys) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]:
        slots_L = self.shards[table.table].router.lookup(table.keys_L)
        return drop_default(slots_L, table.lengths_FB)


def slots_for(table: TableConfig, *, world_size: int, config: Config) -> int:
    """The rows a rank may hold so that everything the table uses stays inside its budget.

    Raises: ConfigError if that is none.
    """
    row_bytes = table.dim * 4 + state_bytes(config.optimizer, dim=table.dim) + BYTES_PER_SLOT
    policy = policy_of(table, num_slots=1, config=config)
    num_slots = num_slots_for_budget(table.bytes_limit // world_size, bytes_per_row=row_bytes, policy=policy)
    if num_slots < 1:
        raise ConfigError(
            f"table '{table.name}': bytes_limit {table.bytes_limit} over {world_size} ranks holds no row: "
            f"one needs {row_bytes + table_bytes(1, policy=policy)} bytes. Raise bytes_limit."
        )
    return num_slots


def policy_of(table: TableConfig, *, num_slots: int, config: Config) -> TablePolicy:
    """The id table's policy: the table's score, the features' classes."""
    classes = {
        feature.class_id: ClassPolicy(
            class_id=feature.class_id,
            admission=feature.admission,
            ttl_s=feature.ttl_s,
            min_updates=feature.min_updates,
            max_rows=feature.max_rows,
            protected=feature.protected,
        )
        for feature in config.schema.features
        if feature.table == table.name
    }
    return TablePolicy(
        num_slots=num_slots,
        score=table.score,
        classes=tuple(classes.values()),
        victim_window=table.victim_window,
        expiry_scan=table.expiry_scan,
        count_window_s=table.count_window_s,
        seed=config.seed,
    )
