"""The verdict over a finished run: ledger, state, serving, each against what it must be."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from param_server.client import ParamServerClient, ReplicaClient
from tests.chaos import checks, state
from tests.chaos.processes import LOOK_S
from tests.chaos.runner import Ground, Run
from trainer.features import request_columns
from trainer.run.verify import load_expected
from trainer.stream.slicing import slice_impressions

HEAD_TIMEOUT_S = 30.0
RELATIVE_DIFF_MAX = 1e-5
ASK_AT_ONCE = 4_096


def judge(run: Run, *, ground: Ground, reference: state.State) -> checks.Findings:
    """Everything that must hold at the end of a run.

    Args: reference: the final state of a run to which nothing happened.
    """
    plan = run.outcome.plan
    found = state.read_newest(run.checkpoints)
    findings = checks.check_ledger(found, ground.produced.request_ids_N)
    if plan.changes_world_size:
        findings += checks.check_close(found, reference, relative_max=RELATIVE_DIFF_MAX)
    else:
        findings += checks.check_identical(found, reference)
    if plan.serving:
        findings += _judge_serving(run, found, ground=ground)
    return findings


def _judge_serving(run: Run, found: state.State, *, ground: Ground) -> checks.Findings:
    """Shard and replica hold what the trainer holds; a replica that has just started is one more witness."""
    run.start_replica("fresh")
    verification = run.directory / "verify.safetensors"
    with ParamServerClient(run.shard_address, timeout_s=HEAD_TIMEOUT_S) as shard:
        findings = checks.check_shard(shard, found, ground.produced.keys_by_table)
    answers = {}
    for name, address in run.replicas.items():
        with ReplicaClient(address, timeout_s=HEAD_TIMEOUT_S) as replica:
            _wait_for_head(replica, verification)
            findings += checks.check_replica(name, replica, state=found, verification=verification)
            answers[name] = _predict_all(replica, ground)
    return findings + checks.check_replicas_agree(answers)


def _wait_for_head(replica: ReplicaClient, verification: Path) -> None:
    """Give the replica time to come to the trainer's last version; that it has is another check's to say."""
    version = load_expected(verification).version
    deadline_s = time.monotonic() + HEAD_TIMEOUT_S
    while replica.status().version != version and time.monotonic() < deadline_s:
        time.sleep(LOOK_S)


def _predict_all(replica: ReplicaClient, ground: Ground) -> state.Arrays:
    """The replica's answers for the whole stream, so that every row there is takes part."""
    impressions = ground.produced.impressions
    parts: dict[str, list[state.Array]] = {}
    for start in range(0, len(impressions), ASK_AT_ONCE):
        piece = slice_impressions(impressions, start, start + ASK_AT_ONCE)
        outputs = replica.predict(request_columns(piece, ground.config.schema)).outputs
        for task, values in outputs.items():
            parts.setdefault(task, []).append(values)
    return {task: np.concatenate(values) for task, values in parts.items()}
