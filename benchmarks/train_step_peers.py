"""The contestants of benchmarks.train_step that stand for training without Freshet.

`Static` is TorchRec's sharded tables with ids modulo their rows, PEPNet as one writes it down, Adam as it
comes, and nothing else: no id table, no eviction, no metrics, no publishing, no checkpoint.
`ManagedCollision` puts TorchRec's MCH module in the place of the modulo.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from benchmarks.mch_peer import Mch
from benchmarks.plain_pepnet import PlainPEPNet
from benchmarks.train_step_stream import Keys, keys_of, popular_keys
from trainer.collectives import Ranks
from trainer.config import Config
from trainer.model import PEPNet, multi_task_loss
from trainer.model.layout import FeatureLayout
from trainer.stream.columns import Impressions
from trainer.tables import ShardedTables

MCH_POLICIES = {"mch_lfu": "LFU_EvictionPolicy", "mch_dlfu": "DistanceLFU_EvictionPolicy"}


class Static:
    """A table whose rows are shared by whatever ids fall on them: the bound."""

    def __init__(self, config: Config, *, rows: int, ranks: Ranks, plain: bool) -> None:
        """Args: plain: False = the dense network and the optimizer that Freshet trains."""
        torch.manual_seed(config.seed)
        self._ranks = ranks
        self.layout = FeatureLayout.of(config.schema)
        self.rows = rows
        num_tasks = len(config.schema.tasks)
        table = config.tables[0].name
        self._tables = ShardedTables(
            self.layout,
            slots_per_rank={table: rows // ranks.world_size},
            optimizer=config.optimizer,
            world_size=ranks.world_size,
            device=ranks.device,
        )
        self._tables.local[table].rows_CD.uniform_(-0.01, 0.01)
        network = PlainPEPNet if plain else PEPNet
        self.dense = network(self.layout, num_tasks=num_tasks, config=config.model)
        self._parameters = list(self.dense.parameters())
        rate = config.optimizer.dense_learning_rate
        self._optimizer = torch.optim.Adam(self._parameters, lr=rate, fused=None if plain else True)
        self._weight_T = torch.ones(num_tasks)

    def slots(self, keys_L: Keys) -> Keys:
        return np.remainder(keys_L, self.rows)

    def run(self, batches: Sequence[Impressions]) -> None:
        for impressions in batches:
            self._step(impressions)

    def _step(self, impressions: Impressions) -> None:
        keys_L = keys_of(impressions, self.layout)
        lengths_FB = np.ones((len(self.layout.features), len(impressions)), np.int32)
        logits_BT = self.dense(self._tables(self.slots(keys_L), lengths_FB))
        loss = multi_task_loss(
            logits_BT,
            labels_BT=torch.from_numpy(impressions.labels_NT),
            known_BT=torch.from_numpy(impressions.known_NT).float(),
            weight_T=self._weight_T,
        )
        self._optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        self._ranks.sum_gradients(self._parameters, also_F=torch.zeros(0))
        self._optimizer.step()

    def begin_turn(self) -> None:
        """Nothing is due."""

    def end_turn(self) -> None:
        """Nothing is on its way."""


class ManagedCollision(Static):
    """MCH maps, counts and evicts; a row that changes hands keeps its values and its optimizer state."""

    def __init__(self, config: Config, *, rows: int, ranks: Ranks, policy: str, interval: int) -> None:
        super().__init__(config, rows=rows, ranks=ranks, plain=True)
        threads = torch.get_num_threads()
        self._mch = Mch(popular_keys(self.layout, rows), policy=MCH_POLICIES[policy], interval=interval)
        torch.set_num_threads(threads)

    def slots(self, keys_L: Keys) -> Keys:
        slots_L: Keys = self._mch.remapped(keys_L)
        return slots_L
