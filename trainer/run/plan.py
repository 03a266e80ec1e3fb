"""What a run starts: the children's commands, as data."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from trainer.config import Config
from trainer.config.optimizers import check_can_be_saved
from trainer.errors import ConfigError
from trainer.run.processes import ChildSpec, Fact, Facts
from trainer.run.run_directory import RunDirectory

ANY_PORT = "127.0.0.1:0"
EMBEDDED_CHECKPOINT_S_MAX = 60


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What the command line of `trainer run` decides."""

    out_dir: Path
    impressions: int | None = None
    """None = the configuration's number, or what `seconds` at the configured pace gives."""
    seconds: float | None = None
    """The producer is stopped after this long; None = when it has produced everything."""
    data: Path | None = None
    """Recorded files to play instead of the synthetic stream."""
    bootstrap_servers: str | None = None
    """None = the embedded broker."""
    resume: bool = False
    live: bool | None = None
    """None = a live view where stdout is a terminal, a plain line every few seconds elsewhere."""
    num_ranks: int = 1


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """The processes of a run, in the order of their start."""

    services: tuple[ChildSpec, ...]
    """Run until they are stopped: broker, shard, replicas."""
    trainer: ChildSpec
    producer: ChildSpec
    replicas: tuple[str, ...]
    """Names among `services` whose ready file's address answers as a replica."""


def resolve_config(config: Config, options: RunOptions) -> Config:
    """The configuration with the options worked in; addresses may still be open (port 0).

    Raises: ConfigError where the options contradict each other.
    """
    if options.num_ranks < 1:
        raise ConfigError(f"--ranks must be at least 1, found {options.num_ranks}")
    if options.seconds is not None and not options.seconds > 0:
        raise ConfigError(f"--seconds must be above 0, found {options.seconds}")
    check_can_be_saved(config)
    if options.data is not None and not options.data.exists():
        raise ConfigError(f"--data {options.data}: there is no such file or directory")
    impressions = options.impressions
    if impressions is None and options.seconds is not None:
        impressions = math.ceil(options.seconds * config.produce.impressions_per_s)
    if impressions is None:
        impressions = config.impressions
    if impressions < 1:
        raise ConfigError(f"--impressions must be at least 1, found {impressions}")
    if options.resume and options.bootstrap_servers is None:
        raise ConfigError(
            "--resume: the embedded broker forgets its topics when a run ends, so there is nothing to go on "
            "with. Name a Kafka that stays with --bootstrap-servers, or run without --resume"
        )
    checkpoints = config.checkpoint.directory
    if checkpoints and not options.resume and _holds_checkpoints(checkpoints):
        raise ConfigError(
            f"checkpoint.directory {checkpoints}: holds an earlier run's checkpoints; go on from them with "
            "--resume, or name another directory"
        )
    if config.serving.tls_ca_file:
        raise ConfigError(
            "serving: a run starts its shards on loopback, without TLS. Start shards with TLS by themselves, "
            "and `python -m trainer train` beside them"
        )
    servers = options.bootstrap_servers or ANY_PORT
    kafka = msgspec.structs.replace(config.kafka, bootstrap_servers=servers)
    checkpoint = config.checkpoint
    if options.bootstrap_servers is None:
        # The embedded broker's producer waits for what a checkpoint commits (trainer/stream/producer.py).
        interval_s = min(checkpoint.interval_s, EMBEDDED_CHECKPOINT_S_MAX)
        checkpoint = msgspec.structs.replace(checkpoint, interval_s=interval_s)
    return msgspec.structs.replace(config, impressions=impressions, kafka=kafka, checkpoint=checkpoint)


def _holds_checkpoints(root: str) -> bool:
    # Only here: most runs keep their checkpoints in their own directory and need not load this.
    from trainer.checkpoint.store import open_store

    return bool(open_store(root).names())


def with_addresses(config: Config, facts: Mapping[str, Facts]) -> Config:
    """The configuration with the real addresses of those children that are ready."""
    broker = facts.get("broker", {})
    shards = [facts.get(_shard_name(number), {}) for number in range(config.serving.num_shards)]
    if "bootstrap_servers" in broker:
        servers = str(broker["bootstrap_servers"])
        config = msgspec.structs.replace(
            config, kafka=msgspec.structs.replace(config.kafka, bootstrap_servers=servers)
        )
    if all("address" in shard for shard in shards):
        address = ",".join(str(shard["address"]) for shard in shards)
        config = msgspec.structs.replace(
            config, serving=msgspec.structs.replace(config.serving, shard_address=address)
        )
    return config


def plan_run(config: Config, options: RunOptions, directory: RunDirectory) -> RunPlan:
    """Args: config as resolve_config returns it."""
    embedded = options.bootstrap_servers is None
    num_shards = config.serving.num_shards
    shards = [_shard(number, config, directory) for number in range(num_shards)]
    replicas = [_replica(number, num_shards=num_shards) for number in range(config.serving.num_replicas)]
    broker = _python("broker", "trainer", "broker", "--config", str(directory.config))
    return RunPlan(
        services=((broker,) if embedded else ()) + (*shards, *replicas),
        trainer=_trainer(options, directory),
        producer=_producer(config, options, directory),
        replicas=tuple(spec.name for spec in replicas),
    )


def _python(name: str, *arguments: str | Fact) -> ChildSpec:
    return ChildSpec(name=name, argv=(sys.executable, "-m", *arguments))


def _shard_name(number: int) -> str:
    return f"shard-{number}" if number else "shard"


def _shard(number: int, config: Config, directory: RunDirectory) -> ChildSpec:
    addresses, num_shards = config.serving.shard_addresses or (ANY_PORT,), config.serving.num_shards
    several = ("--shard", str(number), "--num-shards", str(num_shards)) if num_shards > 1 else ()
    return _python(
        _shard_name(number),
        *("param_server", "shard", "--address", addresses[number % len(addresses)]),
        *("--log-dir", str(directory.version_log), "--keep-full", str(config.serving.keep_full)),
        *several,
    )


def _replica(number: int, *, num_shards: int) -> ChildSpec:
    name = f"replica-{number}"
    # Every shard streams whole versions, so replicas are spread over them.
    shard = _shard_name(number % num_shards)
    return _python(
        name,
        *("param_server", "replica", "--shard", Fact(shard, "address")),
        *("--address", ANY_PORT, "--name", name),
    )


def _trainer(options: RunOptions, directory: RunDirectory) -> ChildSpec:
    launcher: tuple[str, ...] = ()
    stopped_codes = ChildSpec.stopped_codes
    if options.num_ranks > 1:
        launcher = ("torch.distributed.run", "--standalone", f"--nproc-per-node={options.num_ranks}", "-m")
        # torchrun passes SIGTERM on, waits for its workers, and then always leaves with exit code 1.
        stopped_codes = (*stopped_codes, 1)
    run = (*launcher, "trainer", "train", "--config", str(directory.config), "--run-dir", str(directory.root))
    return replace(
        _python("trainer", *run),
        ends_itself=True,
        ready_timeout_s=None,
        stop_grace_s=60.0,  # a checkpoint of a large table takes its time
        stopped_codes=stopped_codes,
    )


def _producer(config: Config, options: RunOptions, directory: RunDirectory) -> ChildSpec:
    arguments = ["--config", str(directory.config), "--run-dir", str(directory.root)]
    arguments += ["--impressions", str(config.impressions)]
    if options.data is not None:
        arguments += ["--data", str(options.data.resolve())]
    if options.bootstrap_servers is None:
        arguments.append("--embedded")
    spec = _python("producer", "trainer", "produce", *arguments)
    # Of a broker that has died it waits for answers that its own record of the run does not need.
    return replace(spec, ends_itself=True, ready_timeout_s=None, stop_grace_s=20.0, broken_off_grace_s=3.0)
