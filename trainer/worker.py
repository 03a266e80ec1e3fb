"""One rank of a training run, put together from its parts."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
import torch.distributed as dist

from param_server.client import ClientSecurity, ParamServerClients
from trainer.checkpoint import Checkpoints, Progress, StatePart
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config
from trainer.config.optimizers import check_can_be_saved
from trainer.learning_rate import WarmUp
from trainer.ledger import Ledger
from trainer.loop import LoopPaths, StopSwitch, TrainingLoop
from trainer.metrics import QualityWindow
from trainer.model import check_can_be_served
from trainer.publish.program_cache import PROGRAM_FILE
from trainer.publish.publisher import Publisher
from trainer.publish.publishing import Publishing, quality_gate
from trainer.publish.quality_gate import QualityGate
from trainer.recommender import Recommender
from trainer.run.status import TrainerStatus, write_status
from trainer.source_opening import OpenSource
from trainer.stream.broker import Security
from trainer.stream.columns import Position
from trainer.stream.source import KafkaSource
from trainer.warm_up import compile_kernels

log = structlog.get_logger()


def run_worker(config: Config, *, run_dir: Path, security: Security, shard_security: ClientSecurity) -> None:
    """Train until told to stop or until the stream is drained; goes on from the newest checkpoint.

    Args: security: towards Kafka. shard_security: towards the shards.
    Raises: FreshetError, ParamServerError: what stands in the way, in one line.
    """
    check_can_be_saved(config)
    torch.set_num_threads(config.train.num_threads)
    stop = StopSwitch()
    _on_stop_signals(lambda: setattr(stop, "requested", True))
    paths = _paths(run_dir)
    # Before the ranks wait for each other: it may take long, and not equally long on each.
    compile_kernels(config)
    ranks = start_ranks(config.train.device, timeout_s=config.train.rank_timeout_s)
    if ranks.rank == 0:
        write_status(paths.status, TrainerStatus(state="starting"))
    with ExitStack() as cleanup:
        cleanup.callback(dist.destroy_process_group)
        client = None
        if config.serving.shard_addresses:
            client = ParamServerClients(
                config.serving.shard_addresses, config.publish.request_timeout_s, security=shard_security
            )
            cleanup.callback(client.close)
        state = _restored(config, run_dir=run_dir, ranks=ranks, on=cleanup)
        publishing = None
        if client is not None:
            publishing = _publishing(
                config, state=state, client=client, ranks=ranks, run_dir=run_dir, on=cleanup
            )
        loop = TrainingLoop(
            config=config,
            recommender=state.recommender,
            open_source=_source_opener(config, ranks=ranks, security=security),
            positions=state.positions,
            publishing=publishing,
            checkpoints=state.checkpoints,
            newest_checkpoint=state.checkpoint,
            window=state.window,
            ledger=state.ledger,
            parts=state.parts,
            progress=state.progress,
            warm_up=WarmUp(config.train, resumed_at=state.progress.step if state.checkpoint else None),
            ranks=ranks,
            paths=paths,
            stop=stop,
        )
        cleanup.callback(loop.close)
        if ranks.rank == 0:
            log.info(
                "training begins",
                topic=config.kafka.topic,
                bootstrap_servers=config.kafka.bootstrap_servers,
                partitions=loop.source.num_partitions,
                ranks=ranks.world_size,
                checkpoint=state.checkpoint or "none, it begins with the stream",
                shards=list(config.serving.shard_addresses) or "none, it publishes nothing",
                run_dir=str(run_dir),
            )
        loop.run()


def _paths(run_dir: Path) -> LoopPaths:
    """With the folders that they need."""
    paths = LoopPaths(
        status=run_dir / "status" / "trainer.json",
        drain=run_dir / "control" / "drain",
        broken_off=run_dir / "control" / "broken-off",
        verification=run_dir / "verify.safetensors",
    )
    for path in (paths.status, paths.drain):
        path.parent.mkdir(parents=True, exist_ok=True)
    return paths


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """What a rank trains, as the newest checkpoint left it, or fresh."""

    recommender: Recommender
    window: QualityWindow
    ledger: Ledger | None
    gate: QualityGate | None
    parts: dict[str, StatePart]
    checkpoints: Checkpoints
    checkpoint: str
    """The name of the one that it comes from; empty = it is fresh."""
    progress: Progress
    positions: list[Position]


def _restored(config: Config, *, run_dir: Path, ranks: Ranks, on: ExitStack) -> _State:
    recommender = Recommender(config, ranks=ranks)
    if config.serving.shard_addresses:
        check_can_be_served(recommender.dense, config=config)
    window = QualityWindow(
        domains=config.schema.domains,
        tasks=config.schema.task_names,
        # Rounded up: together the ranks hold at least what the quality gate may wait for.
        window=-(-config.train.metrics_window // ranks.world_size),
    )
    root = config.checkpoint.directory or str(run_dir / "checkpoints")
    checkpoints = Checkpoints(root, config=config, ranks=ranks)
    on.callback(checkpoints.close)
    ledger = Ledger() if config.train.ledger else None
    gate = quality_gate(config)
    optional = {"ledger": ledger, "gate": gate, "task_rates": recommender.task_rates}
    parts: dict[str, StatePart] = {"window": window}
    parts |= {name: part for name, part in optional.items() if part is not None}
    restored = checkpoints.restore(recommender, parts=parts)
    if restored is not None:
        log.info("resumed", checkpoint=restored.name, step=restored.progress.step)
    return _State(
        recommender=recommender,
        window=window,
        ledger=ledger,
        gate=gate,
        parts=parts,
        checkpoints=checkpoints,
        checkpoint=restored.name if restored is not None else "",
        progress=restored.progress if restored is not None else Progress(),
        positions=restored.positions if restored is not None else [],
    )


def _publishing(
    config: Config,
    *,
    state: _State,
    client: ParamServerClients,
    ranks: Ranks,
    run_dir: Path,
    on: ExitStack,
) -> Publishing:
    """Opens a generation that is newer than the state's."""
    publisher = _publisher(config, recommender=state.recommender, client=client, ranks=ranks, run_dir=run_dir)
    on.callback(publisher.close)
    # Before it: a call that is still on its way then waits for nobody, and is lost as in a crash.
    on.callback(client.close)
    progress = state.progress
    progress.generation = publisher.open(at_least=progress.generation)
    publisher.produced.newest_ms = progress.produced_ms_newest
    return Publishing(publisher, config=config, window=state.window, gate=state.gate, ranks=ranks)


def _source_opener(config: Config, *, ranks: Ranks, security: Security) -> OpenSource:
    def open_source(positions: Iterable[Position], topic_id: str) -> KafkaSource:
        return KafkaSource(
            config.kafka,
            schema=config.schema,
            batch_size=config.train.batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            positions=positions,
            expected_topic_id=topic_id,
            security=security,
        )

    return open_source


def _publisher(
    config: Config, *, recommender: Recommender, client: ParamServerClients, ranks: Ranks, run_dir: Path
) -> Publisher:
    return Publisher(
        recommender,
        client=client,
        config=config,
        ranks=ranks,
        trace_path=run_dir / "versions.jsonl",
        program_path=run_dir / PROGRAM_FILE,
    )


def _on_stop_signals(action: Callable[[], None]) -> None:
    """SIGTERM and SIGINT end the run at the next step boundary."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: action())
