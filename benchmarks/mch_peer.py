"""TorchRec's managed collision module as a contestant of benchmarks.id_table."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

SMALL_ROWS = 2_000_000

Keys = npt.NDArray[np.int64]


class Mch:
    """TorchRec's MCHManagedCollisionModule. One of its slots is the row of the ids that have none."""

    cases = frozenset({"lookup", "map", "load"})

    def __init__(self, keys_S: Keys, *, policy: str, interval: int) -> None:
        import torch
        from torchrec.sparse.jagged_tensor import JaggedTensor

        torch.set_num_threads(1)
        # An eviction sorts the whole table: with a large one a round has no more than one.
        self.calls_per_round: int | None = max(interval, 5 if len(keys_S) <= SMALL_ROWS else 1)
        self._torch, self._jagged = torch, JaggedTensor
        self._make = partial(self._empty, policy, interval, len(keys_S))
        self._module = self._make()
        self._module._mch_sorted_raw_ids[:-1] = torch.from_numpy(np.sort(keys_S)[:-1])
        for column in self._module._mch_metadata.values():
            column[:-1] = 1

    def _empty(self, policy: str, interval: int, num_slots: int) -> Any:
        from torchrec.modules import mc_modules

        return mc_modules.MCHManagedCollisionModule(
            zch_size=num_slots,
            device=self._torch.device("cpu"),
            eviction_policy=getattr(mc_modules, policy)(),
            eviction_interval=interval,
        )

    def _features(self, keys_N: Keys) -> dict[str, Any]:
        lengths_N = self._torch.ones(len(keys_N), dtype=self._torch.int64)
        return {"id": self._jagged(values=self._torch.from_numpy(keys_N), lengths=lengths_N)}

    def lookup(self, keys_N: Keys) -> object:
        return self._module.remap(self._features(keys_N))

    def map(self, keys_N: Keys) -> object:
        return self._module(self._features(keys_N))

    def remapped(self, keys_N: Keys) -> npt.NDArray[np.int64]:
        """The slots that a training step would read and write."""
        slots_N: npt.NDArray[np.int64] = self._module(self._features(keys_N))["id"].values().numpy()
        return slots_N

    def deleter(self) -> Callable[[Keys], object]:
        raise NotImplementedError("MCHManagedCollisionModule has no delete by id")

    def loader(self) -> Callable[[], object]:
        saved = self._module.state_dict()
        return lambda: self._make().load_state_dict(saved)

    def bytes_used(self) -> int:
        columns = [self._module._mch_sorted_raw_ids, self._module._mch_remapped_ids_mapping]
        columns += self._module._mch_metadata.values()
        return sum(int(column.nbytes) for column in columns)

    def close(self) -> None:
        pass
