"""`python -m trainer run`: the whole path on one machine, from the first process to the report.

  1. start      broker, shard, replicas, trainer, and the producer once the trainer trains
  2. stream     until the producer has produced everything, or its time is up
  3. drain      the trainer trains to the end of the stream, publishes a full version, leaves its examples
  4. verify     every replica holds that version and predicts what the trainer predicts
  5. stop       replicas, shard, broker
  6. conclude   summary.json, report.html, the final screen, the exit code
A signal or a child's death leads from any of 1-4 to 5; what is known by then is still written down. After a
death the run is broken off: the trainer saves its state and publishes nothing more.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime

from rich.console import Console

from param_server.client import ParamServerError, ReplicaClient
from trainer.config import Config
from trainer.errors import FreshetError
from trainer.run.freshness import FreshnessJoin
from trainer.run.live_view import View, final_lines, final_screen
from trainer.run.observe import Observer
from trainer.run.plan import RunOptions, RunPlan, plan_run, resolve_config
from trainer.run.preflight import check_inputs
from trainer.run.run_directory import RunDirectory, open_run_directory, replace_file
from trainer.run.stages import Connect, Stages
from trainer.run.summary import Ending, Summary, summarize, to_json
from trainer.run.supervisor import InterruptedRun, StopSignals, Supervisor

__all__ = ["RunOptions", "run_all"]

_REPLICA_TIMEOUT_S = 5.0
"""Bounds how long a replica that hangs can keep the supervisor from anything else."""

PlanMaker = Callable[[Config, RunOptions, RunDirectory], RunPlan]

_STEADY_AFTER_MS = 10_000
"""Impressions of the first seconds wait for code to be compiled; the steady figures leave them out."""


def _connect(address: str) -> ReplicaClient:
    return ReplicaClient(address, timeout_s=_REPLICA_TIMEOUT_S)


def run_all(
    config: Config,
    options: RunOptions,
    *,
    make_plan: PlanMaker = plan_run,
    connect: Connect = _connect,
) -> int:
    """Run everything to its end; to be called by the main thread.

    Returns: 0 if every check of the summary passed; 1 if one failed or a process died; 130 after SIGINT,
    143 after SIGTERM, 129 after SIGHUP.
    Raises: ConfigError or DataError before anything is started, if the options, the recording or the
        directory cannot be used.
    """
    config = resolve_config(config, options)
    check_inputs(config, options)
    opened = open_run_directory(
        options.out_dir, resume=options.resume, stream_stays=options.bootstrap_servers is not None
    )
    with opened as directory, StopSignals() as signals:
        plan = make_plan(config, options, directory)
        run = _Run(config, options, directory, replicas=plan.replicas)
        run.go(plan, signals, connect)
        summary = run.conclude()
    if signals.received is not None:
        return 128 + signals.received
    return 0 if all(check.passed for check in summary.checks) else 1


class _Run:
    """Carries what the stages leave behind to the conclusion."""

    def __init__(
        self, config: Config, options: RunOptions, directory: RunDirectory, *, replicas: Sequence[str]
    ) -> None:
        self._config = config
        self._options = options
        self._directory = directory
        self._live = sys.stdout.isatty() if options.live is None else options.live
        self._console = Console(file=sys.stdout, force_terminal=True if self._live else None)
        self._started = datetime.now(UTC)
        self._started_ms = time.time_ns() // 1_000_000
        freshness = FreshnessJoin(replicas, steady_from_ms=self._started_ms)
        self._observer = Observer(directory, freshness)
        self._ended = "completed"
        self._unclean: list[str] = []
        self._stages: Stages | None = None

    def go(self, plan: RunPlan, signals: StopSignals, connect: Connect) -> None:
        """Stages 1 to 5; what ends them early is kept for the conclusion."""
        with View(self._console, live=self._live) as view, Supervisor(self._directory, signals) as supervisor:
            stages = Stages(self._config, plan, self._directory, observer=self._observer, view=view)
            self._stages = stages
            try:
                stages.start(supervisor, connect)
                self._observer.freshness.steady_from_ms = time.time_ns() // 1_000_000 + _STEADY_AFTER_MS
                stages.stream(supervisor, seconds=self._options.seconds)
                stages.drain(supervisor)
                stages.verify(supervisor)
                # From here on a signal changes nothing but the haste.
            except InterruptedRun as signal_received:
                self._ended = f"interrupted by {signal_received}"
            except (FreshetError, ParamServerError) as error:
                self._ended = str(error)
                supervisor.break_off()
            view.phase("stopping")
            supervisor.stop_all()
            stages.close()
            self._unclean = supervisor.unclean()

    def conclude(self) -> Summary:
        """Stage 6: write the summary and the report, and show the final screen."""
        # matplotlib takes long to import, and only the end needs it.
        from trainer.run.charts import ChartData
        from trainer.run.report import render_report

        stages = self._stages
        marker = self._directory.read_marker()
        ending = Ending(
            ended=self._ended,
            produced_before=marker.produced_before if marker else 0,
            impressions_wanted=self._config.impressions,
            source_may_end=self._options.data is not None,
            time_was_up=stages is not None and stages.time_was_up,
            owns_stream=self._options.bootstrap_servers is None,
            unclean=self._unclean,
            replicas=stages.replicas if stages else [],
            table_bytes_peak=self._observer.table_bytes_peak,
            started_at=self._started.isoformat(timespec="seconds"),
            duration_s=stages.elapsed_s if stages else 0.0,
            machine=f"{platform.platform()}, {os.cpu_count()} CPUs, Python {platform.python_version()}",
        )
        observer, freshness = self._observer, self._observer.freshness
        summary = summarize(
            self._config, observer.latest, ending, overall=freshness.overall, steady=freshness.steady
        )
        replace_file(self._directory.summary, to_json(summary))
        data = ChartData(
            history=observer.history.items(),
            full_versions=observer.full_versions.items(),
            delta_versions=observer.delta_versions.items(),
            best_possible_auc=summary.best_possible_auc,
            freshness=freshness.overall,
            started_ms=self._started_ms,
        )
        replace_file(self._directory.report, render_report(summary, data).encode())
        self._show(summary)
        return summary

    def _show(self, summary: Summary) -> None:
        if self._live:
            self._console.print(final_screen(summary, report=self._directory.report))
        else:
            sys.stdout.write(final_lines(summary, report=self._directory.report))
        failed = [check for check in summary.checks if not check.passed]
        # What a run that ended early also lacks says nothing: its first failed check is the reason.
        for check in failed if summary.ended == "completed" else failed[:1]:
            sys.stderr.write(f"error: {check.name}: {check.detail}\n")
