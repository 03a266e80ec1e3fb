"""One way of synchronising in benchmarks.rules_cost: what goes out, what it weighs, what serving knows then.

The trainer's own record of changes decides, its own encoding makes the blobs, and a real replica (without its
socket) loads each version and answers. All ways follow one training run: what is trained does not depend on
what is sent. Shapes: N impressions of a slice, T tasks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from param_server.client import (
    BlobRef,
    Manifest,
    RowFormat,
    RulesConfig,
    Version,
    blob_ref,
    content_name,
    encode_tensors,
)
from param_server.predict import answer
from param_server.receive import ReceivedVersion
from param_server.replica import Replica
from trainer.config import Config
from trainer.features import request_columns
from trainer.publish.changed_rows import ChangedRows, Clocks
from trainer.publish.program import dense_weights, export_program
from trainer.publish.serving_signature import signature_of
from trainer.publish.version_parts import encode_rows, take_rows
from trainer.recommender import Recommender
from trainer.stream.columns import Impressions


@dataclass(frozen=True, slots=True)
class Way:
    """Rules, row format and how many passes lie between two versions."""

    name: str
    rules: RulesConfig
    row_format: RowFormat = "float32"
    every: int = 1


@dataclass(frozen=True, slots=True)
class Model:
    """What every version brings beside its rows; program and signature are sent once."""

    dense: bytes
    program: bytes
    signature: bytes

    @classmethod
    def of(cls, recommender: Recommender, config: Config) -> Model:
        return cls(
            dense=encode_tensors(dense_weights(recommender.dense), metadata={}),
            program=export_program(recommender.dense, embedding_width=recommender.layout.width),
            signature=signature_of(config.schema, recommender.layout),
        )

    def with_dense(self, recommender: Recommender) -> Model:
        return Model(
            dense=encode_tensors(dense_weights(recommender.dense), metadata={}),
            program=self.program,
            signature=self.signature,
        )

    def blobs(self) -> dict[BlobRef, bytes]:
        program, signature = self.program, self.signature
        return {
            blob_ref("dense", "dense", self.dense): self.dense,
            blob_ref("program", content_name("program", program), program): program,
            blob_ref("signature", content_name("signature", signature), signature): signature,
        }


class ForAll(ChangedRows):
    """The record of changes that training writes to: it tells every way's own."""

    def __init__(self, num_slots: int, records: Sequence[ChangedRows]) -> None:
        super().__init__(num_slots)
        self._records = records

    def touch(self, slots_U: npt.NDArray[np.int64]) -> None:
        for record in self._records:
            record.touch(slots_U)

    def evict(self, keys_K: npt.NDArray[np.int64], slots_K: npt.NDArray[np.int64]) -> None:
        for record in self._records:
            record.evict(keys_K, slots_K)


class Serving:
    """A replica that gets what one way lets through."""

    def __init__(self, way: Way, *, recommender: Recommender, config: Config) -> None:
        self.way = way
        self.records = {
            name: ChangedRows(shard.slots_per_rank, table=name) for name, shard in recommender.shards.items()
        }
        self.row_bytes = self.dense_bytes = self.rows_sent = self.versions = 0
        self.held_back: dict[str, int] = {}
        self._recommender = recommender
        self._config = config
        self._replica = Replica(clock_ms=lambda: 0)
        self._sequence = 0

    def forget_totals(self) -> None:
        """What was sent so far was the start of the stream and does not count."""
        self.row_bytes = self.dense_bytes = self.rows_sent = self.versions = 0
        self.held_back = {}

    def publish(self, model: Model, *, now_s: int, event_time_s: int) -> None:
        """One version: take by the rules, encode, load, ack.

        Args: now_s: of the publishing clock; event_time_s: of the newest event that was trained.
        """
        blobs: dict[BlobRef, bytes] = {}
        for name, shard in self._recommender.shards.items():
            record = self.records[name]
            rows = take_rows(
                replace(shard, changed=record),
                full=False,
                rules=self.way.rules,
                clocks=Clocks(now_s=now_s, event_time_s=event_time_s),
                row_format=self.way.row_format,
            )
            taken = rows.taken
            blobs |= dict(
                encode_rows(
                    rows,
                    rank=0,
                    num_shards=1,
                    row_format=self.way.row_format,
                    bytes_max=self._config.publish.segment_bytes_max,
                )
            )
            record.ack(rules=self.way.rules, now_s=now_s)
            self.rows_sent += len(taken.keys_N)
            for reason, num in taken.held_back.items():
                self.held_back[reason] = self.held_back.get(reason, 0) + num
        self.versions += 1
        self.row_bytes += sum(len(data) for data in blobs.values())
        self.dense_bytes += len(model.dense)
        self._load(blobs | model.blobs(), now_s=now_s)

    def _load(self, blobs: dict[BlobRef, bytes], *, now_s: int) -> None:
        parent = Version(1, self._sequence) if self._sequence else None
        self._sequence += 1
        manifest = Manifest(
            version=Version(1, self._sequence),
            parent=parent,
            kind="delta" if parent else "full",
            blobs=tuple(blobs),
            schema_hash=self._config.schema.hash(),
            watermark_ms=1_000 * now_s,
            produced_ms_newest=1_000 * now_s,
            created_ms=1_000 * now_s,
        )
        by_name = {reference.name: data for reference, data in blobs.items()}
        self._replica.apply(ReceivedVersion(manifest=manifest, blobs=by_name))

    def judge(self, impressions: Impressions) -> npt.NDArray[np.float32]:
        """What serving answers for a slice that was not trained yet: float32 [N, T]."""
        outputs = answer(self._replica.store, request_columns(impressions, self._config.schema)).outputs
        return np.stack([outputs[task] for task in self._config.schema.task_names], axis=1)
