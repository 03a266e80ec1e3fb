"""The verification of replicas inside a run, and the watch for a run that stands still."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
from rich.console import Console

from param_server.client import ParamServerError, Prediction, ReplicaState, RequestError, Version
from trainer.config import Config
from trainer.errors import ChildError
from trainer.run.freshness import FreshnessJoin
from trainer.run.live_view import View
from trainer.run.observe import Observer
from trainer.run.plan import RunOptions, RunPlan
from trainer.run.processes import ChildSpec
from trainer.run.run_all import run_all
from trainer.run.run_directory import RunDirectory, open_run_directory
from trainer.run.stages import Stages


class Link:
    """A replica's answers: the trainer's own plus `error`, from `version`."""

    def __init__(self, state: ReplicaState, *, error: float | ParamServerError, version: str) -> None:
        self.state = replace(state, version=Version.parse(version))
        self.error = error
        self.is_closed = False

    def status(self) -> ReplicaState:
        return self.state

    def predict(self, inputs: dict[str, npt.NDArray[Any]]) -> Prediction:
        if isinstance(self.error, ParamServerError):
            raise self.error
        outputs_B = np.full(len(inputs["user_id"]), self.error, np.float32)
        assert self.state.version is not None
        return Prediction(outputs={"click": outputs_B}, version=self.state.version, age_ms=1)

    def close(self) -> None:
        self.is_closed = True


Run = Callable[[list[Link]], tuple[int, dict[str, Any]]]


@pytest.fixture
def run(child_script: Path, import_from_repository: None, small_config: Config, options: RunOptions) -> Run:
    """Runs small processes with the given links in the place of the replicas' connections."""

    def spec(name: str, mode: str, directory: RunDirectory, *, ends: bool) -> ChildSpec:
        argv = (sys.executable, str(child_script), mode, name, str(directory.root))
        return ChildSpec(name=name, argv=argv, ends_itself=ends, ready_timeout_s=None if ends else 60.0)

    def go(links: list[Link]) -> tuple[int, dict[str, Any]]:
        names = [f"replica-{number}" for number in range(len(links))]
        by_address = {f"{name}.example:1": link for name, link in zip(names, links, strict=True)}

        def plan(config: Config, options: RunOptions, directory: RunDirectory) -> RunPlan:
            return RunPlan(
                services=tuple(spec(name, "service", directory, ends=False) for name in names),
                trainer=spec("trainer", "trainer", directory, ends=True),
                producer=spec("producer", "producer", directory, ends=True),
                replicas=tuple(names),
            )

        serving = msgspec.structs.replace(small_config.serving, num_replicas=len(links))
        config = msgspec.structs.replace(small_config, serving=serving)
        code = run_all(config, options, make_plan=plan, connect=by_address.__getitem__)
        return code, json.loads((options.out_dir / "summary.json").read_text())

    return go


def failed(summary: dict[str, Any]) -> list[str]:
    return [check["name"] for check in summary["checks"] if not check["passed"]]


def test_replicas_that_agree_pass(run: Run, replica_state: ReplicaState) -> None:
    links = [Link(replica_state, error=0.0, version="1.7") for _ in range(2)]
    code, summary = run(links)
    assert (code, failed(summary)) == (0, [])
    assert summary["replicas"] == [
        {"name": name, "version": "1.7", "predictions_checked": 3, "max_abs_diff": 0.0}
        for name in ("replica-0", "replica-1")
    ]
    assert all(link.is_closed for link in links)


def test_replica_that_predicts_otherwise_is_named(
    run: Run, replica_state: ReplicaState, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = (Link(replica_state, error=error, version="1.7") for error in (0.0, 0.25))
    code, summary = run([good, bad])
    assert (code, failed(summary)) == (1, ["replicas predict what the trainer predicts"])
    assert capsys.readouterr().err == (
        "error: replicas predict what the trainer predicts: allowed difference 1e-06 (float32 rows), "
        "found replica-1: 0.25 over 3 predictions\n"
    )


def test_replica_that_never_reaches_the_last_version_fails(
    run: Run, replica_state: ReplicaState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.stages._CATCH_UP_S", 0.2)
    code, summary = run([Link(replica_state, error=0.0, version="1.6")])
    assert (code, failed(summary)) == (1, ["replicas hold the last version"])
    assert summary["replicas"][0]["version"] == "1.6"


def test_replica_that_refuses_the_examples_fails_and_the_next_is_still_asked(
    run: Run, replica_state: ReplicaState
) -> None:
    refusing = Link(replica_state, error=RequestError("input 'user_id' is unknown"), version="1.7")
    code, summary = run([refusing, Link(replica_state, error=0.0, version="1.7")])
    assert (code, failed(summary)) == (1, ["replicas predict what the trainer predicts"])
    assert [replica["predictions_checked"] for replica in summary["replicas"]] == [0, 3]


def test_prediction_that_is_not_a_number_fails(run: Run, replica_state: ReplicaState) -> None:
    code, summary = run([Link(replica_state, error=float("nan"), version="1.7")])
    assert (code, failed(summary)) == (1, ["replicas predict what the trainer predicts"])
    assert summary["replicas"][0]["max_abs_diff"] is None


def test_run_that_stands_still_is_ended(
    small_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.run.stages._STALL_S", -1.0)
    plan = RunPlan(
        services=(), trainer=ChildSpec(name="t", argv=()), producer=ChildSpec(name="p", argv=()), replicas=()
    )
    with open_run_directory(tmp_path / "run", resume=False) as directory:
        observer = Observer(directory, FreshnessJoin([], steady_from_ms=0))
        view = View(Console(file=io.StringIO()), live=False)
        stages = Stages(small_config, plan, directory, observer=observer, view=view)
        with pytest.raises(ChildError, match="nothing was trained or produced"):
            stages.look_when_due()
