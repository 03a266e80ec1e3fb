"""One rank of a training run, put together from its parts."""

from __future__ import annotations

import signal
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import structlog
import torch
import torch.distributed as dist

from param_server.client import ParamServerClient
from trainer.checkpoint import Checkpoints, Progress
from trainer.collectives import Ranks, start_ranks
from trainer.config import Config
from trainer.ledger import Ledger
from trainer.loop import LoopPaths, StopSwitch, TrainingLoop
from trainer.metrics import QualityWindow
from trainer.publisher import Publisher
from trainer.recommender import Recommender
from trainer.run.status import TrainerStatus, write_status
from trainer.stream.broker import Security
from trainer.stream.columns import Position
from trainer.stream.source import KafkaSource
from trainer.warm_up import compile_kernels

log = structlog.get_logger()


def run_worker(config: Config, *, run_dir: Path, security: Security) -> None:
    """Train until told to stop or until the stream is drained; goes on from the newest checkpoint.

    Raises: FreshetError, ParamServerError: what stands in the way, in one line.
    """
    torch.set_num_threads(config.train.num_threads)
    stop = StopSwitch()
    _on_stop_signals(lambda: setattr(stop, "requested", True))
    paths = LoopPaths(
        status=run_dir / "status" / "trainer.json",
        drain=run_dir / "control" / "drain",
        verification=run_dir / "verify.safetensors",
    )
    for path in (paths.status, paths.drain):
        path.parent.mkdir(parents=True, exist_ok=True)
    ranks = start_ranks(config.train.device)
    if ranks.rank == 0:
        write_status(paths.status, TrainerStatus(state="starting"))
    compile_kernels(config)
    with ExitStack() as cleanup:
        cleanup.callback(dist.destroy_process_group)
        _train(config, run_dir=run_dir, security=security, ranks=ranks, paths=paths, stop=stop, on=cleanup)


def _train(
    config: Config,
    *,
    run_dir: Path,
    security: Security,
    ranks: Ranks,
    paths: LoopPaths,
    stop: StopSwitch,
    on: ExitStack,
) -> None:
    recommender = Recommender(config, ranks=ranks)
    window = QualityWindow(
        domains=config.schema.domains,
        tasks=config.schema.task_names,
        window=max(1, config.train.metrics_window // ranks.world_size),
    )
    root = Path(config.checkpoint.directory) if config.checkpoint.directory else run_dir / "checkpoints"
    checkpoints = Checkpoints(root, config=config, ranks=ranks)
    on.callback(checkpoints.close)
    ledger = Ledger() if config.train.ledger else None
    checkpoints.ledger = ledger
    restored = checkpoints.restore(recommender, window=window)
    progress = restored.progress if restored is not None else Progress()
    positions: list[Position] = restored.positions if restored is not None else []
    if restored is not None:
        log.info("resumed", checkpoint=restored.directory.name, step=progress.step)

    publisher = _publisher(config, recommender=recommender, ranks=ranks, run_dir=run_dir, on=on)
    if publisher is not None:
        progress.generation = publisher.open(at_least=progress.generation)
        publisher.produced.newest_ms = progress.produced_ms_newest
    source = KafkaSource(
        config.kafka,
        schema=config.schema,
        rank=ranks.rank,
        world_size=ranks.world_size,
        positions=positions,
        security=security,
    )
    on.callback(source.close)
    TrainingLoop(
        config=config,
        recommender=recommender,
        source=source,
        publisher=publisher,
        checkpoints=checkpoints,
        window=window,
        ledger=ledger,
        progress=progress,
        ranks=ranks,
        paths=paths,
        stop=stop,
    ).run()


def _publisher(
    config: Config, *, recommender: Recommender, ranks: Ranks, run_dir: Path, on: ExitStack
) -> Publisher | None:
    """None where no shard is configured: the run only trains."""
    if not config.serving.shard_address:
        return None
    client = ParamServerClient(config.serving.shard_address, timeout_s=config.publish.request_timeout_s)
    on.callback(client.close)
    publisher = Publisher(
        recommender,
        client=client,
        config=config,
        ranks=ranks,
        trace_path=run_dir / "versions.jsonl",
    )
    on.callback(publisher.close)
    return publisher


def _on_stop_signals(action: Callable[[], None]) -> None:
    """SIGTERM and SIGINT end the run at the next step boundary."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: action())
