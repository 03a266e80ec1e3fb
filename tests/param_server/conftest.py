"""A synthetic trainer, and shards and replicas as real processes over gRPC on loopback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from feature_eviction.keys import make_keys
from param_server.client import (
    BlobRef,
    Manifest,
    ParamServerClient,
    ReplicaClient,
    RowSegment,
    ServingSignature,
    SignatureFeature,
    Version,
    blob_ref,
    content_name,
    encode,
    encode_signature,
    encode_tensors,
)

ROOT = Path(__file__).resolve().parents[2]
DIM = 4
DEADLINE_S = 60.0

FEATURES = (
    SignatureFeature(name="domain", class_id=1, table="t", dim=DIM),
    SignatureFeature(name="item_id", class_id=4, table="t", dim=DIM),
    SignatureFeature(name="tags", class_id=6, table="t", dim=DIM, kind="multi", ids_max=5),
    SignatureFeature(name="age", class_id=9, table="t", dim=DIM, kind="dense", bucket_edges=(1.0, 3.0)),
)
DOMAINS = ("discovery", "slide")
TASKS = ("click", "like")
WIDTH = DIM * len(FEATURES)


def make_program(width: int = WIDTH, num_tasks: int = len(TASKS)) -> bytes:
    """probabilities = sigmoid(embeddings @ weight + bias); its own weights are all 7."""
    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["embeddings", "weight", "bias"], ["logits"]),
            helper.make_node("Sigmoid", ["logits"], ["probabilities"]),
        ],
        "tower",
        [helper.make_tensor_value_info("embeddings", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", num_tasks])],
        [
            numpy_helper.from_array(np.full((width, num_tasks), 7, np.float32), "weight"),
            numpy_helper.from_array(np.full(num_tasks, 7, np.float32), "bias"),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def make_signature(schema_hash: str = "s1") -> ServingSignature:
    return ServingSignature(
        model_name="freshet", schema_hash=schema_hash, features=FEATURES, domains=DOMAINS, tasks=TASKS
    )


def key(class_id: int, raw_id: int) -> int:
    keys_N, _ = make_keys(np.array([raw_id]), class_id=class_id)
    return int(keys_N[0])


@dataclass
class SyntheticTrainer:
    """Keeps the truth that serving must equal, and publishes it."""

    client: ParamServerClient
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(7))
    rows: dict[int, np.ndarray] = field(default_factory=dict)
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    generation: int = 0
    head: Version | None = None
    shared_sent: bool = False

    def open(self) -> None:
        self.generation, self.head = self.client.open_generation(0)
        self.shared_sent = False

    def next_version(self) -> Version:
        if self.head is not None and self.head.generation == self.generation:
            return Version(self.generation, self.head.sequence + 1)
        return Version(self.generation, 1)

    def train(self, keys: list[int]) -> None:
        for one in keys:
            self.rows[one] = self.rng.normal(size=DIM).astype(np.float32)
        self.weights = {
            "weight": self.rng.normal(size=(WIDTH, len(TASKS))).astype(np.float32),
            "bias": self.rng.normal(size=len(TASKS)).astype(np.float32),
        }

    def full(self) -> Manifest:
        return self.publish("full", list(self.rows), [])

    def delta(self, keys: list[int], deletes: list[int] | None = None) -> Manifest:
        for one in deletes or []:
            self.rows.pop(one, None)
        return self.publish("delta", keys, deletes or [])

    def publish(self, kind: str, keys: list[int], deletes: list[int]) -> Manifest:
        manifest, blobs = self.describe(kind, keys, deletes)
        self.client.publish(manifest.version, blobs)
        self.client.commit(manifest)
        self.head, self.shared_sent = manifest.version, True
        return manifest

    def describe(self, kind: str, keys: list[int], deletes: list[int]) -> tuple[Manifest, list[Any]]:
        segment = RowSegment(
            table="t",
            ids_N=np.array(keys, np.int64),
            rows_ND=np.array([self.rows[one] for one in keys], np.float32).reshape(-1, DIM),
            deleted_ids_M=np.array(deletes, np.int64),
        )
        rows = encode(segment, row_format="float32")
        dense = encode_tensors(self.weights, metadata={})
        program, signature = make_program(), encode_signature(make_signature())
        references: list[BlobRef] = [
            blob_ref("rows", "t-0", rows, table="t", num_rows=len(keys), num_deletes=len(deletes)),
            blob_ref("dense", "dense", dense),
            blob_ref("program", content_name("program", program), program),
            blob_ref("signature", content_name("signature", signature), signature),
        ]
        contents = [rows, dense, program, signature]
        num_sent = 2 if self.shared_sent else 4
        version = self.next_version()
        manifest = Manifest(
            version=version,
            parent=self.head,
            kind=kind,
            blobs=tuple(references),
            schema_hash="s1",
            watermark_ms=1,
            produced_ms_newest=int(time.time() * 1000),
            created_ms=int(time.time() * 1000),
        )
        blobs = [(ref.kind, ref.name, data) for ref, data in zip(references, contents, strict=True)]
        return manifest, blobs[:num_sent]

    def expected(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The same prediction by plain loops in float64."""
        offsets = np.concatenate([[0], np.cumsum(inputs["tags.lengths"])])
        answers = []
        for i in range(len(inputs["item_id"])):
            domain = inputs["domain"][i]
            domain = DOMAINS.index(domain) if isinstance(domain, str) else int(domain)
            age = float(inputs["age"][i])
            bucket = 3 if np.isnan(age) else sum(edge <= age for edge in (1.0, 3.0))
            tags = [key(6, int(tag)) for tag in inputs["tags"][offsets[i] : offsets[i + 1]]]
            present = [self.rows[tag].astype(np.float64) for tag in tags if tag in self.rows]
            zeros = np.zeros(DIM)
            embedding = np.concatenate(
                [
                    self.rows.get(key(1, domain), zeros),
                    self.rows.get(key(4, int(inputs["item_id"][i])), zeros),
                    np.mean(present, axis=0) if present else zeros,
                    self.rows.get(key(9, bucket), zeros),
                ]
            )
            logits = embedding @ self.weights["weight"].astype(np.float64) + self.weights["bias"]
            answers.append(1 / (1 + np.exp(-logits)))
        return {task: np.array(answers)[:, index] for index, task in enumerate(TASKS)}


def make_inputs(rng: np.random.Generator, batch: int, *, ids: int = 40) -> dict[str, np.ndarray]:
    lengths = rng.integers(0, 6, size=batch).astype(np.int32)
    age = rng.uniform(0, 5, size=batch).astype(np.float32)
    age[::5] = np.nan
    return {
        "domain": rng.choice(np.array(DOMAINS, object), size=batch),
        "item_id": rng.integers(0, ids, size=batch),
        "tags": rng.integers(0, ids, size=int(lengths.sum())),
        "tags.lengths": lengths,
        "age": age,
    }


def all_keys(ids: int = 30) -> list[int]:
    """Fewer ids than make_inputs asks for, so that some are unknown."""
    return (
        [key(1, index) for index in range(len(DOMAINS))]
        + [key(4, raw_id) for raw_id in range(ids)]
        + [key(6, raw_id) for raw_id in range(ids)]
        + [key(9, bucket) for bucket in range(3)]
    )


@dataclass
class Child:
    """One process of the parameter server."""

    process: subprocess.Popen[bytes]
    address: str

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def terminate(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=DEADLINE_S)


class Children:
    """Starts processes and ends what is left of them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, *arguments: str, **options: Any) -> Child:
        ready = self.folder / f"ready-{len(self._started)}.json"
        process = self.popen(*arguments, "--ready-file", str(ready), **options)
        wait_until(lambda: ready.exists() or process.poll() is not None)
        assert process.poll() is None, f"{arguments} ended with {process.returncode}"
        facts = json.loads(ready.read_bytes())
        assert facts["pid"] == process.pid
        return Child(process, facts["address"])

    def popen(self, *arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **options.pop("env", {})}
        process = subprocess.Popen(
            [sys.executable, "-m", "param_server", *arguments], cwd=ROOT, env=environment, **options
        )
        self._started.append(process)
        return process

    def shard(self, address: str = "127.0.0.1:0", *more: str, keep_full: int = 2, **options: Any) -> Child:
        folder = str(self.folder / "log")
        arguments = ("--address", address, "--log-dir", folder, "--keep-full", str(keep_full), *more)
        return self.start("shard", *arguments, **options)

    def replica(self, shard: str, address: str = "127.0.0.1:0", *, name: str = "replica") -> Child:
        return self.start("replica", "--shard", shard, "--address", address, "--name", name)

    def end(self) -> None:
        for process in self._started:
            if process.poll() is None:
                process.kill()
            process.wait()


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for something that must come; the deadline only ends a hopeless test."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not come"
        time.sleep(0.01)


def wait_for_version(replica: ReplicaClient, version: Version) -> None:
    wait_until(lambda: replica.status().version == version)


@pytest.fixture
def kit() -> SimpleNamespace:
    """The helpers above, for test modules (which import nothing from each other)."""
    return SimpleNamespace(
        dim=DIM,
        tasks=TASKS,
        domains=DOMAINS,
        trainer=SyntheticTrainer,
        make_program=make_program,
        make_signature=make_signature,
        make_inputs=make_inputs,
        all_keys=all_keys,
        key=key,
        wait_until=wait_until,
        wait_for_version=wait_for_version,
    )


@pytest.fixture
def children(tmp_path: Path) -> Iterator[Children]:
    started = Children(tmp_path)
    yield started
    started.end()
