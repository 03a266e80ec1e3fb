"""Raw keys to global slots over all ranks: each key is mapped by the one rank that owns it.

A rank de-duplicates its batch's keys, sends each to its owner with its shows and positives, the
owners map them in their id tables and answer with slots. Shapes: L keys of a batch, U distinct keys,
O keys that this rank owns.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from feature_eviction import IdTable, MapResult, deduplicate, owner_of
from trainer.collectives import Ranks


@dataclass(frozen=True, slots=True)
class Routed:
    """A batch's keys, mapped."""

    global_slots_L: npt.NDArray[np.int64]
    """-1 where the key has no row."""
    owned: MapResult
    """What this rank's id table did for all ranks' keys: local slots, new rows, evictions."""


class IdRouter:
    """Routes keys to the ranks that own them; with one rank everything stays here."""

    def __init__(self, table: IdTable, *, slots_per_rank: int, ranks: Ranks) -> None:
        self.table = table
        self._slots_per_rank = slots_per_rank
        self._ranks = ranks

    def map(self, keys_L: npt.NDArray[np.int64], *, positives_L: npt.NDArray[np.int32], now_s: int) -> Routed:
        """Map a batch: may admit and evict. Collective."""
        unique = deduplicate(keys_L, positives_L)
        order_U, send_R, receive_R = self._route(unique.keys_U)
        keys_O, shows_O, positives_O = (
            self._ranks.exchange(column_U[order_U].astype(np.int64), send_R=send_R, receive_R=receive_R)
            for column_U in (unique.keys_U, unique.shows_U, unique.positives_U)
        )
        owned = self.table.map(
            keys_O,
            shows_N=shows_O.astype(np.int32),
            positives_N=positives_O.astype(np.int32),
            now_s=now_s,
        )
        slots_U = self._answer(owned.slots_N, order_U, send_R=send_R, receive_R=receive_R)
        return Routed(global_slots_L=slots_U[unique.inverse_N], owned=owned)

    def lookup(self, keys_L: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Global slots of a batch's keys, -1 where absent; changes nothing. Collective."""
        unique = deduplicate(keys_L, np.zeros(len(keys_L), np.int32))
        order_U, send_R, receive_R = self._route(unique.keys_U)
        keys_O = self._ranks.exchange(unique.keys_U[order_U], send_R=send_R, receive_R=receive_R)
        slots_U = self._answer(self.table.lookup(keys_O), order_U, send_R=send_R, receive_R=receive_R)
        return slots_U[unique.inverse_N]

    def _route(
        self, keys_U: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """(order that groups keys by owner, keys to send to each rank, keys to receive from each)."""
        world_size = self._ranks.world_size
        if world_size == 1:
            count = np.array([len(keys_U)], np.int64)
            return np.arange(len(keys_U)), count, count
        owner_U = owner_of(keys_U, num_owners=world_size)
        send_R = np.bincount(owner_U, minlength=world_size).astype(np.int64)
        return np.argsort(owner_U, kind="stable"), send_R, self._ranks.exchange_counts(send_R)

    def _answer(
        self,
        local_slots_O: npt.NDArray[np.int64],
        order_U: npt.NDArray[np.int64],
        *,
        send_R: npt.NDArray[np.int64],
        receive_R: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        """Send each rank the global slots of the keys it asked for; put the answers in its order."""
        first_slot = self._ranks.rank * self._slots_per_rank
        global_O = np.where(local_slots_O >= 0, local_slots_O + first_slot, -1).astype(np.int64)
        answered = self._ranks.exchange(global_O, send_R=receive_R, receive_R=send_R)
        slots_U = np.empty(len(order_U), np.int64)
        slots_U[order_U] = answered
        return slots_U
