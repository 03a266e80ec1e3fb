"""What must hold after any faults; every check returns its findings, and none means that all is well.

Shapes: N rows of a table or impressions produced, D a table's dim, K impressions of the ledger.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from param_server.client import ParamServerClient, ReplicaClient
from tests.chaos.state import Arrays, State
from trainer.run.verify import compare, load_expected

Findings = list[str]

PREDICTION_DIFF_MAX = 1e-6
"""ONNX and PyTorch add up in another order; rows themselves are compared bit for bit."""


def check_ledger(state: State, produced_N: npt.NDArray[np.uint64]) -> Findings:
    """Every impression produced was applied exactly once, and no other.

    Args: produced_N: the ids of all impressions in the topic, each once.
    """
    assert len(np.unique(produced_N)) == len(produced_N), "an impression's id must be its own"
    lost_M = np.setdiff1d(produced_N, state.ledger_ids_K)
    strange_M = np.setdiff1d(state.ledger_ids_K, produced_N)
    repeated_M = state.ledger_ids_K[state.ledger_counts_K != 1]
    findings = [
        f"ledger: {len(ids_M)} of {len(produced_N)} impressions {what}, first {int(ids_M[0])}"
        for what, ids_M in (
            ("were never applied", lost_M),
            ("were applied but not produced", strange_M),
            ("were not applied exactly once", repeated_M),
        )
        if len(ids_M)
    ]
    counted = state.manifest.counters["impressions_trained"]
    if counted != len(produced_N):
        findings.append(f"counter: impressions_trained is {counted}, produced were {len(produced_N)}")
    return findings


def check_identical(found: State, expected: State) -> Findings:
    """Tables, dense parameters, optimizer state, id tables and metric windows are equal bit for bit."""
    findings = _compare_arrays("dense", found.dense, expected.dense)
    findings += _compare_arrays("part", found.parts, expected.parts)
    if found.tables.keys() != expected.tables.keys():
        findings.append(f"tables {sorted(found.tables)}, expected {sorted(expected.tables)}")
        return findings
    for name, table in found.tables.items():
        other = expected.tables[name]
        mine, theirs = {"keys_N": table.keys_N, **table.columns}, {"keys_N": other.keys_N, **other.columns}
        findings += _compare_arrays(f"table '{name}'", mine, theirs)
    for what in ("step", "positions", "counters", "dead_letters"):
        mine, theirs = getattr(found.manifest, what), getattr(expected.manifest, what)
        if mine != theirs:
            findings.append(f"{what}: {mine}, expected {theirs}")
    return findings


def check_close(found: State, expected: State, *, relative_max: float) -> Findings:
    """The same rows live, and every embedding, dense array and optimizer state differs by at most so much.

    Relative to the array's norm: single numbers near zero say nothing. For another number of ranks, whose
    sums are made in another order.
    """
    findings = []
    for name, table in found.tables.items():
        other = expected.tables[name]
        if not np.array_equal(table.keys_N, other.keys_N):
            num = len(np.setxor1d(table.keys_N, other.keys_N))
            findings.append(f"table '{name}': {num} keys live on one side only")
            continue
        for column in ("rows_ND", "state_N"):
            findings += _far(
                f"table '{name}' {column}", table.columns[column], other.columns[column], relative_max
            )
    for name, array in found.dense.items():
        findings += _far(f"dense '{name}'", array, expected.dense[name], relative_max)
    return findings


def _far(what: str, found: npt.NDArray[Any], expected: npt.NDArray[Any], relative_max: float) -> Findings:
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    difference = float(np.linalg.norm(found.astype(np.float64) - expected.astype(np.float64)))
    if difference <= relative_max * norm:
        return []
    return [f"{what}: differs by {difference / max(norm, 1e-30):.2e} of its norm, at most {relative_max:g}"]


def _compare_arrays(what: str, found: Arrays, expected: Arrays) -> Findings:
    if found.keys() != expected.keys():
        return [f"{what}: only on one side: {', '.join(sorted(found.keys() ^ expected.keys()))}"]
    findings = []
    for name, array in found.items():
        other = expected[name]
        if array.shape != other.shape or array.dtype != other.dtype:
            findings.append(
                f"{what} {name}: {array.dtype} {list(array.shape)}, "
                f"expected {other.dtype} {list(other.shape)}"
            )
        elif array.tobytes() != other.tobytes():
            num = int((_bytes_of(array) != _bytes_of(other)).any(axis=1).sum())
            findings.append(f"{what} {name}: {num} of {array.size} values differ in their bits")
    return findings


def _bytes_of(array: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    """uint8 [values, bytes of one]."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(array.size, array.itemsize)


def check_shard(
    client: ParamServerClient, state: State, keys_by_table: dict[str, npt.NDArray[np.int64]]
) -> Findings:
    """The shard holds the trainer's rows bit for bit, and none of any key that the trainer has let go.

    Args: keys_by_table: every key that the stream ever had.
    """
    findings: Findings = []
    for name, table in state.tables.items():
        _, pulled = client.pull(name, keys_by_table[name])
        order_N = np.argsort(pulled.ids_N, kind="stable")
        held_N = pulled.ids_N[order_N]
        surplus_M = np.setdiff1d(held_N, table.keys_N)
        missing_M = np.setdiff1d(table.keys_N, held_N)
        if len(surplus_M):
            findings.append(f"shard, table '{name}': {len(surplus_M)} rows that the trainer has deleted")
        if len(missing_M):
            findings.append(
                f"shard, table '{name}': {len(missing_M)} of {len(table.keys_N)} rows are missing"
            )
        if not len(surplus_M) and not len(missing_M):
            mine = {"rows_ND": pulled.rows_ND[order_N]}
            findings += _compare_arrays(f"shard, table '{name}'", mine, {"rows_ND": table.columns["rows_ND"]})
    return findings


def check_replica(name: str, client: ReplicaClient, *, state: State, verification: Path) -> Findings:
    """The replica is at the trainer's last version, holds as many rows, and predicts as the trainer does."""
    expected = load_expected(verification)
    status = client.status()
    findings = []
    if status.version != expected.version:
        findings.append(f"{name}: at version {status.version}, the trainer's last is {expected.version}")
    num_rows = sum(len(table.keys_N) for table in state.tables.values())
    if status.num_rows != num_rows:
        findings.append(f"{name}: {status.num_rows} rows, the trainer has {num_rows}")
    compared = compare(client, expected)
    if not compared.max_abs_diff <= PREDICTION_DIFF_MAX:
        findings.append(
            f"{name}: predictions differ by {compared.max_abs_diff:.2e}, at most {PREDICTION_DIFF_MAX:g}"
        )
    return findings


def check_replicas_agree(answers: dict[str, Arrays]) -> Findings:
    """Replicas run one program on one set of rows: where rows are equal, so is every bit of the answers."""
    (first, expected), *others = answers.items()
    findings: Findings = []
    for name, found in others:
        findings += _compare_arrays(f"{name} against {first}: prediction", found, expected)
    return findings
