"""A trainer's publishing side in benchmarks.freshness: real table, real record of changes, phases one by one.

Nothing is trained: the rows of a version are chosen at random and changed outside of the clock.
Shapes: N rows of a version.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch

from benchmarks.train_step_stream import START_S, config_for, popular_keys
from param_server.client import (
    BlobKind,
    BlobRef,
    Manifest,
    ParamServerClient,
    RulesConfig,
    Version,
    blob_ref,
    content_name,
    encode_tensors,
)
from param_server.receive import ReceivedVersion
from param_server.row_blobs import read_packed
from param_server.serving_model import ServingModel
from param_server.serving_store import ServingStore
from trainer.collectives import Ranks
from trainer.config.config import Config
from trainer.publish.changed_rows import Clocks
from trainer.publish.program import dense_weights, export_program
from trainer.publish.serving_signature import signature_of
from trainer.publish.version_parts import TakenRows, encode_rows, take_rows
from trainer.recommender import Recommender, TableShard

FILL_BLOCK = 1 << 17
DIM = 40
RULES = RulesConfig()


@dataclass(frozen=True, slots=True)
class Sent:
    """A version that is committed."""

    version: Version
    taken_ms: float
    """Unix milliseconds at which its take began."""
    committed_ms: float
    phases_ms: dict[str, float]
    """take, encode, append, commit."""
    num_bytes: int
    received: ReceivedVersion
    """As a replica gets it."""


class Writer:
    """One rank with one full table."""

    def __init__(self, *, rows: int, ranks: Ranks) -> None:
        self.config: Config = config_for(dim=DIM, rows=rows, world_size=1, threads=1)
        self.recommender = Recommender(self.config, ranks=ranks)
        (self._shard,) = self.recommender.shards.values()
        self._generator = np.random.default_rng(1)
        keys_S = popular_keys(self.recommender.layout, rows)
        fill(self._shard, keys_S)
        self._live_slots_S = self._shard.ids.rows().slots_N
        dense = self.recommender.dense
        program = export_program(dense, embedding_width=self.recommender.layout.width)
        signature = signature_of(self.config.schema, self.recommender.layout)
        self._shared = {
            blob_ref("program", content_name("program", program), program): program,
            blob_ref("signature", content_name("signature", signature), signature): signature,
        }
        self._head: Version | None = None
        self._generation = 0

    def open(self, client: ParamServerClient) -> Sent:
        """A new generation, begun with everything."""
        self._generation, self._head = client.open_generation(0)
        began_s = time.perf_counter()
        taken_ms = _wall_ms()
        return self._send(client, self._take(full=True, taken_ms=taken_ms), began_s, taken_ms)

    def change_and_send(self, client: ParamServerClient, *, num_rows: int) -> Sent:
        """A delta of so many rows, the newest of the log when this returns."""
        slots_N = self._generator.choice(self._live_slots_S, num_rows, replace=False)
        rows_ND = torch.from_numpy(self._generator.standard_normal((num_rows, DIM), np.float32))
        self._shard.rows.rows_CD[torch.from_numpy(slots_N.astype(np.int64))] = 0.01 * rows_ND
        self._shard.changed.touch(slots_N.astype(np.int64))
        began_s = time.perf_counter()
        taken_ms = _wall_ms()
        return self._send(client, self._take(full=False, taken_ms=taken_ms), began_s, taken_ms)

    def _take(self, *, full: bool, taken_ms: float) -> TakenRows:
        clocks = Clocks(now_s=int(taken_ms) // 1000, event_time_s=START_S)
        return take_rows(self._shard, full=full, rules=RULES, clocks=clocks, row_format="float32")

    def _send(self, client: ParamServerClient, rows: TakenRows, began_s: float, taken_ms: float) -> Sent:
        """Encode, append, commit, ack what was taken: as the publisher does, with a clock between."""
        taken = rows.taken
        weights = dense_weights(self.recommender.dense)
        times_s = [began_s, time.perf_counter()]
        blobs: dict[BlobRef, bytes] = dict(
            encode_rows(
                rows,
                rank=0,
                num_shards=1,
                row_format="float32",
                bytes_max=self.config.publish.segment_bytes_max,
            )
        )
        dense = encode_tensors(weights, metadata={})
        blobs[blob_ref("dense", "dense", dense)] = dense
        times_s.append(time.perf_counter())
        sequence = 1 if taken.full or self._head is None else self._head.sequence + 1
        version = Version(self._generation, sequence)
        sent: dict[BlobRef, bytes] = blobs | self._shared if taken.full else blobs
        parts: list[tuple[BlobKind, str, bytes]] = [(one.kind, one.name, data) for one, data in sent.items()]
        client.publish(version, parts)
        times_s.append(time.perf_counter())
        everything = blobs | self._shared
        now_ms = int(_wall_ms())
        manifest = Manifest(
            version=version,
            parent=self._head,
            kind="full" if taken.full else "delta",
            blobs=tuple(everything),
            schema_hash=self.config.schema.hash(),
            watermark_ms=START_S * 1000,
            produced_ms_newest=now_ms,
            created_ms=now_ms,
        )
        client.commit(manifest)
        times_s.append(time.perf_counter())
        committed_ms = _wall_ms()
        self._shard.changed.ack(rules=RULES, now_s=now_ms // 1000)
        self._head = version
        took_ms = 1e3 * np.diff(times_s)
        return Sent(
            version=version,
            taken_ms=taken_ms,
            committed_ms=committed_ms,
            phases_ms=dict(zip(("take", "encode", "append", "commit"), took_ms.tolist(), strict=True)),
            num_bytes=sum(len(data) for data in blobs.values()),
            received=ReceivedVersion(manifest, {one.name: data for one, data in everything.items()}),
        )


class TimedReplica:
    """What a replica does with a version, timed: its parts, without its socket."""

    def __init__(self) -> None:
        self._store = ServingStore()

    def load(self, received: ReceivedVersion) -> dict[str, float]:
        """Milliseconds of prepare (decode, write beside, build the model) and switch."""
        manifest, store = received.manifest, self._store
        times_s = [time.perf_counter()]
        segments = [
            read_packed(manifest.version, blob, received.blobs[blob.name]) for blob in manifest.rows_blobs
        ]
        prepared = store.prepare(manifest, segments)
        model = ServingModel(received, before=store.model)
        times_s.append(time.perf_counter())
        store.switch(prepared, model)
        times_s.append(time.perf_counter())
        return dict(zip(("prepare", "switch"), (1e3 * np.diff(times_s)).tolist(), strict=True))


def fill(shard: TableShard, keys_S: np.typing.NDArray[np.int64]) -> None:
    """Every key gets a slot and a row."""
    shard.rows.rows_CD.uniform_(-0.01, 0.01)
    for start in range(0, len(keys_S), FILL_BLOCK):
        keys_N = keys_S[start : start + FILL_BLOCK]
        counts_N = np.ones(len(keys_N), np.int32)
        mapped = shard.ids.map(keys_N, shows_N=counts_N, positives_N=counts_N * 0, now_s=START_S)
        shard.ids.release(mapped.batch)


def _wall_ms() -> float:
    return time.time_ns() / 1e6
